"""One network, forward and backward: diffusers' against ours, by attention kernel and by what is kept.

    python -m benchmarks.network [--tiny] [--only forward,backward,parts,profile] [--out FOLDER]

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

from benchmarks.device import Case, a_time_a_token, case, inputs, kernels, peak_gib, random_network, seconds
from stage2_distill.model.attention import dot_product_attention, enable_determinism, uses_flash_3
from stage2_distill.model.layers import ExecutionPlan
from stage2_distill.model.transformer import convert_transformer

Row = tuple[str, str]
Run = Callable[[], object]
FLEX = torch.compile(flex.flex_attention, dynamic=False)


def flex_attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """FlexAttention on (B N H d)."""
    out = FLEX(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).flatten(2)


def forward_of(net: WanTransformer3DModel, given: dict[str, Tensor]) -> Run:
    """One forward pass without gradient."""

    def run() -> None:
        with torch.no_grad():
            net(**given, return_dict=False)

    return run


def backward_of(net: WanTransformer3DModel, given: dict[str, Tensor]) -> Run:
    """One forward and backward pass."""

    def run() -> None:
        net.zero_grad(set_to_none=True)
        net(**given, return_dict=False)[0].float().square().mean().backward()

    return run


def theirs(chosen: Case, *, compiled: bool) -> WanTransformer3DModel:
    """Diffusers' transformer with per-block checkpointing and, on the GPU, cuDNN attention."""
    net = random_network(chosen)
    net.enable_gradient_checkpointing()
    if chosen.device.type == "cuda":
        net.set_attention_backend("_native_cudnn")
    if compiled:
        net.compile_repeated_blocks(fullgraph=True)
    return net


def line(name: str, run: Run, chosen: Case, base: float | None = None) -> tuple[Row, float]:
    """One row: first call, median of 5, ratio to `base`, peak memory."""
    peak_gib(chosen)
    first = seconds(run, chosen, warm=0, repeat=1)
    steady = seconds(run, chosen, warm=1, repeat=5)
    ratio = f", x{base / steady:.3f}" if base else ""
    row = (name, f"{steady:.4f} s{ratio}, first {first:.1f} s, {peak_gib(chosen):.1f} GiB")
    print(*row, sep=": ", flush=True)
    return row, steady


def compare(chosen: Case, make: Callable[..., Run], plans: dict[str, ExecutionPlan], *, eager: bool) -> Iterator[Row]:
    """Diffusers eager (if asked) and compiled, then our plans."""
    given = inputs(chosen)
    wide = a_time_a_token(given, chosen)
    if eager:
        yield line("diffusers eager", make(theirs(chosen, compiled=False), wide), chosen)[0]
    row, base = line("diffusers compiled", make(theirs(chosen, compiled=not chosen.tiny), wide), chosen)
    yield row
    net = random_network(chosen)
    for name, plan in plans.items():
        yield line(name, make(convert_transformer(net, plan), given), chosen, base)[0]


def by_kernel(name: str, plan: ExecutionPlan) -> dict[str, ExecutionPlan]:
    """A plan, and where `auto` is FlashAttention-3, the same on cuDNN."""
    return {name: plan} | ({f"{name}, cudnn": replace(plan, kernel="cudnn")} if uses_flash_3() else {})


def forward(chosen: Case) -> Iterator[Row]:
    """Forward passes."""
    yield from compare(chosen, forward_of, by_kernel("ours", ExecutionPlan(compiled=not chosen.tiny)), eager=True)


def backward(chosen: Case) -> Iterator[Row]:
    """Forward and backward passes with checkpointing; then as in training, where sums have an order."""
    plan = ExecutionPlan(checkpointing="selective", compiled=not chosen.tiny)
    yield from compare(chosen, backward_of, by_kernel("ours, keep attention", plan), eager=False)
    with in_order(plan.kernel, chosen):
        run = backward_of(convert_transformer(random_network(chosen), plan), inputs(chosen))
        yield line("ours, keep attention, in order", run, chosen)[0]


@contextmanager
def in_order(kernel: str, chosen: Case) -> Iterator[str]:
    """`repeatable`, for a while; the kernel."""
    enable_determinism(kernel, chosen.dtype, chosen.device)
    try:
        yield kernel
    finally:
        torch.use_deterministic_algorithms(False)


def parts(chosen: Case) -> Iterator[Row]:
    """Rates of the matrix products of a block, alone."""
    heads, size = chosen.network["num_attention_heads"], chosen.network["attention_head_dim"]
    width, wide = heads * size, chosen.network["ffn_dim"]
    where = {"device": chosen.device, "dtype": chosen.dtype}
    tokens = inputs(chosen)["hidden_states"][0, 0].numel() // 4
    for rows, a, b in ((8192, 8192, 8192), (tokens, width, width), (tokens, width, wide), (tokens, wide, width)):
        if not chosen.tiny or rows < 8192:
            yield rate(f"product {rows}x{a}x{b}", product(rows, a, b, where), 2 * rows * a * b, chosen)


def attentions(chosen: Case) -> Iterator[Row]:
    """Rates of the attention kernels alone, and whether a backward pass gives the same bits twice."""
    heads, size = chosen.network["num_attention_heads"], chosen.network["attention_head_dim"]
    where = {"device": chosen.device, "dtype": chosen.dtype}
    tokens = inputs(chosen)["hidden_states"][0, 0].numel() // 4
    shape, flop = (1, heads, tokens, size), 2 * tokens**2 * heads * size
    for kernel in ("cudnn", "flash", "efficient", "flex") if chosen.device.type == "cuda" else ("torch", "math"):
        name = "attention flash 3" if kernel == "flash" and uses_flash_3() else f"attention {kernel}"
        yield rate(name, attention_of(kernel, shape, where, False), 2 * flop, chosen)
        run = attention_of(kernel, shape, where, True)
        for order in (nullcontext(), in_order(kernel, chosen)):
            with order as ordered:
                same = all(map(torch.equal, run(), run()))
                found = f"{name} with backward{', in order' * bool(ordered)}"
                what, told = rate(found, run, 7 * flop, chosen)
                yield what, f"{told}, {'the same' if same else 'other'} bits twice"


def texts(chosen: Case) -> Iterator[Row]:
    """Attention to a text of 512 rows, by kernel."""
    heads, size = chosen.network["num_attention_heads"], chosen.network["attention_head_dim"]
    where = {"device": chosen.device, "dtype": chosen.dtype}
    tokens = inputs(chosen)["hidden_states"][0, 0].numel() // 4
    names = ("cudnn", "flash", "efficient") if chosen.device.type == "cuda" else ("torch", "math")
    for kernel in names:
        for grad, cost in ((False, 4), (True, 14)):
            run = attention_of(kernel, (1, heads, tokens, size), where, grad, keys=512)
            name = f"attention to text, {kernel}{' with backward' * grad}"
            yield rate(name, run, cost * tokens * 512 * heads * size, chosen)


def product(rows: int, a: int, b: int, where: dict[str, object]) -> Run:
    """A linear layer on random inputs."""
    x, w, bias = torch.randn(rows, a, **where), torch.randn(b, a, **where), torch.randn(b, **where)
    return lambda: torch.nn.functional.linear(x, w, bias)


def attention_of(
    kernel: str, shape: tuple[int, ...], where: dict[str, object], grad: bool, *, keys: int | None = None
) -> Callable[[], tuple[Tensor, ...]]:
    """Attention on random inputs, with its backward if asked."""
    batch, heads, tokens, size = shape
    counts = tokens, keys or tokens, keys or tokens
    q, k, v = (torch.randn(batch, count, heads, size, **where, requires_grad=grad) for count in counts)

    call = flex_attend if kernel == "flex" else partial(dot_product_attention, kernel=kernel)

    def run() -> tuple[Tensor, ...]:
        out = call(q, k, v)
        return torch.autograd.grad(out, (q, k, v), out) if grad else ()

    return run


def rate(name: str, run: Run, flop: int, chosen: Case) -> Row:
    """One row: time and TFLOP/s."""
    found = min(seconds(run, chosen, warm=2, repeat=10) for _ in range(2))
    row = (name, f"{1000 * found:.2f} ms, {flop / found / 1e12:.0f} TFLOP/s")
    print(*row, sep=": ", flush=True)
    return row


def write_profiles(chosen: Case, out: Path) -> Iterator[Row]:
    """Kernels by time of our compiled forward and forward + backward, as text files."""
    net, given = (
        convert_transformer(random_network(chosen), ExecutionPlan(checkpointing="selective", compiled=not chosen.tiny)),
        inputs(chosen),
    )
    for name, run in (("forward", forward_of(net, given)), ("backward", backward_of(net, given))):
        run()
        run()
        table = kernels(run, chosen)
        (out / f"{name}.txt").write_text(table)
        yield f"kernels of {name}", str(out / f"{name}.txt")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", default="parts,attentions,texts,forward,backward,profile")
    parser.add_argument("--out", type=Path, default=Path())
    given = parser.parse_args()
    chosen = case(given.tiny)
    sections = {"parts": parts, "attentions": attentions, "texts": texts, "forward": forward, "backward": backward}
    rows: list[Row] = []
    for name in given.only.split(","):
        found = write_profiles(chosen, given.out) if name == "profile" else sections[name](chosen)
        rows += found
    print("\n".join(f"| {name} | {value} |" for name, value in rows))


if __name__ == "__main__":
    main()
