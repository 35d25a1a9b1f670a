"""The scheduler of an exported pipeline: diffusers' FlowMatchLCMScheduler, which adds fresh noise to x0 between steps.

It has no list of timesteps. Its sigmas are a curve of two numbers: equally spaced values are shifted (twice: once when
the scheduler is built, once per run) and stretched so that the last one is `shift_terminal`. The curve passes exactly
through uniform timesteps of any count, one or two timesteps, and most three. Others need a class of their own.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.flow import shift

STOCK_CLASS, OWN_MODULE, OWN_CLASS = "FlowMatchLCMScheduler", "few_step_scheduler", "FewStepScheduler"
OWN_FILE = Path(__file__).with_name(f"{OWN_MODULE}.py")  # travels with the export
TRAIN_TIMESTEPS = 1000
MAX_SIGMA_ERROR = 1e-9  # of a curve that counts as exact
# Up to sqrt(999) the second sigma rises with the shift; beyond, the shifted range of the values shrinks faster.
SHIFT_RANGE, BISECTIONS = (1e-6, math.sqrt(TRAIN_TIMESTEPS - 1)), 200  # to the last bit of a double


def curve_sigmas(curve_shift: float, terminal: float | None, count: int) -> list[float]:
    """The sigmas that FlowMatchLCMScheduler visits in `count` steps."""
    low = shift(1 / TRAIN_TIMESTEPS, curve_shift)
    spaced = [1 - (1 - low) * step / max(1, count - 1) for step in range(count)]
    sigmas = [shift(u, curve_shift) for u in spaced]
    if terminal is None:
        return sigmas
    stretch = (1 - terminal) / (1 - sigmas[-1])
    return [1 - (1 - sigma) * stretch for sigma in sigmas]


def fit_curve(sigmas: Sequence[float]) -> tuple[float, float | None] | None:
    """Shift and terminal of the curve through `sigmas`, which fall from 1; None if there is none."""
    if not math.isclose(sigmas[0], 1):
        return None
    if len(sigmas) == 1:
        return 1.0, None  # one step starts and ends at 1
    low, high = (math.log(value) for value in SHIFT_RANGE)
    for _ in range(BISECTIONS):  # the second sigma rises with the shift
        middle = (low + high) / 2
        if curve_sigmas(math.exp(middle), sigmas[-1], len(sigmas))[1] < sigmas[1]:
            low = middle
        else:
            high = middle
    # two steps have no second sigma besides the last one: any shift fits
    curve_shift = 1.0 if len(sigmas) == 2 else math.exp(high)
    visited = curve_sigmas(curve_shift, sigmas[-1], len(sigmas))
    error = max(abs(one - other) for one, other in zip(visited, sigmas, strict=True))
    return (curve_shift, sigmas[-1]) if error <= MAX_SIGMA_ERROR else None


def scheduler_entry(sigmas: Sequence[float]) -> tuple[str, str]:
    """Module and class of the scheduler in model_index.json."""
    return (OWN_MODULE, OWN_CLASS) if fit_curve(sigmas) is None else ("diffusers", STOCK_CLASS)


def scheduler_config(sigmas: Sequence[float]) -> dict[str, Any]:
    """Content of scheduler_config.json for the sigmas of a student."""
    curve = fit_curve(sigmas)
    base: dict[str, Any] = {"num_train_timesteps": TRAIN_TIMESTEPS}
    if curve is None:
        return {"_class_name": OWN_CLASS, **base, "student_sigmas": list(sigmas)}
    return {"_class_name": STOCK_CLASS, **base, "shift": curve[0], "shift_terminal": curve[1]}
