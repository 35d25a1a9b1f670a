"""What benchmarks of the networks share: the true size or a tiny one, a random network, timing, kernels by time."""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from common.video import VideoSpec


@dataclass(frozen=True)
class Case:
    """What is run."""

    spec: VideoSpec
    device: torch.device
    dtype: torch.dtype
    network: dict[str, int]  # fields of the transformer's configuration

    @property
    def tiny(self) -> bool:
        """Whether figures mean nothing and only the code is tried."""
        return self.network["num_layers"] < 30


TRUE = {"num_layers": 30, "num_attention_heads": 24, "attention_head_dim": 128, "ffn_dim": 14336, "text_dim": 4096}
TINY = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 48, "text_dim": 16}


def case(tiny: bool, *, half: bool = False) -> Case:
    """The true size in bf16 on this process's GPU, or a tiny one in float32 (or `half`) on the CPU."""
    if tiny:
        return Case(VideoSpec(9, 64, 64), torch.device("cpu"), torch.bfloat16 if half else torch.float32, TINY)
    place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(place)
    return Case(VideoSpec(), place, torch.bfloat16, TRUE)


def random_network(chosen: Case) -> WanTransformer3DModel:
    """A transformer of random weights, made on the device in the dtype; the rope tables are float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(chosen.dtype)
    try:
        with chosen.device:
            net = WanTransformer3DModel(
                patch_size=(1, 2, 2),
                in_channels=48,
                out_channels=48,
                cross_attn_norm=True,
                qk_norm="rms_norm_across_heads",
                **chosen.network,
            )
    finally:
        torch.set_default_dtype(before)
    assert net.rope.freqs_cos.dtype == torch.float32
    draws = torch.Generator(chosen.device).manual_seed(0)
    for name, weight in net.named_parameters():
        randomise(name, weight, draws)
    return net


@torch.no_grad()
def randomise(name: str, weight: Tensor, draws: torch.Generator) -> None:
    """Matrices N(0, 0.02), norms 1, biases 0.

    Small norms would make attention uniform: its products would meet equal numbers, and a GPU that its power limits
    would be several per cent faster than on a real model.
    """
    if weight.dim() > 1:
        weight.normal_(0, 0.02, generator=draws)
    else:
        weight.fill_(float("norm" in name and name.endswith("weight")))


def inputs(chosen: Case, batch: int = 1) -> dict[str, Tensor]:
    """Latents, times of the two kinds of frames (B 2) and text for a network's forward."""
    draws = torch.Generator(chosen.device).manual_seed(1)
    where = {"device": chosen.device, "dtype": chosen.dtype, "generator": draws}
    times = torch.tensor([[0.0, 833.0]] * batch, device=chosen.device)
    text = torch.randn(batch, 512, chosen.network["text_dim"], **where)
    return {
        "hidden_states": torch.randn(batch, *chosen.spec.latent_shape, **where),
        "timestep": times,
        "encoder_hidden_states": text,
    }


def a_time_a_token(given: dict[str, Tensor], chosen: Case) -> dict[str, Tensor]:
    """The same inputs with times (B N), as diffusers wants them."""
    frames, height, width = chosen.spec.latent_shape[1:]
    times = given["timestep"][:, 1:].repeat(1, frames * height * width // 4)
    times[:, : height * width // 4] = given["timestep"][:, :1]
    return given | {"timestep": times}


def seconds(call: Callable[[], object], chosen: Case, *, warm: int = 1, repeat: int = 3) -> float:
    """Median time of a call after `warm` others."""
    times = []
    for round_ in range(warm + repeat):
        synchronize(chosen)
        began = time.perf_counter()
        call()
        synchronize(chosen)
        times += [time.perf_counter() - began] if round_ >= warm else []
    return statistics.median(times)


def ceiling_of(chosen: Case) -> float:
    """TFLOP/s of a large matrix product."""
    size = 64 if chosen.tiny else 8192
    a, b = (torch.randn(size, size, device=chosen.device, dtype=chosen.dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, chosen, warm=3, repeat=20) / 1e12


def synchronize(chosen: Case) -> None:
    """Wait for the device."""
    if chosen.device.type == "cuda":
        torch.cuda.synchronize()


def peak_gib(chosen: Case) -> float:
    """Most memory in use since the last call of this function, in GiB; 0 on the CPU."""
    if chosen.device.type != "cuda":
        return 0.0
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak


def kernels(call: Callable[[], object], chosen: Case, count: int = 25) -> str:
    """A table of the device's kernels by time in one call."""
    activity = ProfilerActivity.CUDA if chosen.device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=list({activity, ProfilerActivity.CPU})) as found:
        call()
        synchronize(chosen)
    key = "self_device_time_total" if chosen.device.type == "cuda" else "self_cpu_time_total"
    return found.key_averages().table(sort_by=key, row_limit=count, max_name_column_width=90)
