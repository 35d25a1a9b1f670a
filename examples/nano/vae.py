"""The nano VAE: Wan2.2's structure at small widths, trained on the renderer's clips.

Shapes: B clips, T frames, H W pixels, 48 latent channels. diffusers encodes a clip chunk by chunk through a cache; the
two `*_whole` functions compute the same in one pass over all frames, which makes training fast.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanResample,
    WanResidualDownBlock,
    WanResidualUpBlock,
    patchify,
    unpatchify,
)
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from examples.nano.graph import captured, optimizer, train
from examples.nano.render import render, to_network
from examples.nano.world import draw_scenes

CHANNELS = 48
KL, OBJECT_WEIGHT, RATE = 3e-5, 6.0, 2e-3


def make_vae(mean: list[float], std: list[float]) -> AutoencoderKLWan:
    """Return the nano VAE with fresh weights and the given latent statistics (48 each)."""
    return AutoencoderKLWan(
        base_dim=16, decoder_base_dim=16, z_dim=CHANNELS, dim_mult=[1, 2, 4, 4], num_res_blocks=1,
        temperal_downsample=[False, True, True], latents_mean=mean, latents_std=std, is_residual=True,
        in_channels=12, out_channels=12, patch_size=2, scale_factor_temporal=4, scale_factor_spatial=16,
    )  # fmt: skip


def channels_last(vae: AutoencoderKLWan) -> None:
    """Store weights channels-last, so that convolutions run on tensor cores (61 instead of 70 ms per iteration)."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for p in vae.parameters():
        p.data = p.data.contiguous(memory_format=formats.get(p.dim(), torch.contiguous_format))


def resample_frames(block: WanResample, x: Tensor) -> Tensor:
    """Apply the spatial half of an up- or downsampler to every frame of x (B C T H W)."""
    frames = block.resample(rearrange(x, "b c t h w -> (b t) c h w"))
    return rearrange(frames, "(b t) c h w -> b c t h w", b=x.shape[0])


def down(block: WanResidualDownBlock, x: Tensor) -> Tensor:
    """Apply one encoder level; frame 0 passes the temporal stride alone, as in the first chunk."""
    y = x
    for resnet in block.resnets:
        y = resnet(y)
    if block.downsampler is not None:
        y = resample_frames(block.downsampler, y)
        if block.downsampler.mode == "downsample3d":
            y = torch.cat([y[:, :, :1], block.downsampler.time_conv(y)], dim=2)
    return y + block.avg_shortcut(x)


def up(block: WanResidualUpBlock, x: Tensor) -> Tensor:
    """Apply one decoder level; frame 0 is not doubled, and the temporal convolution of later frames does not see it."""
    y = x
    for resnet in block.resnets:
        y = resnet(y)
    if block.upsampler is None:
        return y
    if block.upsampler.mode == "upsample3d":
        tail = rearrange(block.upsampler.time_conv(y[:, :, 1:]), "b (k c) t h w -> b c (t k) h w", k=2)
        y = torch.cat([y[:, :, :1], tail], dim=2)
    return resample_frames(block.upsampler, y) + block.avg_shortcut(x, first_chunk=True)


def encode_whole(vae: AutoencoderKLWan, video: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and log variance (B 48 T' H' W') of clips (B 3 T H W) in [-1, 1], equal to `vae.encode`."""
    encoder = vae.encoder
    x = encoder.conv_in(patchify(video, patch_size=2))
    for block in encoder.down_blocks:
        x = down(block, x)
    x = encoder.conv_out(encoder.nonlinearity(encoder.norm_out(encoder.mid_block(x))))
    mean, log_variance = vae.quant_conv(x).chunk(2, dim=1)
    return mean, log_variance.clamp(-30.0, 20.0)


def decode_whole(vae: AutoencoderKLWan, z: Tensor) -> Tensor:
    """Return clips (B 3 T H W), not clamped, of raw latents (B 48 T' H' W'), equal to `vae.decode` before its clamp."""
    decoder = vae.decoder
    x = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(z)))
    for block in decoder.up_blocks:
        x = up(block, x)
    return unpatchify(decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x))), patch_size=2)


def statistics(vae: AutoencoderKLWan, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the configured latent mean and std, each (1 48 1 1 1)."""
    mean, std = (torch.tensor(v, device=device) for v in (vae.config.latents_mean, vae.config.latents_std))
    return rearrange(mean, "c -> 1 c 1 1 1"), rearrange(std, "c -> 1 c 1 1 1")


@torch.no_grad()
def encode(vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    """Return normalised latents (B 48 T' H' W') of clips (B 3 T H W): the distribution's mode, as in stage one."""
    mean, std = statistics(vae, video.device)
    return (encode_whole(vae, video)[0].float() - mean) / std


@torch.no_grad()
def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Return clips (B 3 T H W) in [-1, 1] of normalised latents (B 48 T' H' W')."""
    mean, std = statistics(vae, latents.device)
    return decode_whole(vae, latents * std + mean).float().clamp(-1, 1)


def object_weight(video: Tensor) -> Tensor:
    """Return the loss weight (B 1 T H W): larger near objects, which are the saturated pixels of clips (B 3 T H W)."""
    vivid = (video.amax(dim=1, keepdim=True) - video.amin(dim=1, keepdim=True) > 0.35).float()
    return 1 + OBJECT_WEIGHT * functional.max_pool3d(vivid, (1, 7, 7), stride=1, padding=(0, 3, 3))


def vae_loss(vae: AutoencoderKLWan, video: Tensor, eps: Tensor) -> Tensor:
    """Return the weighted L1 + MSE of the reconstruction from a sampled latent (noise eps), plus a small KL."""
    mean, log_variance = encode_whole(vae, video)
    mean, log_variance = mean.float(), log_variance.float()
    error = decode_whole(vae, mean + (0.5 * log_variance).exp() * eps).float() - video
    weight = object_weight(video)
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return (weight * (error.abs() + error.square())).mean() / weight.mean() + KL * kl


def measure(
    vae: AutoencoderKLWan, device: torch.device, seed: int, batches: int = 16
) -> tuple[list[float], list[float]]:
    """Return the mean and std of each latent channel over training clips."""
    with torch.no_grad():
        index = torch.arange(64, device=device)
        clips = (to_network(render(draw_scenes(seed, 64 * i + index, held=False))) for i in range(batches))
        z = torch.cat([encode_whole(vae, clip)[0].float() for clip in clips])
    flat = rearrange(z, "b c t h w -> c (b t h w)")
    return flat.mean(dim=1).tolist(), flat.std(dim=1).tolist()


def save_vae(vae: AutoencoderKLWan, folder: Path, device: torch.device, seed: int) -> None:
    """Write `vae/` in float16 with its measured latent statistics."""
    final = make_vae(*measure(vae, device, seed))
    final.load_state_dict(vae.state_dict())
    final.half().save_pretrained(folder / "vae")


def train_vae(
    folder: Path,
    device: torch.device,
    *,
    seed: int,
    seconds: float,
    limit: int,
    batch: int,
    report: Callable[[str], None],
) -> int:
    """Train and save the VAE; starts from `vae/` if it exists. Returns the iterations."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = make_vae([0.0] * CHANNELS, [1.0] * CHANNELS).to(device)
    if (folder / "vae").exists():
        vae.load_state_dict(AutoencoderKLWan.from_pretrained(folder / "vae").float().state_dict())
    channels_last(vae)
    generator = torch.Generator(device).manual_seed(seed)
    adam = optimizer(vae.parameters(), device, beta2=0.99)
    index = torch.arange(batch, device=device)
    loss = torch.zeros((), device=device)
    shape = (batch, CHANNELS, 5, 4, 6)

    def step() -> Tensor:
        adam.zero_grad(set_to_none=True)
        video = to_network(render(draw_scenes(seed, index, held=False)))
        eps = torch.randn(shape, generator=generator, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
            value = vae_loss(vae, video, eps)
        value.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        adam.step()
        index.add_(batch)
        loss.lerp_(value.detach(), 0.02)
        return value

    done = train(
        captured(step, generator), adam.param_groups[0]["lr"], RATE,
        seconds=seconds, limit=limit, report=lambda i: report(f"vae {i} loss {loss.item():.4f}"),
    )  # fmt: skip
    save_vae(vae, folder, device, seed)
    return done
