"""One network, forward and backward: diffusers' against ours, by attention kernel and by activation checkpointing.

    python -m benchmarks.network [--tiny] [--only forward,backward,parts,attentions,texts,profile] [--out FOLDER]

Ratios are to diffusers compiled, with cuDNN attention, in the same run.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.attention.flex_attention as flex
from diffusers import WanTransformer3DModel
from torch import Tensor

from benchmarks.device import Case, inputs, kernel_table, make_case, per_token_times, random_network
from benchmarks.runner import Row, parse_arguments, peak_gib, run_benchmark, time_call
from stage2_distill.model.attention import dot_product_attention, enable_determinism, uses_flash_3
from stage2_distill.model.layers import ExecutionPlan
from stage2_distill.model.transformer import convert_transformer

Run = Callable[[], object]
FLEX = torch.compile(flex.flex_attention, dynamic=False)


def flex_attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute FlexAttention on (B N H d)."""
    out = FLEX(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).flatten(2)


def forward_of(net: WanTransformer3DModel, arguments: dict[str, Tensor]) -> Run:
    """Return a function that runs one forward pass without gradient."""

    def run() -> None:
        with torch.no_grad():
            net(**arguments, return_dict=False)

    return run


def backward_of(net: WanTransformer3DModel, arguments: dict[str, Tensor]) -> Run:
    """Return a function that runs one forward and backward pass."""

    def run() -> None:
        net.zero_grad(set_to_none=True)
        net(**arguments, return_dict=False)[0].float().square().mean().backward()

    return run


def diffusers_network(case: Case, *, compiled: bool) -> WanTransformer3DModel:
    """Return diffusers' transformer with checkpointing per block and, on the GPU, cuDNN attention."""
    net = random_network(case)
    net.enable_gradient_checkpointing()
    if case.device.type == "cuda":
        net.set_attention_backend("_native_cudnn")
    if compiled:
        net.compile_repeated_blocks(fullgraph=True)
    return net


def time_network(name: str, run: Run, base: float | None = None) -> tuple[Row, float]:
    """Time a network: first call, median of 5, ratio to `base`, peak memory; returns the row and the median."""
    peak_gib()
    first = time_call(run, warm=0, repeats=1)
    steady = time_call(run, warm=1, repeats=5)
    ratio = f", x{base / steady:.3f}" if base else ""
    return (name, f"{steady:.4f} s{ratio}, first {first:.1f} s, {peak_gib():.1f} GiB"), steady


def compare_networks(
    case: Case, make: Callable[..., Run], plans: dict[str, ExecutionPlan], *, eager: bool
) -> Iterator[Row]:
    """Time diffusers eager (if asked) and compiled, then our plans."""
    arguments = inputs(case)
    diffusers_arguments = per_token_times(arguments, case)
    if eager:
        yield time_network("diffusers eager", make(diffusers_network(case, compiled=False), diffusers_arguments))[0]
    compiled = diffusers_network(case, compiled=not case.tiny)
    row, base = time_network("diffusers compiled", make(compiled, diffusers_arguments))
    yield row
    net = random_network(case)
    for name, plan in plans.items():
        yield time_network(name, make(convert_transformer(net, plan), arguments), base)[0]


def plans_by_kernel(name: str, plan: ExecutionPlan) -> dict[str, ExecutionPlan]:
    """Return a plan and, if `auto` is FlashAttention-3, the same on cuDNN."""
    return {name: plan} | ({f"{name}, cudnn": replace(plan, kernel="cudnn")} if uses_flash_3() else {})


def forward_rows(case: Case) -> Iterator[Row]:
    """Time forward passes."""
    plans = plans_by_kernel("ours", ExecutionPlan(compiled=not case.tiny))
    yield from compare_networks(case, forward_of, plans, eager=True)


def backward_rows(case: Case) -> Iterator[Row]:
    """Time forward and backward passes with checkpointing, at last with deterministic kernels as in training."""
    plan = ExecutionPlan(checkpointing="selective", compiled=not case.tiny)
    yield from compare_networks(case, backward_of, plans_by_kernel("ours, keep attention", plan), eager=False)
    with deterministic(plan.kernel, case):
        run = backward_of(convert_transformer(random_network(case), plan), inputs(case))
        yield time_network("ours, keep attention, in order", run)[0]


@contextmanager
def deterministic(kernel: str, case: Case) -> Iterator[str]:
    """Enable deterministic kernels inside the context."""
    enable_determinism(kernel, case.dtype, case.device)
    try:
        yield kernel
    finally:
        torch.use_deterministic_algorithms(False)


def product_rows(case: Case) -> Iterator[Row]:
    """Time each matrix product of a block alone."""
    width, hidden = case.network["num_attention_heads"] * case.network["attention_head_dim"], case.network["ffn_dim"]
    layers = ((width, width), (width, hidden), (hidden, width))
    for rows, a, b in ((8192, 8192, 8192), *((case.tokens, *layer) for layer in layers)):
        if not case.tiny or rows < 8192:
            x, weight, bias = (torch.randn(*shape, **case.tensor_options) for shape in ((rows, a), (b, a), (b,)))
            run = partial(torch.nn.functional.linear, x, weight, bias)
            yield f"product {rows}x{a}x{b}", time_flops(run, 2 * rows * a * b)


def attention_rows(case: Case) -> Iterator[Row]:
    """Time the attention kernels alone, and test whether a backward pass gives the same bits twice."""
    heads, size = case.network["num_attention_heads"], case.network["attention_head_dim"]
    flop = 2 * case.tokens**2 * heads * size
    for kernel in ("cudnn", "flash", "efficient", "flex") if case.device.type == "cuda" else ("torch", "math"):
        name = "attention flash 3" if kernel == "flash" and uses_flash_3() else f"attention {kernel}"
        yield name, time_flops(random_attention(kernel, case, grad=False), 2 * flop)
        run = random_attention(kernel, case, grad=True)
        for context in (nullcontext(), deterministic(kernel, case)):
            with context as ordered:
                same = all(map(torch.equal, run(), run()))
                value = f"{time_flops(run, 7 * flop)}, {'the same' if same else 'other'} bits twice"
                yield f"{name} with backward{', in order' * bool(ordered)}", value


def text_attention_rows(case: Case) -> Iterator[Row]:
    """Time attention to a text of 512 rows, by kernel."""
    width = case.network["num_attention_heads"] * case.network["attention_head_dim"]
    for kernel in ("cudnn", "flash", "efficient") if case.device.type == "cuda" else ("torch", "math"):
        for grad, cost in ((False, 4), (True, 14)):
            run = random_attention(kernel, case, grad=grad, keys=512)
            name = f"attention to text, {kernel}{' with backward' * grad}"
            yield name, time_flops(run, cost * case.tokens * 512 * width)


def random_attention(
    kernel: str, case: Case, *, grad: bool, keys: int | None = None
) -> Callable[[], tuple[Tensor, ...]]:
    """Return a function that computes attention on random inputs, and the gradients if asked."""
    heads, size = case.network["num_attention_heads"], case.network["attention_head_dim"]
    counts = case.tokens, keys or case.tokens, keys or case.tokens
    q, k, v = (torch.randn(1, count, heads, size, **case.tensor_options, requires_grad=grad) for count in counts)
    call = flex_attend if kernel == "flex" else partial(dot_product_attention, kernel=kernel)

    def run() -> tuple[Tensor, ...]:
        out = call(q, k, v)
        return torch.autograd.grad(out, (q, k, v), out) if grad else ()

    return run


def time_flops(run: Run, flop: int) -> str:
    """Return time and TFLOP/s as text."""
    seconds = min(time_call(run, warm=2, repeats=10) for _ in range(2))
    return f"{1000 * seconds:.2f} ms, {flop / seconds / 1e12:.0f} TFLOP/s"


def write_profiles(case: Case, out: Path) -> Iterator[Row]:
    """Write the kernels by time of our compiled forward, and forward and backward, as text files."""
    plan = ExecutionPlan(checkpointing="selective", compiled=not case.tiny)
    net, arguments = convert_transformer(random_network(case), plan), inputs(case)
    for name, run in (("forward", forward_of(net, arguments)), ("backward", backward_of(net, arguments))):
        run()
        run()
        (out / f"{name}.txt").write_text(kernel_table(run, case))
        yield f"kernels of {name}", str(out / f"{name}.txt")


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Measure the sections of the command line."""
    case = make_case(options.tiny)
    sections = {
        "parts": product_rows, "attentions": attention_rows, "texts": text_attention_rows,
        "forward": forward_rows, "backward": backward_rows, "profile": partial(write_profiles, out=options.out),
    }  # fmt: skip
    for name in options.only.split(","):
        yield from sections[name](case)


def main() -> None:
    """Measure and print."""
    sections = "parts,attentions,texts,forward,backward,profile"
    run_benchmark("network", measure(parse_arguments(__doc__, tiny=False, only=sections, out=Path())), keep=False)


if __name__ == "__main__":
    main()
