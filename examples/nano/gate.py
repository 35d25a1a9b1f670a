"""The gate: is the teacher good, and is there something to distil? Shapes: N clips, C T H W latents."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor

from examples.nano.analyse import score
from examples.nano.captions import Asked, captions, parse
from examples.nano.render import render, to_network, to_pixels
from examples.nano.sample import LADDER, euler, euler_grid, network, renoise
from examples.nano.vae import decode, encode
from examples.nano.world import draw_scenes
from stage2_distill.evaluation.feature_maps import latent_features
from stage2_distill.evaluation.latent_metrics import frechet_distance

CONDITIONS_SEED = 4242
KINDS = ("teacher 50", "teacher 50 again", "teacher 4", "undistilled 4")


@dataclass(frozen=True)
class Conditions:
    """The conditions of the gate's samples, and the true clips."""

    first: Tensor  # (N C 1 H W)
    text: Tensor  # (N L D) compact
    negative: Tensor  # (1 L D)
    real: Tensor  # (N C T H W) latents of the true clips
    asked: Sequence[Sequence[Asked]]  # N prompts, parsed


def make_conditions(
    vae: AutoencoderKLWan, embed: Callable[[list[str]], Tensor], negative: Tensor, count: int, batch: int
) -> Conditions:
    """Make `count` held-out conditions; the device is the negative embedding's (1 L D)."""
    device = negative.device
    prompts: list[str] = []
    latents, texts = [], []
    for start in range(0, count, batch):
        index = torch.arange(start, min(start + batch, count), device=device)
        scenes = draw_scenes(CONDITIONS_SEED, index, held=True)
        words = captions(scenes)
        prompts += words
        texts.append(embed(words))
        latents.append(encode(vae, to_network(render(scenes))))
    real = torch.cat(latents)
    return Conditions(real[:, :, :1], torch.cat(texts), negative, real, [parse(p) for p in prompts])


def few(c: Conditions, count: int) -> Conditions:
    """Return the first `count` conditions."""
    return Conditions(c.first[:count], c.text[:count], c.negative, c.real[:count], c.asked[:count])


def generate(
    net: WanTransformer3DModel, c: Conditions, kind: str, *, seed: int, scale: float, steps: int, batch: int
) -> Tensor:
    """Return latents (N C T H W) of one kind of sampling for all conditions."""
    device = c.real.device
    generator = torch.Generator(device).manual_seed(1000 * seed + KINDS.index(kind))
    out = []
    for start in range(0, len(c.real), batch):
        rows = slice(start, start + batch)
        guidance = 1.0 if kind == "undistilled 4" else scale  # a student has no guidance
        x0 = network(net, c.text[rows], c.first[rows], c.negative, guidance)
        noise = torch.randn(c.real[rows].shape, generator=generator, device=device)
        if kind == "undistilled 4":
            out.append(renoise(x0, noise, list(LADDER), generator))
        else:
            out.append(euler(x0, noise, list(LADDER) if kind == "teacher 4" else euler_grid(steps)))
    return torch.cat(out)


def pixels(vae: AutoencoderKLWan, latents: Tensor, batch: int) -> Tensor:
    """Return uint8 clips (N T H W 3)."""
    return torch.cat([to_pixels(decode(vae, part)) for part in latents.split(batch)])


def distances(
    net: WanTransformer3DModel, c: Conditions, *, seed: int, scale: float, steps: int, batch: int
) -> dict[str, float]:
    """Return the floor and, for true clips and both 4-step baselines, the distance to the teacher, for one seed."""
    sets = {
        kind: latent_features(generate(net, c, kind, seed=seed, scale=scale, steps=steps, batch=batch))
        for kind in KINDS
    }
    teacher = sets["teacher 50"]
    floor = frechet_distance(teacher, sets["teacher 50 again"])
    rest = {"real": latent_features(c.real), "teacher 4": sets["teacher 4"], "undistilled 4": sets["undistilled 4"]}
    return {"floor": floor} | {name: frechet_distance(teacher, values) for name, values in rest.items()}


def answers(
    net: WanTransformer3DModel, vae: AutoencoderKLWan, c: Conditions, *, scale: float, steps: int, batch: int
) -> dict[str, dict[str, float]]:
    """Return the analyser's shares for the true clips through the VAE and for each kind of sampling."""
    rows = {"real, through the VAE": score(pixels(vae, c.real, 64), c.asked)}
    for kind in KINDS:
        if kind != "teacher 50 again":
            latents = generate(net, c, kind, seed=0, scale=scale, steps=steps, batch=batch)
            rows[kind] = score(pixels(vae, latents, 64), c.asked)
    return rows


def table(per_seed: list[dict[str, float]], shares: dict[str, dict[str, float]]) -> str:
    """Return a Markdown report of the gate."""
    floor = mean(row["floor"] for row in per_seed)
    lines = ["| set | distance to teacher 50 (mean, sd of seeds) | times the floor |", "|---|---|---|"]
    for name in per_seed[0]:
        values = [row[name] for row in per_seed]
        spread = stdev(values) if len(values) > 1 else 0.0
        lines.append(f"| {name} | {mean(values):.4g} ± {spread:.2g} | {mean(values) / floor:.1f} |")
    lines += ["", "| set | colour | shape | motion | valid |", "|---|---|---|---|---|"]
    for name, row in shares.items():
        lines.append(
            f"| {name} | {row['colour']:.3f} | {row['shape']:.3f} | {row['motion']:.3f} | {row['valid']:.3f} |"
        )
    return "\n".join(lines)
