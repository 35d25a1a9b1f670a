"""The two models of stage one alone, by precision and batch, with their errors against float32."""

import copy
from collections.abc import Iterator, Sequence
from functools import partial

import numpy
import torch
from torch import Tensor

from benchmarks.random_models import WORDS, Size
from benchmarks.runner import Row, peak_text, time_call
from common.device import copy_async
from stage1_encode.models import text_encoder, vae

PRECISIONS = ("float32", "tf32", "float16", "bfloat16")
BATCHES = (1, 8, 16)


def copy_vae(base: vae.WanVae, precision: str) -> vae.WanVae:
    """Return the same VAE in another precision."""
    return vae.WanVae(copy.deepcopy(base.model).to(vae.parse_vae_dtype(precision)), base.mean, base.std)


def make_frame_encoder(base: vae.WanVae, precision: str) -> vae.FrameEncoder:
    """Return a frame encoder of one precision; `base` does not change."""
    return vae.make_frame_encoder(copy_vae(base, precision), tf32=precision == vae.TF32)


def make_pictures(size: Size, count: int, device: torch.device) -> Tensor:
    """Return pictures (B X Y 3) uint8 of noise over gradients."""
    draw = numpy.random.default_rng(0)
    y, x = numpy.mgrid[: size.height, : size.width]
    smooth = numpy.stack([x * 160 / size.width, y * 160 / size.height, 40 + 0 * x], axis=-1)
    noise = draw.integers(0, 64, (count, size.height, size.width, 3))
    return torch.from_numpy((smooth + noise).astype(numpy.uint8)).to(device)


def as_videos(pixels: Tensor) -> Tensor:
    """Return pictures as videos of one frame (B 3 1 X Y) in [-1, 1]."""
    return pixels.permute(0, 3, 1, 2)[:, :, None].float() / 127.5 - 1


def vae_error(encoder: vae.FrameEncoder, base: vae.WanVae, pixels: Tensor) -> float:
    """Return the relative error of latents against diffusers in float32."""
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        exact = torch.cat([base.model.encode(video[None]).latent_dist.mode() for video in as_videos(pixels)])
    exact = (exact - base.mean) / base.std
    return ((vae.encode_frames(encoder, pixels) - exact).norm() / exact.norm()).item()


def vae_rows(base: vae.WanVae, pixels: Tensor, precisions: Sequence[str]) -> Iterator[Row]:
    """Time one frame with diffusers and with our frame encoder, in every precision."""
    videos = as_videos(pixels)
    for batch in BATCHES[:2] if "float32" in precisions else ():
        for name, tf32 in (("float32", False), ("float32 with tf32", True)):
            with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
                took = time_call(partial(base.model.encode, videos[:batch]), choose=min)
            yield f"VAE, one frame, diffusers, {name}, batch {batch}", f"{took / batch * 1e3:.2f} ms a frame"
    for precision in precisions:
        encoder = make_frame_encoder(base, precision)
        error = vae_error(encoder, base, pixels[:4])
        peak_text()
        for batch in BATCHES:
            took = time_call(partial(vae.encode_frames, encoder, pixels[:batch]), choose=min)
            figure = f"{took / batch * 1e3:.2f} ms a frame, {peak_text()}, latents off by {error:.1e}"
            yield f"VAE, one frame, here, {precision}, batch {batch}", figure


def random_tokens(encoder: text_encoder.TextEncoder, count: int, length: int) -> list[Tensor]:
    """Return ids and mask of `count` prompts of `length` tokens, on the encoder's device."""
    tokens = torch.randint(3, WORDS, (count, length), generator=torch.Generator().manual_seed(0))
    return [copy_async(x, encoder.model.device) for x in text_encoder.pad_tokens(tokens.tolist(), 0)]


def sample_embeddings(encoder: text_encoder.TextEncoder) -> Tensor:
    """Return embeddings of four prompts of 128 tokens (4 128 D), computed in the encoder's precision."""
    with torch.no_grad():
        return encoder.model(*random_tokens(encoder, 4, 128)).last_hidden_state.float()


def text_rows(encoder: text_encoder.TextEncoder, name: str, exact: Tensor) -> Iterator[Row]:
    """Time UMT5 at the batches of the reference and at the default budget, with its error against float32."""
    error = ((sample_embeddings(encoder) - exact).norm() / exact.norm()).item()
    for count, length in ((8, 512), (32, 128), (64, 128)):
        ids, mask = random_tokens(encoder, count, length)
        with torch.no_grad():
            took = time_call(partial(encoder.model, ids, mask), choose=min)
        rate = f"{took:.4f} s, {count * length / took:.0f} tokens/s, {took / count * 1e3:.2f} ms a prompt"
        yield f"UMT5, {name}, {count} x {length} tokens", f"{rate}, off by {error:.1e}, {peak_text()}"
