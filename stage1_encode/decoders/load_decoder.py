"""`--decoder`: puts a smaller decoder in the place of the VAE's own, and says how near it comes.

Shapes: B videos, C channels, T latent frames, H W latent size, F frames, X Y pixel height and width.
"""

import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from common.model_folder import locate_model
from common.options import FULL_DECODER
from stage1_encode.decoders.decoder_files import DecoderFile, open_decoder_file
from stage1_encode.decoders.tiny_network import SURPLUS_FRAMES, TinyNetwork
from stage1_encode.models.vae import AutoencoderKLWan, FullDecoder, LatentDecoder, WanVae, decoder_model, empty_vae
from stage1_encode.models.vae_decoder import split_latent_frames

CLIP_FRAMES, CLIP_HEIGHT, CLIP_WIDTH = 5, 64, 96  # of the test clip
LEAST_PSNR = 12.0  # dB; below, a decoder was made for other latents or not trained


@dataclass(frozen=True)
class TinyDecoder:
    """A decoder of the TAEHV family."""

    network: TinyNetwork
    mean: Tensor  # (1 C 1 1 1), added to the latents for a decoder that takes them as the VAE makes them, else 0
    std: Tensor  # (1 C 1 1 1), or 1
    dtype: torch.dtype
    chunk_frames: int  # latent frames decoded at once

    def prepare_latents(self, latents: Tensor) -> Tensor:
        """(B C T H W) as the denoiser makes them -> (B T C H W) as the network reads them."""
        scaled = latents.to(self.mean.device).float() * self.std + self.mean
        return rearrange(scaled, "b c t h w -> b t c h w").to(self.dtype)

    @torch.inference_mode()
    def decode_stream(self, latents: Tensor) -> Iterator[Tensor]:
        """Yield the pixels of one video, see `LatentDecoder`."""
        self.network.reset_cache()
        cells = self.prepare_latents(latents[None])
        for chunk in split_latent_frames(cells.shape[1], self.chunk_frames):
            (frames,) = round_pixels(self.network(cells[:, chunk.start : chunk.stop]))
            yield frames if chunk.start else frames[SURPLUS_FRAMES:]

    @torch.inference_mode()
    def decode_batch(self, latents: Tensor) -> Tensor:
        """Return the pixels of several small videos, decoded at once."""
        self.network.reset_cache()
        return round_pixels(self.network(self.prepare_latents(latents)))[:, SURPLUS_FRAMES:]

    def free_memory(self) -> None:
        """Release the previous frames."""
        self.network.reset_cache()


def round_pixels(x: Tensor) -> Tensor:
    """[0, 1] -> uint8."""
    return (x.float().clamp(0, 1) * 255).round().to(torch.uint8)


def check_decoder(choice: str, model: str) -> None:
    """Raise ValueError if the file of `--decoder` is none for a model's VAE, before any of its weights are read."""
    if choice != FULL_DECODER:
        file = open_decoder_file(Path(choice))
        file.check_tensors(empty_decoder(file, empty_vae(locate_model(model, ("vae",)))).state_dict())


def use_decoder(vae: WanVae, choice: str) -> WanVae:
    """Return the VAE with the decoder of `--decoder`, after a line on how far that is from the VAE's own.

    The VAE's own decoder is released if another takes its place. ValueError for a file that is none for this VAE.
    """
    if choice == FULL_DECODER:
        return vae
    file = open_decoder_file(Path(choice))
    latents = encode_test_clip(vae)
    expected = vae.full_decoder.decode_batch(latents)
    # Files of the same layout differ in the latents that they take, and do not say so: the better fit decides.
    measured = [(pixel_psnr(one.decode_batch(latents), expected), one) for one in list_decoders(vae, file)]
    psnr, decoder = max(measured, key=lambda pair: pair[0])
    kind = "full shape" if file.layout is None else "tiny, wide" if file.layout.is_wide else "tiny"
    note = f"{psnr:.1f} dB PSNR to the VAE's own on a test clip; --decoder full is exact"
    is_first = os.environ.get("RANK", "0") == "0"  # says it once for all processes
    if is_first:
        logging.info("decoder: %s (%s), %s", choice, kind, note)
    if is_first and psnr < LEAST_PSNR:
        logging.warning(
            "decoder=%s: does not show what the VAE shows; it was trained for another VAE or not at all", choice
        )
    vae.model.decoder = None
    return replace(vae, other_decoder=decoder)


def list_decoders(vae: WanVae, file: DecoderFile) -> Iterator[LatentDecoder]:
    """Yield the decoders that a file may be, on the VAE's device and in its dtype."""
    network = empty_decoder(file, vae.model)
    load_weights(network, file, vae)
    if not isinstance(network, TinyNetwork):
        yield FullDecoder(network, vae.mean, vae.std, vae.chunk_frames)
        return
    network.prepare_inference()
    for mean, std in ((torch.zeros_like(vae.mean), torch.ones_like(vae.std)), (vae.mean, vae.std)):
        yield TinyDecoder(network, mean, std, vae.model.dtype, vae.chunk_frames)


def empty_decoder(file: DecoderFile, base: AutoencoderKLWan) -> TinyNetwork | AutoencoderKLWan:
    """Return the network of a file on the meta device; `base`: the VAE that one of the full shape resembles."""
    if file.layout is None:
        return decoder_model(base, width=file.width, blocks=file.blocks)
    with torch.device("meta"):
        return TinyNetwork(file.layout)


def load_weights(network: nn.Module, file: DecoderFile, vae: WanVae) -> None:
    """Give a network on the meta device the file's tensors, on the VAE's device and in its dtype."""
    file.check_tensors(network.state_dict())
    network.load_state_dict(file.tensors, assign=True)
    network.to(vae.device, vae.model.dtype).eval().requires_grad_(False)


def make_test_clip() -> Tensor:
    """Return a clip (3 F X Y) in [-1, 1]: a disc and a square that move over a pale gradient."""
    times, rows, columns = (torch.linspace(0, 1, size) for size in (CLIP_FRAMES, CLIP_HEIGHT, CLIP_WIDTH))
    t, y, x = torch.meshgrid(times, rows, columns, indexing="ij")
    clip = torch.stack([0.55 - 0.15 * x, 0.45 + 0.1 * y, 0.5 + 0.1 * x * y])
    disc = (1.5 * (x - 0.25 - 0.2 * t)).square() + (y - 0.4).square() < 0.02
    square = ((x - 0.75).abs() < 0.08) & ((y - 0.7 + 0.2 * t).abs() < 0.12)
    for shape, color in ((disc, (0.85, 0.15, 0.15)), (square, (0.15, 0.35, 0.85))):
        clip = torch.where(shape, torch.tensor(color)[:, None, None, None], clip)
    return 2 * clip - 1


@torch.inference_mode()
def encode_test_clip(vae: WanVae) -> Tensor:
    """Return the latents (1 C T H W) of the test clip, as the denoiser would make them."""
    clip = make_test_clip()[None].to(vae.device, vae.model.dtype)
    return (vae.model.encode(clip).latent_dist.mode().float() - vae.mean) / vae.std


def pixel_psnr(pixels: Tensor, expected: Tensor) -> float:
    """Return the PSNR in dB, at most 100, of two videos of equal shape, uint8."""
    error = (pixels.float() - expected.float()).square().mean().item()
    return min(100.0, 10 * math.log10(255**2 / error)) if error else 100.0
