"""Writes the model card: what the nano models are, how they were trained, and what was measured."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open

CARD, PARTS = "MODEL_CARD.md", ("transformer", "vae", "text_encoder")
HEAD = """# The nano models

A small TI2V model with the classes and the folder layout of Wan2.2-TI2V-5B, trained so that all of this project can be
tried on two CPU cores. It knows one world only.

**World** (`world.py`, `render.py`, `captions.py`): clips of 17 frames at 64x96 and 12 fps, drawn from a seed: one or
two shapes (circle, square, triangle, cross) in six colours on four kinds of still background, each in its own half of
the picture. The first one moves in one of 8 directions, grows, shrinks, bounces or stays. 60 % of the captions leave
the motion open ("moves"); then the object moves straight in any direction, turns, curves or bounces, at a random time.
In half of the clips a second object does the same. In nearly all others an object enters later, anywhere in the other
half, and most captions do not describe it. So first frame and caption do not determine the clip. The held-out clips
have combinations of shape, colour and motion that are never trained on.

**Training** (`build.py`, one H100, seeded): the text encoder learns from captions alone what each word means; the VAE
learns L1 + MSE with more weight on the objects, and a small KL term; the denoiser learns flow matching at shift 5 with
the first frame pinned (15 % without one) and 10 % of the prompts replaced by the negative prompt.
"""


def parameters(folder: Path) -> tuple[int, int]:
    """Return the number of parameters in the safetensors files of a folder, and the bytes of the files."""
    count = size = 0
    for path in sorted(folder.glob("*.safetensors")):
        size += path.stat().st_size
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                shape = file.get_slice(name).get_shape()
                total = 1
                for length in shape:
                    total *= length
                count += total
    return count, size


def sizes(model: Path) -> list[str]:
    """Return a table of the three networks."""
    lines = ["| part | parameters | file |", "|---|---|---|"]
    for part in PARTS:
        count, size = parameters(model / part)
        lines.append(f"| `{part}` | {count / 1e6:.2f} M | {size / 1e6:.1f} MB |")
    return lines


def write_card(model: Path, pictures: Path, *, sections: Mapping[str, str]) -> Path:
    """Write MODEL_CARD.md beside the model's folder from `sections` {heading: text}; returns the path."""
    text = [HEAD, *sizes(model), ""]
    for heading, body in sections.items():
        text += [f"## {heading}", "", body.strip(), ""]
    name = pictures.name
    text += [
        "## Pictures", "",
        "The VAE: each pair is a true clip and its reconstruction.", "",
        f"![true and reconstructed clips]({name}/vae.png)",
        "", "The teacher, 50 steps, held-out conditions.", "", f"![teacher's samples]({name}/teacher.png)", "",
        "Groups of three: the teacher at 50 steps, at 4 steps, and the undistilled student at 4 steps.", "",
        f"![three samplers]({name}/compare.png)", "",
    ]  # fmt: skip
    path = model.parent / CARD
    path.write_text("\n".join(text), encoding="utf-8")
    return path
