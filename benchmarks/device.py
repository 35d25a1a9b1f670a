"""Networks for benchmarks, at the true size or tiny: random weights and inputs, communication, kernels by time."""

import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.runner import Row, sync, time_call
from common.video import LATENT_CHANNELS, VideoSpec
from stage2_distill.model.layers import ExecutionPlan
from stage2_distill.model.transformer import WanTransformer, convert_transformer
from stage2_distill.model.wan import cast_parameters

TRUE = {"num_layers": 30, "num_attention_heads": 24, "attention_head_dim": 128, "ffn_dim": 14336, "text_dim": 4096}
TINY = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 48, "text_dim": 16}
COMMUNICATION = ("nccl", "gloo", "c10d")  # in the names of kernels
Span = tuple[float, float]  # microseconds


@dataclass(frozen=True)
class Case:
    """Video size, device, dtype and network of a benchmark."""

    spec: VideoSpec
    device: torch.device
    dtype: torch.dtype
    network: dict[str, int]  # fields of the transformer's configuration

    @property
    def tiny(self) -> bool:
        """Whether the case only tries the code, so that its times mean nothing."""
        return self.network["num_layers"] < 30

    @property
    def tokens(self) -> int:
        """Tokens of one video."""
        _, frames, height, width = self.spec.latent_shape
        return frames * height * width // 4

    @property
    def tensor_options(self) -> dict[str, object]:
        """Device and dtype, as torch's constructors take them."""
        return {"device": self.device, "dtype": self.dtype}


def make_case(tiny: bool, *, half: bool = False) -> Case:
    """Return the true size in bf16 on this process's GPU, or a tiny one in float32 (bf16 if `half`) on the CPU."""
    if tiny:
        return Case(VideoSpec(9, 64, 64), torch.device("cpu"), torch.bfloat16 if half else torch.float32, TINY)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return Case(VideoSpec(), device, torch.bfloat16, TRUE)


def build_network(sizes: dict[str, int]) -> WanTransformer3DModel:
    """Build diffusers' transformer on the default device in the default dtype."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", **sizes,
    )  # fmt: skip


def random_network(case: Case) -> WanTransformer3DModel:
    """Return a transformer of random weights on the case's device, in its dtype; the rope tables are float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(case.dtype)
    try:
        with case.device:
            net = build_network(case.network)
    finally:
        torch.set_default_dtype(before)
    assert net.rope.freqs_cos.dtype == torch.float32
    randomize_weights(net.named_parameters(), case.device)
    return net


def meta_network(case: Case, plan: ExecutionPlan, dtype: torch.dtype) -> WanTransformer:
    """Return our transformer in `dtype` on the meta device."""
    with torch.device("meta"):
        net = build_network(case.network)
    return cast_parameters(convert_transformer(net, plan), dtype).eval()


@torch.no_grad()
def randomize_weights(weights: Iterable[tuple[str, Tensor]], device: torch.device) -> None:
    """Set matrices to N(0, 0.02), norms to 1 and biases to 0.

    Small norms would make attention uniform. Products of equal numbers take less power, so a GPU at its power limit
    would be several percent faster than with a real model.
    """
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in weights:
        if weight.dim() > 1:
            weight.normal_(0, 0.02, generator=generator)
        else:
            weight.fill_(float("norm" in name and name.endswith("weight")))


def inputs(case: Case, batch: int = 1) -> dict[str, Tensor]:
    """Return latents, times of the two kinds of frames (B 2) and text, by the names of the network's arguments."""
    generator = torch.Generator(case.device).manual_seed(1)
    options = case.tensor_options | {"generator": generator}
    text = torch.randn(batch, 512, case.network["text_dim"], **options)
    return {
        "hidden_states": torch.randn(batch, *case.spec.latent_shape, **options),
        "timestep": torch.tensor([[0.0, 833.0]] * batch, device=case.device),
        "encoder_hidden_states": text,
    }


def per_token_times(arguments: dict[str, Tensor], case: Case) -> dict[str, Tensor]:
    """Return the same arguments with times (B N), one per token, as diffusers takes them."""
    times = arguments["timestep"][:, 1:].repeat(1, case.tokens)
    times[:, : case.tokens // case.spec.latent_shape[1]] = arguments["timestep"][:, :1]
    return arguments | {"timestep": times}


def matmul_tflops(case: Case) -> float:
    """Measure the TFLOP/s of a large matrix product."""
    size = 64 if case.tiny else 8192
    a, b = (torch.randn(size, size, **case.tensor_options) for _ in range(2))
    return 2 * size**3 / time_call(lambda: a @ b, warm=3, repeats=20) / 1e12


def kernel_table(call: Callable[[], object], case: Case, count: int = 25) -> str:
    """Return a table of the device's kernels by time in one call."""
    activity = ProfilerActivity.CUDA if case.device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=list({activity, ProfilerActivity.CPU})) as profiler:
        call()
        sync()
    key = "self_device_time_total" if case.device.type == "cuda" else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=key, row_limit=count, max_name_column_width=90)


def merge_spans(spans: Iterable[Span]) -> list[Span]:
    """Return the same time as sorted spans that do not overlap."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def covered_time(spans: Iterable[Span]) -> float:
    """Return the time that lies in any of the spans."""
    return sum(end - start for start, end in merge_spans(spans))


def communication_rows(run: Callable[[], object], case: Case, name: str) -> list[Row]:
    """Profile one update on this rank: communication in all, the part that no arithmetic hides, and by kernel."""
    cuda = case.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        run()
        sync()
    talk, work, kernels = list[Span](), list[Span](), Counter[str]()
    for event in profiler.events():
        if cuda and event.device_type != DeviceType.CUDA:
            continue
        span = event.time_range.start, event.time_range.end
        if any(word in event.name.lower() for word in COMMUNICATION):
            talk.append(span)
            kernels[event.name.split("(")[0][-60:]] += span[1] - span[0]
        else:
            work.append(span)
    total = max(end for _, end in talk + work) - min(start for start, _ in talk + work)
    work_time, busy_time = covered_time(work), covered_time(talk + work)
    seconds = ", ".join(f"{kernel} {spent / 1e6:.3f} s" for kernel, spent in kernels.most_common(4))
    return [
        (f"{name}, communication", f"{covered_time(talk) / 1e6:.3f} s of {total / 1e6:.2f} s ({seconds})"),
        (f"{name}, communication beside no arithmetic", f"{(busy_time - work_time) / total:.2%}"),
        (f"{name}, GPU idle", f"{1 - busy_time / total:.2%}"),
    ]
