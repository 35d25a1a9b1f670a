"""The door to `AutoencoderKLWan`, and the only home of its latents' mean and std.

Shapes: B batch, C channels, T latent frames, H W latent size, F pixel frames, X Y pixel height and width.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from einops import rearrange
from torch import Tensor

from common.video import CHANNELS


@dataclass(frozen=True)
class Vae:
    """The autoencoder and its normalisation."""

    model: AutoencoderKLWan
    mean: Tensor  # (1 C 1 1 1)
    std: Tensor  # (1 C 1 1 1)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.mean.device


def load(folder: Path, *, dtype: torch.dtype, device: torch.device) -> Vae:
    """Read the VAE of a model folder; ValueError where it is not a Wan2.2 one."""
    model = AutoencoderKLWan.from_pretrained(folder / "vae", torch_dtype=dtype)
    if model.config.z_dim != CHANNELS:
        raise ValueError(f"model={folder}: the VAE has {model.config.z_dim} channels, Wan2.2-TI2V-5B has {CHANNELS}")
    mean, std = (
        rearrange(torch.tensor(values, device=device), "c -> 1 c 1 1 1")
        for values in (model.config.latents_mean, model.config.latents_std)
    )
    return Vae(model.to(device).eval().requires_grad_(False), mean, std)


@torch.no_grad()
def encode_frames(vae: Vae, pixels: Tensor) -> Tensor:
    """First-frame latents (B C 1 H W) float32 of pictures (B X Y 3) uint8: the mode, normalised."""
    images = rearrange(pixels.to(vae.device), "b x y c -> b c 1 x y").float() / 127.5 - 1
    mode = vae.model.encode(images.to(vae.model.dtype)).latent_dist.mode()
    return (mode.float() - vae.mean) / vae.std


@torch.no_grad()
def decode_video(vae: Vae, latents: Tensor) -> Tensor:
    """Pixels (F X Y 3) uint8 on the CPU of one video's latents (C T H W)."""
    z = rearrange(latents.to(vae.device).float(), "c t h w -> 1 c t h w") * vae.std + vae.mean
    video = vae.model.decode(z.to(vae.model.dtype)).sample[0].float()
    scaled = ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return rearrange(scaled, "c f x y -> f x y c").cpu()
