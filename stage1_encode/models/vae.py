"""The only loader of `AutoencoderKLWan`, and the only place that applies the mean and std of its latents.

Shapes: B batch, C channels, T latent frames, H W latent size, F pixel frames, X Y pixel height and width.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm
from diffusers.utils import logging
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from common.model_folder import locate_part, report_load_errors
from common.video import LATENT_CHANNELS
from stage1_encode.models.loading import check_missing_weights
from stage1_encode.models.original_models import (
    LATENTS_MEAN,
    LATENTS_STD,
    VAE_NAMES,
    check_names,
    infer_vae_settings,
    read_original_tensors,
)
from stage1_encode.models.vae_decoder import VideoDecoder, stream_frames
from stage1_encode.models.vae_ops import NORM_EPS

MEMORY_FORMAT = torch.channels_last_3d
CHUNK_FRAMES = 2  # latent frames decoded at once; more take more memory and are hardly faster
TF32 = "tf32"  # float32 whose convolutions round their inputs to 10 mantissa bits on a GPU


class LatentDecoder(Protocol):
    """What turns the denoiser's latents into pixels: the VAE's own decoder, or another in its place."""

    @property
    def network(self) -> nn.Module:
        """The module that decodes; it is called once per chunk of a streamed video."""
        ...

    def decode_stream(self, latents: Tensor) -> Iterator[Tensor]:
        """Yield pixels (F X Y 3) uint8 on the decoder's device while one video's latents (C T H W) are decoded."""
        ...

    def decode_batch(self, latents: Tensor) -> Tensor:
        """Return pixels (B F X Y 3) uint8 on the decoder's device of several small videos (B C T H W)."""
        ...

    def free_memory(self) -> None:
        """Release what is kept from one chunk to the next, until the next video."""
        ...


@dataclass(frozen=True)
class FullDecoder:
    """The VAE's own decoder."""

    model: AutoencoderKLWan
    mean: Tensor  # (1 C 1 1 1)
    std: Tensor  # (1 C 1 1 1)
    chunk_frames: int = CHUNK_FRAMES

    @cached_property
    def network(self) -> VideoDecoder:
        """The streaming decoder, a rearranged copy of the model's, built on first use."""
        return VideoDecoder(self.model)

    def denormalize(self, latents: Tensor) -> Tensor:
        """(B C T H W) as the denoiser makes them -> (B C T H W) as the model reads them."""
        return (latents.to(self.mean.device).float() * self.std + self.mean).to(self.model.dtype)

    @torch.inference_mode()
    def decode_stream(self, latents: Tensor) -> Iterator[Tensor]:
        """Yield the pixels of one video, see `LatentDecoder`."""
        yield from stream_frames(self.network, self.denormalize(latents[None])[0], max_frames=self.chunk_frames)

    @torch.inference_mode()
    def decode_batch(self, latents: Tensor) -> Tensor:
        """Return the pixels of several small videos, decoded at once by diffusers' own decoder."""
        denormalized = self.denormalize(latents).contiguous(memory_format=MEMORY_FORMAT)
        video = self.model.decode(denormalized, return_dict=False)[0]
        pixels = (video.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
        return rearrange(pixels, "b c f x y -> b f x y c")

    def free_memory(self) -> None:
        """Release cache and workspace until the next video."""
        self.network.free_memory()


@dataclass(frozen=True)
class WanVae:
    """The autoencoder and the normalization of its latents."""

    model: AutoencoderKLWan
    mean: Tensor  # (1 C 1 1 1)
    std: Tensor  # (1 C 1 1 1)
    other_decoder: LatentDecoder | None = None  # decodes in place of the model's own
    chunk_frames: int = CHUNK_FRAMES  # latent frames decoded at once

    @property
    def device(self) -> torch.device:
        """Return the device of model and normalization."""
        return self.mean.device

    @cached_property
    def full_decoder(self) -> FullDecoder:
        """The model's own decoder."""
        return FullDecoder(self.model, self.mean, self.std, self.chunk_frames)

    @property
    def decoder(self) -> LatentDecoder:
        """What decodes the latents."""
        return self.other_decoder or self.full_decoder

    def release_diffusers_decoder(self) -> None:
        """Free diffusers' own decoder; `decoder` holds a rearranged copy of its weights, or replaces it."""
        assert self.decoder.network is not None  # builds the copy
        self.model.decoder = None


@dataclass(frozen=True)
class LatentStatistics:
    """Mean and standard deviation of a model's latents, per channel."""

    mean: Tensor  # (C 1 1 1)
    std: Tensor  # (C 1 1 1)

    def normalize(self, latents: Tensor) -> Tensor:
        """(C T H W) as the VAE returns them -> (C T H W) as the denoiser reads them."""
        return (latents - self.mean) / self.std


@dataclass(frozen=True)
class FrameEncoder:
    """The encoder half, specialized for single frames."""

    net: Callable[[Tensor], Tensor]
    dtype: torch.dtype
    mean: Tensor  # (1 C 1 1 1)
    std: Tensor  # (1 C 1 1 1)
    compiled_batch: int  # fixed batch size of the compiled network; 0 = not compiled, any size
    tf32: bool


class FrameConv(nn.Module):
    """A causal 3-D convolution of a single frame: the frames before it are zero, so only the last tap counts."""

    def __init__(self, conv: nn.Conv3d) -> None:
        super().__init__()
        weight = conv.weight[:, :, -1].detach().clone(memory_format=torch.channels_last)
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), conv.bias
        self.stride = conv.stride[1:]
        self.padding = tuple(size // 2 for size in conv.kernel_size[1:])

    def forward(self, x: Tensor, cache_x: None = None) -> Tensor:
        """(B c 1 x y) -> (B d 1 x' y'); diffusers passes no cache for the first frame."""
        assert x.shape[2] == 1 and cache_x is None, x.shape
        return functional.conv2d(x.squeeze(2), self.weight, self.bias, self.stride, self.padding).unsqueeze(2)


class FrameNorm(nn.Module):
    """The VAE's norm over channels, fused: in channels-last memory they are contiguous."""

    def __init__(self, norm: WanRMS_norm) -> None:
        super().__init__()
        self.weight = nn.Parameter(norm.gamma.detach().flatten(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B c ...) -> (B c ...)."""
        return functional.rms_norm(x.movedim(1, -1), self.weight.shape, self.weight, NORM_EPS).movedim(-1, 1)


class FrameEncoderNet(nn.Module):
    """Maps pictures to the mode of their latents; takes over the layers of the model's encoder and modifies them."""

    def __init__(self, model: AutoencoderKLWan) -> None:
        super().__init__()
        self.patch = model.config.patch_size or 1
        self.encoder, self.head = model.encoder, FrameConv(model.quant_conv)
        for name, module in list(self.encoder.named_modules()):
            parent, _, child = name.rpartition(".")
            if isinstance(module, nn.Conv3d) and child != "time_conv":  # unused for the first frame
                setattr(self.encoder.get_submodule(parent), child, FrameConv(module))
            elif isinstance(module, WanRMS_norm):
                setattr(self.encoder.get_submodule(parent), child, FrameNorm(module))

    def forward(self, images: Tensor) -> Tensor:
        """(B 3 1 X Y) in [-1, 1] -> (B C 1 H W), not normalized."""
        cells = rearrange(images, "b c f (x p) (y q) -> b (c q p) f x y", p=self.patch, q=self.patch)
        return self.head(self.encoder(cells.contiguous(memory_format=MEMORY_FORMAT))).chunk(2, dim=1)[0]


def parse_vae_dtype(precision: str) -> torch.dtype:
    """Return the weight dtype of a precision's name; that of 'tf32' is float32."""
    return torch.float32 if precision == TF32 else getattr(torch, precision)


def load_vae(folder: Path, *, dtype: torch.dtype, device: torch.device) -> WanVae:
    """Load the VAE of a model folder; ValueError if it is broken or not that of Wan2.2."""
    logging.set_verbosity_error()  # missing weights are reported by `check_missing_weights`
    path = locate_part(folder, "vae")
    if path.is_file():
        model = load_original_vae(path, dtype)
    else:
        with report_load_errors(path):
            model, loading_info = AutoencoderKLWan.from_pretrained(
                path, torch_dtype=dtype, output_loading_info=True, use_safetensors=True
            )
        check_missing_weights(path, loading_info)
    check_channels(folder, model.config.z_dim)
    with report_load_errors(path):
        statistics = torch.tensor([model.config.latents_mean, model.config.latents_std], device=device)
        mean, std = rearrange(statistics, "s c -> s 1 c 1 1 1", c=LATENT_CHANNELS)
    return WanVae(model.to(device).eval().requires_grad_(False), mean, std)


def check_channels(folder: Path, channels: int) -> None:
    """Raise ValueError if a VAE has another number of latent channels than that of Wan2.2."""
    if channels != LATENT_CHANNELS:
        raise ValueError(f"model={folder}: the VAE has {channels} channels, Wan2.2-TI2V-5B has {LATENT_CHANNELS}")


def read_latent_statistics(folder: Path) -> LatentStatistics:
    """Statistics of the latents of a model folder's VAE, which is not loaded; ValueError if it is not Wan2.2's."""
    path = locate_part(folder, "vae")
    if path.is_file():
        statistics = torch.tensor([LATENTS_MEAN, LATENTS_STD])
    else:
        with report_load_errors(path):
            config = AutoencoderKLWan.load_config(path)
            statistics = torch.tensor([config["latents_mean"], config["latents_std"]])
    check_channels(folder, statistics.shape[-1])
    mean, std = rearrange(statistics, "s c -> s c 1 1 1")
    return LatentStatistics(mean, std)


def load_original_vae(path: Path, dtype: torch.dtype) -> AutoencoderKLWan:
    """Read the original Wan2.2_VAE.pth on the CPU."""
    tensors = read_original_tensors(path, VAE_NAMES)
    settings = infer_vae_settings(path, tensors)
    with torch.device("meta"):
        model = AutoencoderKLWan(**settings)
    check_names(path, tensors, model.state_dict())
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)
    return model


def empty_vae(folder: Path) -> AutoencoderKLWan:
    """Return the VAE of a model folder on the meta device, without weights; ValueError if it is none of Wan."""
    path = locate_part(folder, "vae")
    settings = infer_vae_settings(path, read_original_tensors(path, VAE_NAMES)) if path.is_file() else None
    with torch.device("meta"), report_load_errors(path):
        return AutoencoderKLWan.from_config(settings or AutoencoderKLWan.load_config(path))


def decoder_model(base: AutoencoderKLWan, *, width: int, blocks: int) -> AutoencoderKLWan:
    """Return the decoder half of a model like `base` with another width and number of blocks, on the meta device."""
    with torch.device("meta"):
        model = AutoencoderKLWan(**{**base.config, "decoder_base_dim": width, "num_res_blocks": blocks})
    model.encoder = model.quant_conv = None
    return model.eval()


def make_frame_encoder(vae: WanVae, *, compiled_batch: int = 0, tf32: bool = False) -> FrameEncoder:
    """Return the encoder half for single frames, at a third of the work; it modifies the VAE's own encoder.

    `compiled_batch` > 0 compiles it for batches of exactly that many pictures.
    """
    plain = FrameEncoderNet(vae.model).eval()
    net = torch.compile(plain, dynamic=False) if compiled_batch else plain
    return FrameEncoder(net, vae.model.dtype, vae.mean, vae.std, compiled_batch, tf32)


@torch.inference_mode()
def encode_frames(encoder: FrameEncoder, pixels: Tensor) -> Tensor:
    """Return first-frame latents (B C 1 H W) float32, the normalized mode, of pictures (B X Y 3) uint8.

    On a GPU this runs asynchronously if `pixels` is in pinned memory.
    """
    count, device = len(pixels), encoder.mean.device
    images = rearrange(pixels.to(device, non_blocking=True), "b x y c -> b c 1 x y").float() / 127.5 - 1
    if encoder.compiled_batch > count:  # a last, smaller batch would be compiled anew
        images = functional.pad(images, (0, 0, 0, 0, 0, 0, 0, 0, 0, encoder.compiled_batch - count))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=encoder.tf32):
        latents = encoder.net(images.to(encoder.dtype)).float()[:count]
    return (latents - encoder.mean) / encoder.std


def decode_video(vae: WanVae, latents: Tensor) -> Tensor:
    """Return pixels (F X Y 3) uint8 on the CPU of one video's latents (C T H W)."""
    return torch.cat([frames.cpu() for frames in vae.decoder.decode_stream(latents)])
