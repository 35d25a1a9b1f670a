"""Training loops of tiny models: one CUDA graph per iteration (they are launch-bound), a time budget, a schedule."""

import math
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

PEAK_AT, SYNC_EVERY = 0.03, 50  # warm-up share of the budget; iterations between readings of the clock


def optimizer(parameters: Iterable[torch.nn.Parameter], device: torch.device, *, beta2: float) -> torch.optim.AdamW:
    """Return AdamW whose learning rate is a tensor, so that a captured graph follows the schedule."""
    cuda = device.type == "cuda"
    rate = torch.zeros((), device=device)
    return torch.optim.AdamW(
        parameters, lr=rate, betas=(0.9, beta2), weight_decay=0.01, capturable=cuda, fused=cuda or None
    )


def captured(step: Callable[[], Tensor], generator: torch.Generator) -> Callable[[], None]:
    """Return `step` as one CUDA graph whose random numbers come from `generator`; on the CPU, `step` itself."""
    if generator.device.type != "cuda":
        return lambda: (step(), None)[1]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def schedule(progress: float, peak: float) -> float:
    """Return the learning rate at a share of the budget: linear warm-up, then a cosine to a hundredth of the peak."""
    if progress < PEAK_AT:
        return peak * max(progress / PEAK_AT, 1e-3)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (progress - PEAK_AT) / (1 - PEAK_AT))))


def train(
    step: Callable[[], None], rate: Tensor, peak: float, *, seconds: float, limit: int, report: Callable[[int], None]
) -> int:
    """Repeat `step` for `seconds` or `limit` iterations with `rate` on the schedule; returns the iterations."""
    start = time.monotonic()
    done, progress = 0, 0.0
    while progress < 1:
        rate.fill_(schedule(progress, peak))
        step()
        done += 1
        if done % SYNC_EVERY == 0 and rate.is_cuda:
            torch.cuda.synchronize()
        if done % 500 == 0:
            report(done)
        progress = max((time.monotonic() - start) / seconds, done / limit)
    return done
