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

PIXELS_FILE, FEATURES_FILE, VIDEOS_FOLDER = "pixels.json", "i3d.safetensors", "videos"
MAX_REPORT_WIDTH = 480  # pixels of a video in the report


@dataclass(frozen=True)
class VideoEvalConfig:
    """What is to be measured, and with what."""

    out: str  # folder of the evaluation
    shards: str
    model: str
    videos: int
    report_videos: int
    analyser: str | None = None
    i3d: str | None = None
    clip: str | None = None
    device: str = "auto"
    batch_size: int = 1  # videos decoded at once


@dataclass(frozen=True)
class EvaluationTools:
    """Everything loaded."""

    vae: vae.WanVae
    data: DataSet
    judge: custom_judge.Judge | None
    i3d: torch.jit.ScriptModule | None
    clip: clip_score.ClipScorer | None


@dataclass(frozen=True)
class VideoMetrics:
    """One video's figures; None = does not apply or was not asked for."""

    psnr: float | None  # of frame 0 to the given first frame as the VAE shows it
    perceptual: float | None
    motion: float
    saturation: float
    contrast: float
    clip: float | None


def measure_videos(config: VideoEvalConfig) -> Path:
    """Look at the first videos of every set; the file of figures."""
    out = Path(config.out)
    comparison = read_comparison(out)
    tools = load_tools(config)
    metrics: dict[str, list[VideoMetrics]] = defaultdict(list)
    answers: dict[str, list[custom_judge.JudgeAnswers]] = defaultdict(list)
    features: dict[str, list[Tensor]] = defaultdict(list)
    count = min(config.videos, comparison.count)
    first_frame_pixels = decode_first_frames(tools, count, config.batch_size)
    names = sets_to_measure(comparison, references=config.i3d is not None)
    with ProgressBar(count * len(names), label="look at videos") as progress:
        for name in names:
            group = latent_store.describe_group(out / LATENTS_STORE, name)
            for start in range(0, count, config.batch_size):
                rows = range(start, min(start + config.batch_size, count))
                prompts = [group.prompts[row] for row in rows]
                videos = decode_rows(tools.vae, out / LATENTS_STORE, name, rows)
                metrics[name] += measure_frames(tools, videos, first_frame_pixels[rows.start : rows.stop], prompts)
                if tools.judge:
                    answers[name] += tools.judge(videos, prompts)
                if tools.i3d:
                    features[name] += [
                        i3d_features.extract_i3d_features(tools.i3d, video.cpu().numpy(), tools.vae.device)
                        for video in videos
                    ]
                for row in rows if name in first_seed_sets(comparison) else ():
                    if row < config.report_videos:
                        pixels = videos[row - start].cpu().numpy()
                        write_report_video(out / VIDEOS_FOLDER / name / f"{row:03d}.mp4", pixels, fps=group.spec.fps)
                progress.advance(count=len(rows))
    if features:
        write_file(out / FEATURES_FILE, save({name: torch.stack(parts) for name, parts in features.items()}))
    summaries = {
        name: summarize_metrics(metrics[name]) | {"answers": custom_judge.true_shares(answers[name])} for name in names
    }
    facts = {"videos": count, "shown": min(config.report_videos, count), "i3d": bool(features), "sets": summaries}
    write_file(out / PIXELS_FILE, (json.dumps(facts, indent=1) + "\n").encode())
    return out / PIXELS_FILE


def load_tools(config: VideoEvalConfig) -> EvaluationTools:
    """Load the VAE and what else was asked for; the user's mistakes come out before any work."""
    device = pick_device(config.device)
    return EvaluationTools(
        vae.load_vae(locate_model(config.model, ("vae",)), dtype=torch.float32, device=device),
        open_data_set(config.shards),
        custom_judge.load_judge(config.analyser) if config.analyser else None,
        i3d_features.load_i3d(config.i3d, device) if config.i3d else None,
        clip_score.load_clip(config.clip, device) if config.clip else None,
    )


def first_seed_sets(comparison: Comparison) -> list[str]:
    """Each contestant's set of the first seed: the videos that are shown."""
    return [latent_set_name(candidate, comparison.seeds[0]) for candidate in comparison.contestants]


def sets_to_measure(comparison: Comparison, *, references: bool) -> list[str]:
    """The sets to look at; the teacher's further references only where a distance needs them."""
    names = [latent_set_name(candidate, seed) for candidate in comparison.contestants for seed in comparison.seeds]
    reference_names = (
        [latent_set_name(comparison.teacher, seed) for seed in comparison.references] if references else []
    )
    return list(dict.fromkeys([*names, *reference_names]))


def decode_rows(model: vae.WanVae, store: Path, name: str, rows: range) -> Tensor:
    """Decode rows of a set (B F X Y 3) uint8 on the VAE's device; ValueError where its latents are damaged."""
    latent_rows = latent_store.read_latent_rows(store, name, rows.start, rows.stop)
    if not torch.isfinite(latent_rows).all():
        raise ValueError(f"latents={store}: {name}, one of the rows {rows.start} to {rows.stop - 1} is not finite")
    return decode_latents(model, latent_rows)


def decode_latents(model: vae.WanVae, latent_rows: Tensor) -> Tensor:
    """Pixels (B F X Y 3) of latents (B C T H W): one large video by the decoder made for those, or all at once."""
    return (
        vae.decode_video_batch(model, latent_rows)
        if len(latent_rows) > 1
        else vae.decode_video(model, latent_rows[0])[None].to(model.device)
    )


def decode_first_frames(tools: EvaluationTools, count: int, batch: int) -> list[Tensor | None]:
    """The given first frames (X Y 3) uint8 as the VAE shows them; None where there is none."""
    first_frame_latents = [tools.data.read_record(row).first_frame for row in range(count)]
    present = [frame for frame in first_frame_latents if frame is not None]
    parts = [decode_latents(tools.vae, torch.stack(present[i : i + batch])) for i in range(0, len(present), batch)]
    pictures = (picture for part in parts for picture in part[:, 0])
    return [None if frame is None else next(pictures) for frame in first_frame_latents]


def measure_frames(
    tools: EvaluationTools, videos: Tensor, first_frame_pixels: list[Tensor | None], prompts: list[str]
) -> list[VideoMetrics]:
    """Measure videos (B F X Y 3) uint8, of which `given` are the first frames."""
    frames = videos[:, 0]
    pictures = torch.stack(
        [start if column is None else column for start, column in zip(frames, first_frame_pixels, strict=True)]
    )
    columns = (
        frame_metrics.psnr(frames, pictures),
        frame_metrics.perceptual_distance(frames, pictures),
        frame_metrics.frame_motion(videos),
        frame_metrics.colour_saturation(videos),
        frame_metrics.frame_contrast(videos),
    )
    metrics = []
    for index, (psnr, perceptual, *pixel_metrics) in enumerate(
        zip(*(column.tolist() for column in columns), strict=True)
    ):
        score = clip_score.clip_score(tools.clip, videos[index].cpu().numpy(), prompts[index]) if tools.clip else None
        has_first_frame = first_frame_pixels[index] is not None
        motion, saturation, contrast = pixel_metrics
        fidelity = (psnr, perceptual) if has_first_frame else (None, None)
        metrics.append(VideoMetrics(fidelity[0], fidelity[1], motion, saturation, contrast, score))
    return metrics


def summarize_metrics(metrics: list[VideoMetrics]) -> dict[str, object]:
    """Means over the videos of a set; None where no video has the figure."""
    columns = {
        name: [vars(metric)[name] for metric in metrics if vars(metric)[name] is not None] for name in vars(metrics[0])
    }
    return {name: fmean(values) if values else None for name, values in columns.items()}


def write_report_video(path: Path, video: numpy.ndarray, *, fps: int) -> None:
    """Write a video, made smaller where it is wide."""
    height, width = video.shape[1:3]
    if width > MAX_REPORT_WIDTH:
        size = (MAX_REPORT_WIDTH, round(height * MAX_REPORT_WIDTH / width / 2) * 2)
        video = numpy.stack([numpy.asarray(Image.fromarray(frame).resize(size)) for frame in video])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, video, fps=fps)
