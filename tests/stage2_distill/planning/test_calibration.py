"""`plan --calibrate`: what was measured corrects all of the plan, and iterations run on this machine."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from cli import cli
from common.planning.cards import Card, find_card
from stage2_distill.config import DistillConfig
from stage2_distill.planning.calibration import Calibration, MeasuredIteration, compare_run
from stage2_distill.planning.config import PlanConfig
from stage2_distill.planning.duration import RolloutPasses, iteration_seconds, list_shapes
from stage2_distill.planning.machine import Machine
from stage2_distill.planning.memory import estimate_memory
from stage2_distill.planning.network_size import TransformerSize
from stage2_distill.planning.plan_text import format_plan
from stage2_distill.planning.run_plan import RunPlan, make_plan

ROOT = Path(__file__).parents[3]
GIB, SIZE = 2**30, TransformerSize()
CONFIG = DistillConfig(("d",), "m", "o", global_batch=1, compile=True)
PASSES = (RolloutPasses(3, 2), RolloutPasses(1, 1, student_updates=0))


def calibration_of(card: Card, device: str, kernel: str, *, time: float, memory: float) -> Calibration:
    """Iterations that took `time` times the predicted seconds, and `memory` times the predicted bytes."""
    predicted = [
        iteration_seconds(CONFIG, SIZE, card, world=1, form="compact", kernel=kernel, passes=one) for one in PASSES
    ]
    iterations = [MeasuredIteration(time * each, one) for each, one in zip(predicted, PASSES, strict=True)]
    peak = memory * estimate_memory(CONFIG, SIZE, world=1, form="compact").gpu
    machine = Machine(1, device, 80 * GIB, kernel)
    return compare_run(CONFIG, SIZE, card, machine, "compact", iterations, peak)


def plan_of(card: Card, calibration: Calibration | None = None) -> RunPlan:
    return make_plan(list_shapes(CONFIG, {}), SIZE, card, gpus=1, records=1000, price=2.0, calibration=calibration)


def test_a_known_card_that_is_slower_than_the_table() -> None:
    card = find_card("h200")
    base = plan_of(card)
    calibration = calibration_of(card, "NVIDIA H200", "cudnn", time=1.5, memory=0.9)
    assert (calibration.time_factor, calibration.memory_factor) == pytest.approx((1.5, 0.9))
    plan = plan_of(card, calibration)
    for name in ("iteration_seconds", "encode_hours"):
        assert vars(plan)[name] == pytest.approx(1.5 * vars(base)[name]), name
    assert plan.memory.gpu == pytest.approx(0.9 * base.memory.gpu) and plan.memory.host == base.memory.host
    assert (plan.card, plan.card_gib, plan.source, plan.kernel) == ("NVIDIA H200", 80, "measured here", "cudnn")
    text = "\n".join(format_plan(plan, CONFIG, records=1000))
    assert "predicted" in text and "times in the plan x 1.5\n" in text and "memory in the plan x 0.9\n" in text
    assert "flash-attn-3 installed" in text
    calibration = calibration_of(card, "NVIDIA H200", "flash-3", time=1.0, memory=1.0)
    assert "flash-attn-3" not in "\n".join(format_plan(plan_of(card, calibration), CONFIG, records=1000))


def test_an_unknown_device_has_its_own_speed() -> None:
    """The table's card only stands in: twice as slow a one gives the same plan."""
    texts = []
    for slow in (1, 2):
        card = Card("h100", 79.1, 989 / slow, 3.35e12 / slow)
        calibration = calibration_of(card, "NVIDIA X1", "cudnn", time=8 / slow, memory=1)
        texts.append(format_plan(plan_of(card, calibration), CONFIG, records=1000))
    assert texts[0] == texts[1]
    assert "this device is not in the table of speeds" in "\n".join(texts[0])
    assert "flash-attn-3" not in "\n".join(texts[0])


def test_a_model_is_needed() -> None:
    with pytest.raises(ValueError, match="calibrate=True: runs iterations of a model; give --model"):
        PlanConfig(calibrate=True)


def run_calibration(model: Path, *changes: str) -> dict[str, object]:
    options = ["plan", "--gpus", "1", "--model", str(model), "--calibrate", "--json"]
    options += [word for change in changes for word in ("--set", change)]
    done = CliRunner().invoke(cli, options, catch_exceptions=False)
    assert done.exit_code == 0 and "calibrate: 4/4, " in done.stderr
    return json.loads(done.stdout)


SMALL = ("num_frames=9", "height=64", "width=64", "batch_size=2", "global_batch=8")


def test_iterations_on_a_cpu(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = run_calibration(model, *SMALL, "dtype=float32", "device=cpu", "max_text_tokens=16")
    found = plan["calibration"]
    assert (found["device"], found["gpus"]) == ("cpu", 1)
    assert found["measured_seconds"] > 0.01 and 0.1 < found["measured_gib"] < found["total_gib"]
    # four micro-batches per iteration instead of one, and the student's update in a fifth instead of in a half of them
    assert 0.5 < plan["iteration_seconds"] / found["measured_seconds"] < 4
    assert list(tmp_path.iterdir()) == []


def test_an_impossible_plan_runs_nothing(model: Path) -> None:
    options = ["plan", "--gpus", "7", "--model", str(model), "--calibrate", "--set", "device=cpu"]
    done = CliRunner().invoke(cli, options)
    assert "global_batch=64: not a multiple" in str(done.exception) and "calibrate: " not in done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_iterations_on_a_gpu() -> None:
    """The nano model, whose heads the kernels for bf16 support."""
    found = run_calibration(ROOT / "examples" / "nano" / "model", *SMALL)["calibration"]
    assert found["device"] == torch.cuda.get_device_name() and found["kernel"] in ("cudnn", "flash-3")
    assert found["measured_seconds"] > 0 and 0 < found["measured_gib"] < found["total_gib"]
