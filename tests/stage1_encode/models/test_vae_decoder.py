"""The streaming decoder equals diffusers' decode with any chunk size, and videos do not affect each other."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import DupUp3D
from torch import Tensor
from torch.nn import functional

from stage1_encode.models import vae, vae_ops
from stage1_encode.models.vae_decoder import VideoDecoder, split_latent_frames, stream_frames
from stage1_encode.models.vae_ops import ConvSpec, add_repeated, convolve, fold_weight, norm_silu_torch

CPU = torch.device("cpu")
NANO = Path(__file__).parents[3] / "examples" / "nano" / "model" / "vae"


def make_vae(blocks: int = 2) -> AutoencoderKLWan:
    """Random weights, with two residual blocks per level as in the real model, or fewer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoencoderKLWan(
            base_dim=8, decoder_base_dim=8, z_dim=48, dim_mult=[1, 2, 4, 4], num_res_blocks=blocks, is_residual=True,
            temperal_downsample=[False, True, True], in_channels=12, out_channels=12, patch_size=2,
            scale_factor_temporal=4, scale_factor_spatial=16, latents_mean=[0.0] * 48, latents_std=[1.0] * 48,
        )  # fmt: skip
    return model.eval().requires_grad_(False)


def draw_normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def decode_frames(decoder: VideoDecoder, z: Tensor, max_frames: int) -> Tensor:
    """Frames (3 F X Y), not clamped and not rounded."""
    cells = z.permute(1, 2, 3, 0)
    with torch.inference_mode():
        decoder.reset_cache()
        chunks = [
            decoder(cells[chunk.start : chunk.stop], first=chunk.start == 0)
            for chunk in split_latent_frames(z.shape[1], max_frames)
        ]
    return torch.cat(chunks).permute(3, 0, 1, 2)


@pytest.mark.parametrize("name", ["nano", "random"])
def test_frames_are_those_of_diffusers(name: str) -> None:
    """The largest difference is 1e-5 in float32; it is 1.1 if one tap is missing from a phase's sums."""
    model = AutoencoderKLWan.from_pretrained(NANO).float() if name == "nano" else make_vae()
    decoder = VideoDecoder(model)
    z = draw_normal(48, 5, 2, 4)
    with torch.no_grad():
        expected = model.decode(z[None]).sample[0]
    assert expected.std() > 0.05
    for max_frames in (1, 2):
        assert (decode_frames(decoder, z, max_frames).clamp(-1, 1) - expected).abs().max() < 1e-5
    assert (decode_frames(decoder, z[:, :1], 1).clamp(-1, 1) - expected[:, :1]).abs().max() < 1e-5


def test_bfloat16_stays_within_its_rounding() -> None:
    """Its PSNR to diffusers in float32 is at least 50 dB, and not below that of diffusers in bf16."""
    model = AutoencoderKLWan.from_pretrained(NANO).float()
    z = draw_normal(48, 3, 2, 4)
    with torch.no_grad():
        expected = model.decode(z[None]).sample[0]
        model = model.bfloat16()
        reference = model.decode(z[None].bfloat16()).sample[0].float()
    result = decode_frames(VideoDecoder(model), z.bfloat16(), 2).float().clamp(-1, 1)
    ours, theirs = (-10 * ((x - expected).square().mean() / 4).log10() for x in (result, reference))
    assert ours > 50
    assert ours > theirs - 0.5


def test_videos_do_not_affect_each_other() -> None:
    decoder = VideoDecoder(make_vae())
    first, other = draw_normal(48, 3, 2, 4), draw_normal(48, 4, 2, 2, seed=1)
    alone = decode_frames(decoder, first, 2)
    decode_frames(decoder, other, 3)
    assert torch.equal(decode_frames(decoder, first, 2), alone)


def test_chunks_cover_a_video_evenly() -> None:
    assert [len(chunk) for chunk in split_latent_frames(31, 4)] == [1, *[3] * 9, 1, 1, 1]
    assert [len(chunk) for chunk in split_latent_frames(8, 3)] == [1] * 8
    assert split_latent_frames(1, 2) == [range(1)]
    assert [index for chunk in split_latent_frames(31, 2) for index in chunk] == list(range(31))


def test_folded_upsampling_is_nearest_then_convolution() -> None:
    """Nine taps on the upsampled picture equal four taps per phase on the picture itself."""
    x, weight, bias = draw_normal(2, 5, 4, 3).double(), draw_normal(6, 3, 1, 3, 3).double(), draw_normal(6).double()
    upsampled = functional.interpolate(x.permute(0, 3, 1, 2), scale_factor=2.0, mode="nearest-exact")
    expected = functional.conv2d(upsampled, weight[:, :, 0], bias, padding=1).permute(0, 2, 3, 1)
    spec = ConvSpec(3, 6, depth=1, side=2, space=2)
    result = convolve(x, fold_weight(weight.float(), spec).double(), bias, spec)
    assert (result - expected).abs().max() < 1e-5


def test_normalization_is_that_of_diffusers() -> None:
    block = make_vae().decoder.up_blocks[0].resnets[0]
    x, out = draw_normal(2, 3, 4, 32), torch.empty(2, 3, 4, 32)
    norm_silu_torch(x, block.norm1.gamma.flatten(), out)
    expected = functional.silu(block.norm1(x.permute(3, 0, 1, 2)[None]))[0].permute(1, 2, 3, 0)
    assert (out - expected).abs().max() < 1e-5


def test_pixels_are_streamed(model: Path) -> None:
    own = vae.load_vae(model, dtype=torch.float32, device=CPU)
    pieces = own.decoder.decode_stream(draw_normal(48, 5, 2, 4))
    assert [piece.shape[0] for piece in pieces] == [1, 8, 4, 4]
    stream = stream_frames(own.full_decoder.network, draw_normal(48, 5, 2, 4), max_frames=1)
    assert next(stream).dtype == torch.uint8


def test_norm_kernel_is_used_if_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tensors on a GPU whose channels are a power of two, if Triton is there."""
    calls: list[int] = []

    def record_call(x: Tensor, gamma: Tensor, out: Tensor) -> None:
        calls.append(len(gamma))

    monkeypatch.setattr(vae_ops, "vae_norm_kernel", SimpleNamespace(norm_silu_triton=record_call))
    monkeypatch.setattr(vae_ops, "norm_silu_torch", lambda x, gamma, out: None)
    for is_cuda, channels in ((True, 32), (True, 24), (False, 32)):
        vae_ops.norm_silu(SimpleNamespace(is_cuda=is_cuda), torch.ones(channels), torch.empty(0))
    assert calls == [32]


@pytest.mark.parametrize(("repeats", "halves"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2), (8, 2)])
def test_repeated_residual_is_that_of_diffusers(repeats: int, halves: int) -> None:
    """Exact, also for the first frame of a video, of which diffusers drops the earlier half."""
    channels, outputs = 8 * halves, 2 * repeats
    shortcut = DupUp3D(channels, outputs, factor_t=halves, factor_s=2)
    assert shortcut.repeats == repeats
    spec = ConvSpec(channels, outputs, depth=1, side=2, space=2, repeats=repeats, halves=halves)
    for frames, is_first in ((3, False), (1, True)):
        residual = draw_normal(frames, 3, 5, channels)
        expected = shortcut(residual.permute(3, 0, 1, 2)[None], first_chunk=is_first)[0].permute(1, 2, 3, 0)
        out = draw_normal(*expected.shape, seed=1)
        assert torch.equal(add_repeated(out.clone(), residual, spec), out + expected)
