"""The plan against every row of benchmarks/results that has time or memory of an iteration, a video or encode."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from common.planning.cards import ENCODE_RECORDS, find_card
from common.planning.codec_cost import decode_seconds, encode_gib
from stage2_distill.config import DistillConfig
from stage2_distill.planning.duration import denoising_seconds, forward_seconds, iteration_seconds
from stage2_distill.planning.memory import estimate_memory
from stage2_distill.planning.network_size import TransformerSize

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
SIZE = TransformerSize()
LIMITS = {"iteration": 0.15, "memory": 0.10, "denoising": 0.15, "video": 0.15, "encode": 0.15}


@dataclass(frozen=True)
class Setup:
    """A run that was measured: compiled, one clip per GPU."""

    card: str
    kernel: str = "cudnn"
    gpus: int = 1
    form: str = "compact"
    decode_gpus: int = 1
    changes: dict[str, object] = field(default_factory=dict)

    def predict(self, quantity: str) -> float:
        """Seconds, GiB, or records per second."""
        config = DistillConfig(("d",), "m", "o", global_batch=self.gpus, compile=True, **self.changes)
        card = find_card(self.card)
        assert card is not None
        if quantity == "encode":
            return ENCODE_RECORDS * card.scale * self.gpus
        if quantity == "memory":
            return estimate_memory(config, SIZE, world=self.gpus, form=self.form).gpu / 2**30
        if quantity == "iteration":
            run = {"world": self.gpus, "form": self.form, "kernel": self.kernel}
            return iteration_seconds(config, SIZE, card, **run)
        forward = forward_seconds(SIZE, config.spec, card, self.kernel, text_tokens=512).total
        seconds = denoising_seconds(forward, steps=4, gpus=self.gpus)
        return (
            seconds if quantity == "denoising" else seconds + decode_seconds(config.spec, card, gpus=self.decode_gpus)
        )


REUSE = {"rollout_reuse": True}
LORA = {"lora_rank": 32, "activation_checkpointing": "offload"}
H100, H200, FLASH = Setup("h100"), Setup("h200"), Setup("h200", "flash-3")
H100_MODES = (
    H100,
    Setup("h100", gpus=2),
    Setup("h100", gpus=2, form="standard"),
    Setup("h100", gpus=2, changes={"replicate": 2, "offload": "all"}),
)
FOUR = [
    Setup("h200", "flash-3", 4),
    Setup("h200", "flash-3", 4, "standard"),
    Setup("h200", "flash-3", 4, changes={"replicate": 4, "offload": "all"}),
]
H100_LORA = Setup("h100", form="standard", changes=LORA)
FLASH_LORA = Setup("h200", "flash-3", form="standard", changes=LORA)
MODES2, MODES4 = "modes-2x-nvidia-h200-2026-11-29", "modes-4x-nvidia-h200-2026-11-29"
STEP1, STEP2 = "train_step-nvidia-h100-80gb-hbm3-2026-11-25", "train_step-nvidia-h200-2026-11-29"
STEP3 = "train_step-nvidia-h200-2026-12-01"
REBUILD, ENCODE1 = "rebuild-nvidia-h200-2026-11-30", "encode-h100-2026-11-25"
SAMPLE1, SAMPLE2 = "sample-nvidia-h100-80gb-hbm3-2026-11-25", "sample-nvidia-h200-2026-11-29"
SAMPLE3, PAIR = "sample-nvidia-h200-2026-11-30", "together-2x-nvidia-h200-2026-12-01"
TOGETHER2, TOGETHER4 = "together-2x-nvidia-h100-80gb-hbm3-2026-11-25", "together-4x-nvidia-h200-2026-11-29"

# (file, start of the line's figures, quantity, the run of each figure in the line)
ROWS = [
    ("modes-2x-nvidia-h100-80gb-hbm3-2026-11-25", "mean iteration | 7.194", "iteration", H100_MODES),
    ("modes-2x-nvidia-h100-80gb-hbm3-2026-11-25", "peak memory a GPU, reserved | 69.6", "memory", H100_MODES),
    (MODES2, "alone, mean iteration | 6.535", "iteration", [FLASH]),
    (MODES2, "alone, peak memory, of the rank with most | 69.5", "memory", [FLASH]),
    (MODES2, "compact, mean iteration | 6.733", "iteration", [Setup("h200", "flash-3", 2)]),
    (MODES2, "compact, peak memory, of the rank with most | 52.0", "memory", [Setup("h200", "flash-3", 2)]),
    (MODES4, "alone, mean iteration | 6.609", "iteration", [FLASH]),
    (MODES4, "alone, peak memory, of the rank with most | 69.5", "memory", [FLASH]),
    (MODES4, "compact, mean iteration | 6.840", "iteration", [FOUR[0]]),
    (MODES4, "compact, peak memory, of the rank with most | 33.2", "memory", [FOUR[0]]),
    (MODES4, "standard, mean iteration | 6.865", "iteration", [FOUR[1]]),
    (MODES4, "standard, peak memory, of the rank with most | 40.2", "memory", [FOUR[1]]),
    (MODES4, "hsdp, mean iteration | 6.933", "iteration", [FOUR[2]]),
    (MODES4, "hsdp, peak memory, of the rank with most | 73.9", "memory", [FOUR[2]]),
    (STEP1, "mean iteration | 7.32", "iteration", [H100]),
    (STEP1, "mean iteration | 7.260", "iteration", [H100]),
    (STEP1, "mean iteration | 7.194", "iteration", [H100]),
    (STEP1, "rollout reuse, mean iteration | 5.806", "iteration", [Setup("h100", changes=REUSE)]),
    (STEP1, "peak memory | 69.6", "memory", [H100]),
    (STEP1, "mean iteration | 7.672", "iteration", [H100_LORA]),
    (STEP1, "mean iteration | **7.668", "iteration", [H100_LORA]),
    (STEP1, "peak memory | **21.7", "memory", [H100_LORA]),
    (STEP2, "mean iteration | 7.303", "iteration", [H200]),
    (STEP2, "rollout reuse, mean iteration | 5.948", "iteration", [Setup("h200", changes=REUSE)]),
    (STEP2, "peak memory, of the rank with most | 69.6", "memory", [H200]),
    (STEP2, "rollout reuse, peak memory, of the rank with most | 69.7", "memory", [Setup("h200", changes=REUSE)]),
    (STEP2, "mean iteration | 6.667", "iteration", [FLASH]),
    (STEP2, "rollout reuse, mean iteration | 5.366", "iteration", [Setup("h200", "flash-3", changes=REUSE)]),
    (STEP2, "peak memory, of the rank with most | 69.5", "memory", [FLASH]),
    (STEP2, "mean iteration | 6.790", "iteration", [FLASH_LORA]),
    (STEP2, "peak memory after the critic's | 19.1", "memory", [FLASH_LORA]),
    (STEP2, "peak memory after the student's | 19.1", "memory", [FLASH_LORA]),
    (STEP2, "peak memory, of the rank with most | 19.1", "memory", [FLASH_LORA]),
    (REBUILD, "mean iteration | 7.377", "iteration", [H200]),
    (REBUILD, "mean iteration | 7.381", "iteration", [H200]),
    (REBUILD, "mean iteration | 7.398", "iteration", [H200]),
    (REBUILD, "peak memory, of the rank with most | 69.5", "memory", [H200]),
    *((REBUILD, f"denoising, 4 steps | {seconds}", "denoising", [H200]) for seconds in (3.443, 3.444, 3.442)),
    *((REBUILD, f"prompt + picture -> mp4 | {seconds}", "video", [H200]) for seconds in (6.78, 6.95)),
    *((REBUILD, f"encode from end to end, tf32, batch 8 | {rate}", "encode", [H200]) for rate in (67.3, "66.0", 72.7)),
    (REBUILD, "encode from end to end, tf32, batch 8 | 72.4", "encode", [H200]),
    *((SAMPLE1, f"denoising, 4 steps | {seconds}", "denoising", [H100]) for seconds in ("3.504", "3.479", "3.500")),
    *((SAMPLE1, f"prompt + picture -> mp4 | {seconds}", "video", [H100]) for seconds in (7.16, 6.97)),
    (SAMPLE2, "denoising, 4 steps | 3.495", "denoising", [H200]),
    (SAMPLE2, "denoising, 4 steps | 3.121", "denoising", [FLASH]),
    (SAMPLE2, "prompt + picture -> mp4 | 6.90", "video", [H200]),
    (SAMPLE2, "prompt + picture -> mp4 | 6.44", "video", [FLASH]),
    (TOGETHER2, "denoising, 4 steps | 1.957", "denoising", [Setup("h100", gpus=2)]),
    (TOGETHER2, "prompt + picture -> mp4 | **5.42", "video", [Setup("h100", gpus=2)]),
    (TOGETHER4, "4 GPUs, denoising, 4 steps | 0.872", "denoising", [FOUR[0]]),
    (TOGETHER4, "4 GPUs, prompt + picture -> mp4 | 4.20", "video", [FOUR[0]]),
    (TOGETHER4, "one GPU, denoising, 4 steps | 3.122", "denoising", [FLASH]),
    (TOGETHER4, "one GPU, prompt + picture -> mp4 | 6.43", "video", [FLASH]),
    (STEP3, "rollout reuse, mean iteration | 5.858", "iteration", [Setup("h200", changes=REUSE)]),
    (STEP3, "rollout reuse, peak memory, of the rank with most | 69.8", "memory", [Setup("h200", changes=REUSE)]),
    *((SAMPLE3, f"denoising, 4 steps | {seconds}", "denoising", [H200]) for seconds in (3.397, 3.398)),
    (SAMPLE3, "prompt + picture -> mp4 | 6.83", "video", [H200]),
    (PAIR, "2 GPUs, prompt + picture -> mp4 | 4.09", "video", [Setup("h200", gpus=2, decode_gpus=2)]),
    *((PAIR, f"denoising, 4 steps | {seconds}", "denoising", [Setup("h200", gpus=2)]) for seconds in (1.937, 1.934)),
    *((PAIR, f"denoising, 4 steps | {seconds}", "denoising", [H200]) for seconds in (3.516, 3.519)),
    (PAIR, "prompt + picture -> mp4 | 7.07", "video", [H200]),
    (ENCODE1, "encode from end to end, tf32, batch 8 | 64.5", "encode", [H100]),
    *(
        (f"encode_ranks-{of}x-nvidia-h200-2026-11-29", f"on {n} GPU(s) | {rate}", "encode", [Setup("h200", gpus=n)])
        for of, n, rate in ((2, 1, 62.8), (2, 2, 122.4), (4, 1, 63.8), (4, 4, "237.0"))
    ),
    *(
        ("encode_ray-4x-nvidia-h200-2026-11-29", f"ray, {n} GPU(s) | {rate}", "encode", [Setup("h200", gpus=n)])
        for n, rate in ((1, 67.7), (2, "138.0"), (4, 271.6))
    ),
]  # fmt: skip
NOT_PREDICTED = {
    (STEP1, "peak memory | 60.2"): "an older state: attention to the text was kept, the student's state in host memory",
    (STEP1, "peak memory | 24.6"): "an older state: FSDP2 held the base, blocks were computed again whole",
    (SAMPLE1, "prompt + picture -> mp4, median of 5 | 8.66"): "an older state: the decoder of 4.9 s",
    (ENCODE1, "encode from end to end, tf32, batch 8 | 50.9"): "an older state: without the one-pass norms",
    (STEP3, "rollout reuse, mean iteration | 5.521"): "scores in 8 bits, which were taken out again",
    (PAIR, "2 GPUs, prompt + picture -> mp4 | 2.60"): "a tiny decoder",
    **{(SAMPLE3, f"decoder, prompt + picture -> mp4 | {seconds}"): "a tiny decoder" for seconds in (3.96, 3.57, 2.24)},
    **{(SAMPLE3, f"denoising, 4 steps | {seconds}"): "products in 8 bits" for seconds in (2.861, "2.860")},
    (SAMPLE3, "fp8, prompt + picture -> mp4 | 6.31"): "products in 8 bits",
}
# labels of the lines that must be in one of the two tables
LABELS = re.compile(
    r"(?<!phases of a )mean iteration|peak memory|denoising, 4 steps|prompt \+ picture -> mp4"
    r"|encode from end to end|encode on \d GPU|encode --engine ray, \d GPU\(s\)$"
)


def figure_lines() -> Iterator[tuple[str, str]]:
    """File and line of every row with such a figure; the nano model's runs have none."""
    for path in sorted(RESULTS.glob("*.md")):
        for line in path.read_text().splitlines():
            if line.startswith("| ") and LABELS.search(line.split(" | ")[0].removeprefix("| ")):
                yield path.stem, line.removeprefix("| ")


def figures(line: str, count: int) -> list[float]:
    """The first number of each of the first cells after the label."""
    cells = line.strip(" |").split(" | ")[1 : count + 1]
    return [float(re.search(r"[\d.]+", cell)[0]) for cell in cells]


@pytest.mark.parametrize(("file", "start", "quantity", "setups"), ROWS, ids=lambda value: str(value)[:60])
def test_a_measured_row_is_predicted(file: str, start: str, quantity: str, setups: list[Setup]) -> None:
    lines = [line for name, line in figure_lines() if name == file and start in line]
    assert lines
    for measured, setup in zip(figures(lines[0], len(setups)), setups, strict=True):
        assert setup.predict(quantity) == pytest.approx(measured, rel=LIMITS[quantity]), setup


def test_every_row_is_predicted_or_listed_with_a_reason() -> None:
    known = [(file, start) for file, start, *_ in ROWS] + list(NOT_PREDICTED)
    for file, line in figure_lines():
        assert sum(name == file and start in line for name, start in known) == 1, (file, line)


def test_a_checkpoint_has_the_measured_size() -> None:
    """65.5 GiB in all runs of the compact form, in benchmarks/results/modes-* and train_step-*."""
    config = DistillConfig(("d",), "m", "o", global_batch=1)
    assert estimate_memory(config, SIZE, world=1, form="compact").checkpoint / 2**30 == pytest.approx(65.5, abs=0.05)


def test_encoding_has_the_measured_memory() -> None:
    """17.0 GiB at batches of 8 in TF32, in benchmarks/results/rebuild-* and encode-h100-*."""
    spec = DistillConfig(("d",), "m", "o").spec
    assert encode_gib(spec, batch_size=8, vae_dtype="tf32") == pytest.approx(17.0, rel=0.02)
