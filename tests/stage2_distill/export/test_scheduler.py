"""The exported scheduler visits exactly the student's sigmas."""

import pytest
from diffusers import FlowMatchLCMScheduler

from common.flow import timestep_sigmas
from stage2_distill.export.few_step_scheduler import FewStepScheduler
from stage2_distill.export.scheduler import OWN_CLASS, STOCK_CLASS, fit_curve, scheduler_config, scheduler_entry

UNIFORM = [tuple(1000 * (count - step) / count for step in range(count)) for count in (1, 2, 3, 4, 5, 8, 16)]
OTHERS = [(1000.0, 757.0, 522.0), (1000.0, 800.0, 400.0), (1000.0, 500.0, 100.0)]


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0])
@pytest.mark.parametrize("timesteps", [*UNIFORM, *OTHERS])
def test_stock_scheduler_visits_the_sigmas(timesteps: tuple[float, ...], shift: float) -> None:
    sigmas = timestep_sigmas(timesteps, s=shift)
    assert scheduler_entry(sigmas) == ("diffusers", STOCK_CLASS)
    scheduler = FlowMatchLCMScheduler.from_config(scheduler_config(sigmas))
    scheduler.set_timesteps(len(sigmas))
    assert scheduler.timesteps.tolist() == pytest.approx([1000 * sigma for sigma in sigmas], abs=1e-3)
    assert scheduler.sigmas.tolist() == pytest.approx([*sigmas, 0], abs=1e-6)


def test_closed_form_of_four_uniform_steps() -> None:
    curve = fit_curve(timestep_sigmas((1000, 750, 500, 250), s=5))
    assert curve == pytest.approx((2.509456, 0.625), abs=1e-6)


@pytest.mark.parametrize("timesteps", [(1000, 900, 400, 100), (1000, 980, 960, 200, 100)])
def test_own_scheduler_for_other_timesteps(timesteps: tuple[float, ...]) -> None:
    sigmas = timestep_sigmas(timesteps, s=5)
    config = scheduler_config(sigmas)
    assert config["_class_name"] == OWN_CLASS
    scheduler = FewStepScheduler.from_config(config)
    scheduler.set_timesteps(len(sigmas))
    assert scheduler.timesteps.tolist() == pytest.approx([1000 * sigma for sigma in sigmas], abs=1e-3)
    with pytest.raises(ValueError, match="num_inference_steps=7"):
        scheduler.set_timesteps(7)
