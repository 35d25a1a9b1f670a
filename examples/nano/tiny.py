"""Trains a tiny decoder for the nano VAE: `python -m examples.nano.tiny` (under 3 minutes on one GPU).

It learns what the VAE's own decoder shows of latents that the denoiser makes from captions, so no video is needed. It
goes on with the file if there is one.
`cli.py sample --decoder examples/nano/model/tiny_decoder.safetensors` uses it.
Shapes: B clips, C channels, T latent frames, H W latent size, F frames, X Y pixels.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.video import LATENT_CHANNELS
from examples.nano.build import SEED, Texts
from examples.nano.captions import NEGATIVE_PROMPT, captions
from examples.nano.graph import captured, optimizer, train
from examples.nano.sample import euler, euler_grid, network
from examples.nano.vae import channels_last, decode, object_weight
from examples.nano.world import draw_scenes
from stage1_encode.decoders.tiny_network import SURPLUS_FRAMES, TinyLayout, TinyNetwork
from stage2_distill.model.transformer import convert_transformer

FILE = "tiny_decoder.safetensors"
LAYOUT = TinyLayout(LATENT_CHANNELS, outputs=12, widths=(32, 24, 16, 16), is_wide=False)
SHAPE = (LATENT_CHANNELS, 5, 4, 6)
STEPS, GUIDANCE, RATE = 8, 2.0, 3e-3
POOL_BATCH = 64  # clips made at once


@dataclass(frozen=True)
class Shown:
    """Latents and what the VAE's own decoder shows of them."""

    latents: Tensor  # (N C T H W), normalized
    clips: Tensor  # (N F X Y 3) uint8


def make_latents(model: Path, count: int, device: torch.device, *, seed: int) -> Tensor:
    """Return latents (N C T H W) that the denoiser makes of captions of the world."""
    net = WanTransformer3DModel.from_pretrained(model / "transformer").float().to(device).eval()
    convert_transformer(net)
    texts, generator = Texts(model, device), torch.Generator(device).manual_seed(seed)
    negative, latents = texts([NEGATIVE_PROMPT]), list[Tensor]()
    for start in range(0, count, POOL_BATCH):
        index = torch.arange(start, min(start + POOL_BATCH, count), device=device)
        text = texts(captions(draw_scenes(seed, index, held=False)))
        noise = torch.randn((len(index), *SHAPE), generator=generator, device=device)
        latents.append(euler(network(net, text, None, negative, GUIDANCE), noise, euler_grid(STEPS)))
    return torch.cat(latents)


def show_latents(model: Path, latents: Tensor) -> Shown:
    """Decode latents (N C T H W) with the VAE's own decoder."""
    vae = AutoencoderKLWan.from_pretrained(model / "vae").float().to(latents.device)
    channels_last(vae)
    clips = [((decode(vae, part) + 1) * 127.5).round().to(torch.uint8) for part in latents.split(POOL_BATCH)]
    return Shown(latents, torch.cat(clips).permute(0, 2, 3, 4, 1))


def make_network(seed: int) -> TinyNetwork:
    """Return a tiny decoder with new weights, through which activations keep their size.

    Blocks begin as shortcuts. With the usual weights, which are smaller, it learns much more slowly.
    """
    net, generator = TinyNetwork(LAYOUT), torch.Generator().manual_seed(seed)
    for name, tensor in net.named_parameters():
        if tensor.dim() == 1:
            nn.init.zeros_(tensor)
        else:
            nn.init.kaiming_normal_(tensor, nonlinearity="relu", generator=generator)
            if name.endswith("conv.4.weight") or name == "decoder.22.weight":
                tensor.data *= 0.1
    nn.init.constant_(net.get_parameter("decoder.22.bias"), 0.4)  # a grey picture
    return net


def decode_clips(net: TinyNetwork, latents: Tensor) -> Tensor:
    """Return clips (B F X Y 3), not clamped, of latents (B C T H W)."""
    net.reset_cache()
    clips: Tensor = net(latents.transpose(1, 2))[:, SURPLUS_FRAMES:]
    return clips


def tiny_loss(net: TinyNetwork, latents: Tensor, clips: Tensor) -> Tensor:
    """Return the weighted L1 + MSE to clips (B F X Y 3) uint8, as the VAE itself was trained."""
    wanted = clips / 127.5 - 1
    weight = object_weight(wanted.movedim(-1, 1)).movedim(1, -1)
    error = 2 * decode_clips(net, latents).float() - 1 - wanted
    return (weight * (error.abs() + error.square())).mean() / weight.mean()


def train_tiny(
    net: TinyNetwork, shown: Shown, *, seed: int, seconds: float, limit: int, batch: int, report: Callable[[str], None]
) -> None:
    """Train a decoder for `seconds` or `limit` iterations."""
    device = shown.latents.device
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as documented; the stub lacks it
    generator, adam = torch.Generator(device).manual_seed(seed), optimizer(net.parameters(), device, beta2=0.99)
    loss = torch.ones((), device=device)

    def step() -> Tensor:
        adam.zero_grad(set_to_none=True)
        index = torch.randint(len(shown.latents), (batch,), generator=generator, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
            value = tiny_loss(net, shown.latents[index], shown.clips[index])
        value.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        adam.step()
        loss.lerp_(value.detach(), 0.02)
        return value

    train(
        captured(step, generator), adam.param_groups[0]["lr"], RATE,
        seconds=seconds, limit=limit, report=lambda i: report(f"tiny decoder {i} loss {loss.item():.4f}"),
    )  # fmt: skip
    net.reset_cache()


@torch.no_grad()
def measure_psnr(net: TinyNetwork, shown: Shown) -> float:
    """Return the mean PSNR, in dB, of the clips to those of the VAE's own decoder."""
    pixels = (decode_clips(net, shown.latents).clamp(0, 1) * 255).round()
    error = (pixels - shown.clips).square().flatten(1).mean(dim=1)
    return float((10 * (255**2 / error).log10()).mean())


def main() -> None:
    """Make latents, train, measure on other latents, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("examples/nano/model"))
    parser.add_argument("--out", type=Path, help=f"default: {FILE} in the model's folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--clips", type=int, default=4096)
    parser.add_argument("--others", type=int, default=64, help="clips on which the result is measured")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--limit", type=int, default=10**9, help="iterations, to try the script")
    options = parser.parse_args()
    start, device = time.monotonic(), torch.device(options.device)

    def say(text: str) -> None:
        print(f"[{time.monotonic() - start:6.1f} s] {text}", flush=True)

    out, net = options.out or options.model / FILE, make_network(SEED)
    if out.exists():
        net.load_state_dict(load_file(out))
    net.to(device)
    shown = show_latents(options.model, make_latents(options.model, options.clips, device, seed=SEED))
    say(f"{options.clips} clips to learn from")
    train_tiny(net, shown, seed=SEED, seconds=options.seconds, limit=options.limit, batch=options.batch, report=say)
    save_file({name: tensor.half().contiguous() for name, tensor in net.state_dict().items()}, out)
    other = show_latents(options.model, make_latents(options.model, options.others, device, seed=SEED + 1))
    say(f"{measure_psnr(net, other):.2f} dB PSNR to the VAE's own decoder on {options.others} other clips")


if __name__ == "__main__":
    main()
