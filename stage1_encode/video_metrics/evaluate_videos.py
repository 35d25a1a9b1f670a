"""The pixel half of `evaluate`: decode some videos of every set, look at them, write those that the report shows.

Shapes: B videos, F frames, X Y pixels. It reads OUT/contest.json and OUT/latents.zarr, and writes OUT/pixels.json,
OUT/videos/ and, with an I3D network, OUT/i3d.safetensors.
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
from common.files import write_file
from common.model_folder import locate_model
from common.progress import ProgressBar
from shards import latent_store
from shards.comparison import LATENTS_STORE, Comparison, latent_set_name, read_comparison
from shards.dataset import DataSet, open_data_set
from stage1_encode.media.video_writer import write_video
from stage1_encode.models import vae
from stage1_encode.video_metrics import clip_score, custom_judge, frame_metrics, i3d_features

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
    batch_size: int = 1  # videos decoded at once


@dataclass(frozen=True)
class Tools:
    """Everything loaded."""

    vae: vae.Vae
    data: DataSet
    judge: custom_judge.Judge | None
    i3d: torch.jit.ScriptModule | None
    clip: clip_score.Clip | None


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
    contest = read_comparison(out)
    tools = open_tools(looks)
    found: dict[str, list[Look]] = defaultdict(list)
    answers: dict[str, list[custom_judge.Answers]] = defaultdict(list)
    seen: dict[str, list[Tensor]] = defaultdict(list)
    count = min(looks.videos, contest.count)
    given = first_frames(tools, count, looks.batch_size)
    names = wanted_sets(contest, references=looks.i3d is not None)
    with ProgressBar(count * len(names), label="look at videos") as progress:
        for name in names:
            group = latent_store.describe_group(out / LATENTS_STORE, name)
            for start in range(0, count, looks.batch_size):
                rows = range(start, min(start + looks.batch_size, count))
                prompts = [group.prompts[row] for row in rows]
                videos = read_videos(tools.vae, out / LATENTS_STORE, name, rows)
                found[name] += look(tools, videos, given[rows.start : rows.stop], prompts)
                if tools.judge:
                    answers[name] += tools.judge(videos, prompts)
                if tools.i3d:
                    seen[name] += [
                        i3d_features.features(tools.i3d, one.cpu().numpy(), tools.vae.device) for one in videos
                    ]
                for row in rows if name in first_sets(contest) else ():
                    if row < looks.shown:
                        show = videos[row - start].cpu().numpy()
                        write_shown(out / VIDEOS / name / f"{row:03d}.mp4", show, fps=group.spec.fps)
                progress.advance(count=len(rows))
    if seen:
        write_file(out / FEATURES, save({name: torch.stack(parts) for name, parts in seen.items()}))
    sums = {name: summary(found[name]) | {"answers": custom_judge.shares(answers[name])} for name in names}
    facts = {"videos": count, "shown": min(looks.shown, count), "i3d": bool(seen), "sets": sums}
    write_file(out / PIXELS, (json.dumps(facts, indent=1) + "\n").encode())
    return out / PIXELS


def open_tools(looks: Looks) -> Tools:
    """Load the VAE and what else was asked for; the user's mistakes come out before any work."""
    device = pick_device(looks.device)
    return Tools(
        vae.load(locate_model(looks.model, ("vae",)), dtype=torch.float32, device=device),
        open_data_set(looks.shards),
        custom_judge.load(looks.analyser) if looks.analyser else None,
        i3d_features.load(looks.i3d, device) if looks.i3d else None,
        clip_score.load(looks.clip, device) if looks.clip else None,
    )


def first_sets(contest: Comparison) -> list[str]:
    """Each contestant's set of the first seed: the videos that are shown."""
    return [latent_set_name(contestant, contest.seeds[0]) for contestant in contest.contestants]


def wanted_sets(contest: Comparison, *, references: bool) -> list[str]:
    """The sets to look at; the teacher's further references only where a distance needs them."""
    names = [latent_set_name(contestant, seed) for contestant in contest.contestants for seed in contest.seeds]
    further = [latent_set_name(contest.teacher, seed) for seed in contest.references] if references else []
    return list(dict.fromkeys([*names, *further]))


def read_videos(model: vae.Vae, store: Path, name: str, rows: range) -> Tensor:
    """Decode rows of a set (B F X Y 3) uint8 on the VAE's device; ValueError where its latents are damaged."""
    read = latent_store.read_latent_rows(store, name, rows.start, rows.stop)
    if not torch.isfinite(read).all():
        raise ValueError(f"latents={store}: {name}, one of the rows {rows.start} to {rows.stop - 1} is not finite")
    return decode(model, read)


def decode(model: vae.Vae, read: Tensor) -> Tensor:
    """Pixels (B F X Y 3) of latents (B C T H W): one large video by the decoder made for those, or all at once."""
    return vae.decode_videos(model, read) if len(read) > 1 else vae.decode_video(model, read[0])[None].to(model.device)


def first_frames(tools: Tools, count: int, batch: int) -> list[Tensor | None]:
    """The given first frames (X Y 3) uint8 as the VAE shows them; None where there is none."""
    given = [tools.data.record(row).first_frame for row in range(count)]
    there = [frame for frame in given if frame is not None]
    parts = [decode(tools.vae, torch.stack(there[i : i + batch])) for i in range(0, len(there), batch)]
    pictures = (picture for part in parts for picture in part[:, 0])
    return [None if frame is None else next(pictures) for frame in given]


def look(tools: Tools, videos: Tensor, given: list[Tensor | None], prompts: list[str]) -> list[Look]:
    """Measure videos (B F X Y 3) uint8, of which `given` are the first frames."""
    starts = videos[:, 0]
    pictures = torch.stack([start if one is None else one for start, one in zip(starts, given, strict=True)])
    found = (
        frame_metrics.psnr(starts, pictures),
        frame_metrics.perceptual(starts, pictures),
        frame_metrics.motion(videos),
        frame_metrics.saturation(videos),
        frame_metrics.contrast(videos),
    )
    looks = []
    for place, (psnr, perceptual, *rest) in enumerate(zip(*(one.tolist() for one in found), strict=True)):
        score = clip_score.score(tools.clip, videos[place].cpu().numpy(), prompts[place]) if tools.clip else None
        known = given[place] is not None
        motion, saturation, contrast = rest
        same = (psnr, perceptual) if known else (None, None)
        looks.append(Look(same[0], same[1], motion, saturation, contrast, score))
    return looks


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
