"""The decoder for speed gives what diffusers' decode gives, in steps of any size, and one video never hears another."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from torch.nn import functional

from stage1_encode.models import vae, vae_ops
from stage1_encode.models.vae_decoder import FoldedConv, VideoDecoder, split_latent_frames, stream_frames
from stage1_encode.models.vae_ops import (
    ConvSpec,
    KernelBackend,
    convolve_torch,
    fold_weight,
    is_kernel_faster,
    norm_silu_torch,
    select_backend,
)

CPU = torch.device("cpu")
NANO = Path(__file__).parents[3] / "examples" / "nano" / "model" / "vae"


def wide_vae() -> AutoencoderKLWan:
    """Random, with the real one's two residual blocks a level."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoencoderKLWan(
            base_dim=8, decoder_base_dim=8, z_dim=48, dim_mult=[1, 2, 4, 4], num_res_blocks=2, is_residual=True,
            temperal_downsample=[False, True, True], in_channels=12, out_channels=12, patch_size=2,
            scale_factor_temporal=4, scale_factor_spatial=16, latents_mean=[0.0] * 48, latents_std=[1.0] * 48,
        )  # fmt: skip
    return model.eval().requires_grad_(False)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def frames(decoder: VideoDecoder, z: Tensor, most: int) -> Tensor:
    """Not clamped and not rounded, (3 F X Y)."""
    cells = z.permute(1, 2, 3, 0)
    with torch.inference_mode():
        decoder.reset_cache()
        made = [
            decoder(cells[part.start : part.stop], first=part.start == 0)
            for part in split_latent_frames(z.shape[1], most)
        ]
    return torch.cat(made).permute(3, 0, 1, 2)


@pytest.mark.parametrize("name", ["nano", "random"])
def test_frames_are_those_of_diffusers(name: str) -> None:
    """Largest difference 1e-5 in float32; with one tap left out of a phase's sums it is 1.1."""
    model = AutoencoderKLWan.from_pretrained(NANO).float() if name == "nano" else wide_vae()
    decoder = VideoDecoder(model, KernelBackend())
    z = draw(48, 5, 2, 4)
    with torch.no_grad():
        wanted = model.decode(z[None]).sample[0]
    assert wanted.std() > 0.05
    for most in (1, 2):
        assert (frames(decoder, z, most).clamp(-1, 1) - wanted).abs().max() < 1e-5
    assert (frames(decoder, z[:, :1], 1).clamp(-1, 1) - wanted[:, :1]).abs().max() < 1e-5


def test_bfloat16_stays_within_its_rounding() -> None:
    """PSNR of ours in bf16 to diffusers in float32: at least 50 dB, and not below diffusers' own bf16."""
    model = AutoencoderKLWan.from_pretrained(NANO).float()
    z = draw(48, 3, 2, 4)
    with torch.no_grad():
        wanted = model.decode(z[None]).sample[0]
        model = model.bfloat16()
        theirs = model.decode(z[None].bfloat16()).sample[0].float()
    found = frames(VideoDecoder(model, KernelBackend()), z.bfloat16(), 2).float().clamp(-1, 1)
    ours, other = (-10 * ((x - wanted).square().mean() / 4).log10() for x in (found, theirs))
    assert ours > 50
    assert ours > other - 0.5


def test_one_video_after_another_of_other_sizes() -> None:
    decoder = VideoDecoder(wide_vae(), KernelBackend())
    first, other = draw(48, 3, 2, 4), draw(48, 4, 2, 2, seed=1)
    alone = frames(decoder, first, 2)
    frames(decoder, other, 3)
    assert torch.equal(frames(decoder, first, 2), alone)


def test_steps_cover_a_video_evenly() -> None:
    assert [len(part) for part in split_latent_frames(31, 4)] == [1, *[3] * 9, 1, 1, 1]
    assert [len(part) for part in split_latent_frames(8, 3)] == [1] * 8
    assert split_latent_frames(1, 2) == [range(1)]
    assert [place for part in split_latent_frames(31, 2) for place in part] == list(range(31))


def test_folded_upsampling_is_nearest_and_then_a_convolution() -> None:
    """Exact in float64: nine taps at twice the size are four at the size itself."""
    x, weight, bias = draw(2, 5, 4, 3).double(), draw(6, 3, 1, 3, 3).double(), draw(6).double()
    big = functional.interpolate(x.permute(0, 3, 1, 2), scale_factor=2.0, mode="nearest-exact")
    wanted = functional.conv2d(big, weight[:, :, 0], bias, padding=1).permute(0, 2, 3, 1)
    plan = ConvSpec(3, 6, depth=1, side=2, space=2)
    found = convolve_torch(x, fold_weight(weight.float(), plan).double(), bias, plan)
    assert (found - wanted).abs().max() < 1e-5


def test_normalisation_is_that_of_diffusers() -> None:
    block = wide_vae().decoder.up_blocks[0].resnets[0]
    x, out = draw(2, 3, 4, 32), torch.empty(2, 3, 4, 32)
    norm_silu_torch(x, block.norm1.gamma.flatten(), out)
    wanted = functional.silu(block.norm1(x.permute(3, 0, 1, 2)[None]))[0].permute(1, 2, 3, 0)
    assert (out - wanted).abs().max() < 1e-5


def test_pixels_come_as_they_are_made(model: Path) -> None:
    own = vae.load_vae(model, dtype=torch.float32, device=CPU)
    pieces = vae.decode_stream(own, draw(48, 5, 2, 4), chunk_frames=2)
    assert [piece.shape[0] for piece in pieces] == [1, 8, 4, 4]
    whole = stream_frames(own.decoder, draw(48, 5, 2, 4), max_frames=1)
    assert next(whole).dtype == torch.uint8


def test_where_our_kernels_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert select_backend(CPU, torch.bfloat16, compiled=True) == KernelBackend()
    monkeypatch.setattr(vae_ops, "vae_norm_kernel", vae_ops)  # as if it were there
    cases = [((9, 0), "bfloat16", True), ((8, 9), "bfloat16", False), ((9, 0), "float32", False)]
    for capability, dtype, compiled in cases:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        found = select_backend(torch.device("cuda", 0), getattr(torch, dtype), compiled=True)
        assert found == KernelBackend(triton_norms=True, convolutions=compiled)
    assert not select_backend(torch.device("cuda", 0), torch.bfloat16, compiled=False).convolutions
    faster = [
        layer.plan for layer in VideoDecoder(wide_vae(), KernelBackend()).modules() if isinstance(layer, FoldedConv)
    ]
    assert not any(is_kernel_faster(plan) for plan in faster), "no tile fits 32 channels"
    assert is_kernel_faster(ConvSpec(1024, 1024, depth=1, side=2, space=2))
    assert not is_kernel_faster(ConvSpec(512, 512))
