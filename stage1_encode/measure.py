"""The pixel half of `evaluate`: decode some videos of every set, look at them, write those that the report shows.

Shapes: F frames, X Y pixels. It reads OUT/contest.json and OUT/latents.zarr, and writes OUT/pixels.json, OUT/videos/
and, with an I3D network, OUT/i3d.safetensors.
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from common.device import pick_device
from common.progress import Progress
from shards import latents
from shards.contest import LATENTS, Contest, read_contest, set_name
from shards.fingerprint import locate
from shards.manifest import write_file
from shards.read import DataSet, open_data_set
from stage1_encode import analyser, appearance, clip, i3d, vae
from stage1_encode.decode import read_pixels
from stage1_encode.mp4 import write_video

PIXELS, FEATURES, VIDEOS = "pixels.json", "i3d.safetensors", "videos"
WIDEST = 480  # pixels of a video in the report


@dataclass(frozen=True)
class Looks:
    """What is to be measured, and with what."""

    out: str  # folder of the evaluation
    shards: str
    model: str
    videos: int
    shown: int
    analyser: str | None = None
    i3d: str | None = None
    clip: str | None = None
    device: str = "auto"


@dataclass(frozen=True)
class Tools:
    """Everything loaded."""

    vae: vae.Vae
    data: DataSet
    judge: analyser.Judge | None
    i3d: torch.jit.ScriptModule | None
    clip: clip.Clip | None


@dataclass(frozen=True)
class Look:
    """One video's figures; None = does not apply or was not asked for."""

    psnr: float | None  # of frame 0 to the given first frame as the VAE shows it
    perceptual: float | None
    motion: float
    saturation: float
    contrast: float
    clip: float | None


def measure(looks: Looks) -> Path:
    """Look at the first videos of every set; the file of figures."""
    out = Path(looks.out)
    contest = read_contest(out)
    tools = open_tools(looks)
    found: dict[str, list[Look]] = defaultdict(list)
    answers: dict[str, list[analyser.Answers]] = defaultdict(list)
    seen: dict[str, list[Tensor]] = defaultdict(list)
    count = min(looks.videos, contest.count)
    names = wanted_sets(contest, references=looks.i3d is not None)
    with Progress(count * len(names), label="look at videos") as progress:
        for name in names:
            group = latents.describe(out / LATENTS, name)
            for row in range(count):
                video = read_pixels(tools.vae, out / LATENTS, group, row)
                found[name].append(look(tools, video, row, group.prompts[row]))
                if tools.judge:
                    answers[name].append(tools.judge(video, group.prompts[row]))
                if tools.i3d:
                    seen[name].append(i3d.features(tools.i3d, video, tools.vae.device))
                if row < looks.shown and name in first_sets(contest):
                    write_shown(out / VIDEOS / name / f"{row:03d}.mp4", video, fps=group.spec.fps)
                progress.advance()
    if seen:
        write_file(out / FEATURES, save({name: torch.stack(parts) for name, parts in seen.items()}))
    sums = {name: summary(found[name]) | {"answers": analyser.shares(answers[name])} for name in names}
    facts = {"videos": count, "shown": min(looks.shown, count), "i3d": bool(seen), "sets": sums}
    write_file(out / PIXELS, (json.dumps(facts, indent=1) + "\n").encode())
    return out / PIXELS


def open_tools(looks: Looks) -> Tools:
    """Load the VAE and what else was asked for; the user's mistakes come out before any work."""
    device = pick_device(looks.device)
    return Tools(
        vae.load(locate(looks.model, ("vae",)), dtype=torch.float32, device=device),
        open_data_set(looks.shards),
        analyser.load(looks.analyser) if looks.analyser else None,
        i3d.load(looks.i3d, device) if looks.i3d else None,
        clip.load(looks.clip, device) if looks.clip else None,
    )


def first_sets(contest: Contest) -> list[str]:
    """Each contestant's set of the first seed: the videos that are shown."""
    return [set_name(contestant, contest.seeds[0]) for contestant in contest.contestants]


def wanted_sets(contest: Contest, *, references: bool) -> list[str]:
    """The sets to look at; the teacher's further references only where a distance needs them."""
    names = [set_name(contestant, seed) for contestant in contest.contestants for seed in contest.seeds]
    further = [set_name(contest.teacher, seed) for seed in contest.references] if references else []
    return list(dict.fromkeys([*names, *further]))


def look(tools: Tools, video: numpy.ndarray, row: int, prompt: str) -> Look:
    """Measure one video (F X Y 3) uint8."""
    given = tools.data.record(row).first_frame
    picture = None if given is None else vae.decode_video(tools.vae, given).numpy()[0]
    return Look(
        None if picture is None else appearance.psnr(video[0], picture),
        None if picture is None else appearance.perceptual(video[0], picture),
        appearance.motion(video),
        appearance.saturation(video),
        appearance.contrast(video),
        clip.score(tools.clip, video, prompt) if tools.clip else None,
    )


def summary(found: list[Look]) -> dict[str, object]:
    """Means over the videos of a set; None where no video has the figure."""
    columns = {name: [vars(one)[name] for one in found if vars(one)[name] is not None] for name in vars(found[0])}
    return {name: fmean(values) if values else None for name, values in columns.items()}


def write_shown(path: Path, video: numpy.ndarray, *, fps: int) -> None:
    """Write a video, made smaller where it is wide."""
    height, width = video.shape[1:3]
    if width > WIDEST:
        size = (WIDEST, round(height * WIDEST / width / 2) * 2)
        video = numpy.stack([numpy.asarray(Image.fromarray(frame).resize(size)) for frame in video])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, video, fps=fps)
