"""How small a change the two-sample test finds, by the number of clips: a change of contrast of true clips.

    python -m examples.nano.power --counts 512 2048 8192 --device cuda

A set must stay at 0.5 within the interval, and be found where its free frames have a little more contrast: where the
interval lies above 0.5. It is tested against the same clips, and against other ones, whose content differs by chance.
Prints a Markdown table for latents, whitened and not.
Shapes: N clips, C channels, T latent frames, H W latent size.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from examples.nano.render import render, to_network
from examples.nano.vae import encode
from examples.nano.world import draw_scenes
from stage2_distill.evaluation.two_sample import Accuracy, default_settings, two_sample_accuracy

CLIPS_SEED = 9000  # of scenes that nothing else uses
BATCH = 64  # clips encoded at once
KINDS = {"whitened": True, "plain": False}


def encode_clips(vae: AutoencoderKLWan, device: torch.device, first: int, count: int) -> Tensor:
    """Latents (N C T H W) on the CPU of true clips with the indices first, first + 1 and so on."""
    parts = []
    for start in range(first, first + count, BATCH):
        index = torch.arange(start, min(start + BATCH, first + count), device=device)
        parts.append(encode(vae, to_network(render(draw_scenes(CLIPS_SEED, index, held=True)))).cpu())
    return torch.cat(parts)


def change_contrast(latents: Tensor, factor: float) -> Tensor:
    """Latents (N C T H W) whose free frames are scaled; the first frame is given, so no student can change it."""
    changed = latents.clone()
    changed[:, :, 1:] *= factor
    return changed


def table_rows(
    sets: dict[str, Tensor], counts: Sequence[int], contrasts: Sequence[float], device: str, seeds: Sequence[int]
) -> Iterator[str]:
    """Rows of the table as they are made; the changed clips are those of the first set, contrast 1 = no change."""
    yield "| clips | against | test | " + " | ".join(f"contrast {factor:g}" for factor in contrasts) + " |"
    yield "|---" * (3 + len(contrasts)) + "|"
    base, changed = default_settings(device), next(iter(sets.values()))
    for count, (name, reference), (kind, whiten) in product(counts, sets.items(), KINDS.items()):
        settings, test = replace(base, whiten=whiten), {"seeds": seeds, "device": device}
        found = [
            two_sample_accuracy(change_contrast(changed[:count], factor), reference[:count], settings=settings, **test)
            for factor in contrasts
        ]
        yield f"| {count} | {name} | {kind} | " + " | ".join(map(format_accuracy, found)) + " |"


def format_accuracy(accuracy: Accuracy) -> str:
    """The accuracy with its interval; bold if the change is found."""
    text = f"{accuracy.mean:.3f} [{accuracy.low:.3f}, {accuracy.high:.3f}]"
    return f"**{text}**" if accuracy.low > 0.5 else text


def main() -> None:
    """Encode the clips and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("examples/nano/model"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--counts", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--contrasts", type=float, nargs="+", default=[1.0, 1.01, 1.02, 1.05])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of the classifier")
    args = parser.parse_args()
    device, count = torch.device(args.device), max(args.counts)
    vae = AutoencoderKLWan.from_pretrained(args.model / "vae").to(device)
    starts = {"the same clips": 0, "other clips": count}
    sets = {name: encode_clips(vae, device, start, count) for name, start in starts.items()}
    for row in table_rows(sets, args.counts, args.contrasts, args.device, args.seeds):
        print(row, flush=True)


if __name__ == "__main__":
    main()
