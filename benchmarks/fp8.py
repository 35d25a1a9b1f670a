"""Products in 8 bits against bf16 in one run: seconds of a video's denoising, error of latents per step, DMD gradient.

    python -m benchmarks.fp8 [--tiny] [--repeats 5] [--only quantize,denoise,gradient]

Random weights at the true size, blocks compiled; --tiny is a small network on the CPU. The gradient is that of two
random networks of equal weights but 2 % of noise, at guidance 7. Kernels run once as in `sample
--compile` and once alone.
"""

import argparse
import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from benchmarks.device import Case, make_case, meta_network, randomize_weights
from benchmarks.runner import Row, parse_arguments, peak_text, run_benchmark, time_call
from benchmarks.trainer import random_condition
from common.flow import timestep_sigmas
from stage2_distill.dmd.losses import compare_scores, normalized_direction
from stage2_distill.dmd.rollout import draw_start_noise, trajectory
from stage2_distill.low_precision.fp8_linear import store_in_fp8
from stage2_distill.low_precision.quantized_rows import multiply_rows, quantize_gelu, quantize_rows
from stage2_distill.model.layers import ExecutionPlan
from stage2_distill.model.transformer import WanTransformer
from stage2_distill.model.wan import guided, make_denoiser, materialize_transformer

SIGMAS = timestep_sigmas((1000, 750, 500, 250), s=5.0)
SMALL = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64, "text_dim": 16}
NOISE = 0.02  # of the critic's weights, relative to each tensor's deviation


def random_transformer(case: Case) -> WanTransformer:
    """Return our transformer of random weights; always the same."""
    net = materialize_transformer(meta_network(case, ExecutionPlan(compiled=not case.tiny), case.dtype), case.device)
    randomize_weights(net.requires_grad_(False).named_parameters(), case.device)
    return net


def quantize_rows_table(case: Case, repeats: int) -> Iterator[Row]:
    """Time the rounding of inputs, by the kernel and compiled, and the products of a block's layers."""
    width = case.network["num_attention_heads"] * case.network["attention_head_dim"]
    wide = case.network["ffn_dim"]
    compiled = quantize_rows if case.tiny else torch.compile(quantize_rows, dynamic=False)
    for inputs in (width, wide):
        x = torch.randn(case.tokens, inputs, **case.tensor_options)
        for name, work in (("one kernel", quantize_rows), ("compiled", compiled), ("gelu, one kernel", quantize_gelu)):
            seconds = time_call(lambda x=x, work=work: work(x), warm=3, repeats=10 * repeats)
            yield f"rounding {case.tokens} x {inputs}, {name}", f"{1000 * seconds:.3f} ms"
    for inputs, outputs in ((width, width), (width, wide), (wide, width)):
        x, weight = (torch.randn(rows, inputs, **case.tensor_options) for rows in (case.tokens, outputs))
        bias = torch.randn(outputs, **case.tensor_options)
        exact = time_call(lambda x=x, w=weight, b=bias: nn.functional.linear(x, w, b), warm=3, repeats=10 * repeats)
        rows, columns = quantize_rows(x), quantize_rows(weight)
        fp8 = time_call(lambda r=rows, c=columns, b=bias: multiply_rows(r, c, b), warm=3, repeats=10 * repeats)
        figure = f"{1000 * exact:.3f} ms in bf16, {1000 * fp8:.3f} in fp8 (x{exact / fp8:.2f})"
        yield f"product {inputs} to {outputs}", figure


def sample_steps(case: Case, net: nn.Module) -> list[Tensor]:
    """Return x0 of each step, from the same noise and condition."""
    torch.manual_seed(0)
    noise, generators = draw_start_noise([(0, 0, 0)], "fp8", case.spec.latent_shape, case.device)
    denoiser = make_denoiser(net, case.dtype)
    return list(trajectory(denoiser, noise, random_condition(case), sigmas=SIGMAS, generators=generators))


def denoise_rows(case: Case, repeats: int) -> Iterator[Row]:
    """Time four steps in bf16 and in 8 bits, and compare the latents of each step."""
    net = random_transformer(case)
    exact = sample_steps(case, net)
    seconds = time_call(lambda: sample_steps(case, net), repeats=repeats)
    yield "denoising, bf16", f"{seconds:.3f} s, {peak_text()}"
    store_in_fp8(net)
    rounded = sample_steps(case, net)
    faster = time_call(lambda: sample_steps(case, net), repeats=repeats)
    yield "denoising, fp8", f"{faster:.3f} s (x{seconds / faster:.2f}), {peak_text()}"
    errors = [float((a - b).norm() / a.norm()) for a, b in zip(exact, rounded, strict=True)]
    yield "relative L2 of x0 after each step", ", ".join(f"{error:.2%}" for error in errors)


def gradient_rows(case: Case, _repeats: int) -> Iterator[Row]:
    """Compare the DMD gradient of exact scores with that of scores in 8 bits, at some noise levels."""
    teacher = random_transformer(case)
    critic = copy.deepcopy(teacher)
    for weight in critic.parameters():
        if weight.dim() > 1:
            weight.add_(NOISE * weight.std() * torch.randn_like(weight))
    x0, condition = sample_steps(case, teacher)[-1], random_condition(case)
    negative, eps = torch.randn_like(condition.text[0]), torch.randn_like(x0)
    directions: list[list[Tensor]] = []
    for _ in range(2):
        scorer = guided(make_denoiser(teacher, case.dtype), negative_text=negative, scale=7.0)
        follower = make_denoiser(critic, case.dtype)
        directions.append([])
        for sigma in (0.1, 0.5, 0.9):
            level = torch.tensor([sigma], device=case.device)
            scores = compare_scores(x0, condition, teacher=scorer, critic=follower, sigma=level, eps=eps)
            directions[-1].append(normalized_direction(x0, condition, scores.fake, scores.real).flatten())
        if len(directions) == 1:
            for net in (teacher, critic):
                store_in_fp8(net)
    for sigma, exact, rounded in zip((0.1, 0.5, 0.9), *directions, strict=True):
        cosine, size = cosine_similarity(exact, rounded, dim=0), rounded.norm() / exact.norm()
        yield f"DMD gradient at sigma {sigma}", f"cosine {float(cosine):.4f}, size x{float(size):.3f}"


SECTIONS = {"quantize": quantize_rows_table, "denoise": denoise_rows, "gradient": gradient_rows}


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Measure the sections of the command line."""
    case = make_case(options.tiny, half=True)
    if options.tiny:
        case = replace(case, network=SMALL)
    with torch.no_grad():
        for name in options.only.split(","):
            yield from SECTIONS[name](case, options.repeats)


def main() -> None:
    """Measure, print and append to the results."""
    options = parse_arguments(__doc__, tiny=False, repeats=5, only=",".join(SECTIONS))
    run_benchmark("fp8", measure(options), keep=not options.tiny, model="random weights")


if __name__ == "__main__":
    main()
