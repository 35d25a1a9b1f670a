"""The pixel half of `evaluate`: decodes some videos of every set, measures them and writes those that the report shows.

Reads OUT/contest.json and OUT/latents.zarr; writes OUT/pixels.json, OUT/videos/ and, with an I3D network,
OUT/i3d.safetensors. Shapes: B videos, F frames, X Y pixels, D features.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
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
from common.options import FULL_DECODER
from common.progress import ProgressBar
from common.video import FrameSize
from shards import latent_store
from shards.comparison import LATENTS_STORE, Comparison, latent_set_name, read_comparison
from shards.dataset import DataSet, open_data_set
from stage1_encode.decoders.load_decoder import check_decoder, use_decoder
from stage1_encode.generation.decode import read_finite_latents
from stage1_encode.media.video_writer import write_video
from stage1_encode.models import vae
from stage1_encode.video_metrics import clip_score, custom_judge, frame_metrics, i3d_features, pixel_test

PIXELS_FILE, FEATURES_FILE, VIDEOS_FOLDER = "pixels.json", "i3d.safetensors", "videos"
MAX_REPORT_WIDTH = 480  # pixels of a video in the report


@dataclass(frozen=True)
class EvaluationTools:
    """The loaded models and data; None = not asked for."""

    vae: vae.WanVae
    data: DataSet
    judge: custom_judge.Judge | None
    i3d: torch.jit.ScriptModule | None
    clip: clip_score.ClipScorer | None


@dataclass(frozen=True)
class SetResults:
    """What the tools say about one set of videos, one entry per video that has it."""

    psnr: list[float] = field(default_factory=list)  # of frame 0 to the given first frame, as the VAE decodes it
    motion: list[float] = field(default_factory=list)
    saturation: list[float] = field(default_factory=list)
    contrast: list[float] = field(default_factory=list)
    clip: list[float] = field(default_factory=list)
    answers: list[custom_judge.JudgeAnswers] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)  # (D)

    def add(self, tools: EvaluationTools, videos: Tensor, given: list[Tensor | None], prompts: list[str]) -> None:
        """Append what the tools say about videos (B F X Y 3) uint8 and their given first frames (X Y 3) uint8."""
        # a video without a given first frame is compared with itself, and its psnr dropped
        starts = [own if frame is None else frame for own, frame in zip(videos[:, 0], given, strict=True)]
        psnr = frame_metrics.psnr(videos[:, 0], torch.stack(starts)).tolist()
        self.psnr.extend(value for value, frame in zip(psnr, given, strict=True) if frame is not None)
        self.motion.extend(frame_metrics.frame_motion(videos).tolist())
        self.saturation.extend(frame_metrics.colour_saturation(videos).tolist())
        self.contrast.extend(frame_metrics.frame_contrast(videos).tolist())
        for video, prompt in zip(videos, prompts, strict=True):
            if tools.clip:
                self.clip.append(clip_score.clip_score(tools.clip, video.cpu().numpy(), prompt))
            if tools.i3d:
                self.features.append(i3d_features.extract_i3d_features(tools.i3d, video.cpu().numpy(), video.device))
        if tools.judge:
            self.answers.extend(tools.judge(videos, prompts))

    def summarize(self) -> dict[str, object]:
        """Return the mean of each metric, None if no video has it, and the share of true answers per question."""
        columns = {name: vars(self)[name] for name in ("psnr", "motion", "saturation", "contrast", "clip")}
        means = {name: fmean(values) if values else None for name, values in columns.items()}
        return means | {"answers": custom_judge.true_shares(self.answers)}


def load_tools(
    model: str,
    shards: str,
    device: str,
    *,
    judge: str | None,
    i3d_model: str | None,
    clip_model: str | None,
    decoder: str = FULL_DECODER,
) -> EvaluationTools:
    """Load the VAE, the data set and what else is asked for; ValueError for any that cannot be used."""
    check_decoder(decoder, model)
    folder, torch_device = locate_model(model, ("vae",)), pick_device(device)
    return EvaluationTools(
        use_decoder(vae.load_vae(folder, dtype=torch.float32, device=torch_device), decoder),
        open_data_set(shards),
        custom_judge.load_judge(judge) if judge else None,
        i3d_features.load_i3d(i3d_model, torch_device) if i3d_model else None,
        clip_score.load_clip(clip_model, torch_device) if clip_model else None,
    )


def measure_videos(
    out: Path,
    target: Path,
    tools: EvaluationTools,
    *,
    max_videos: int,
    report_videos: int,
    batch_size: int,
    tell_apart: pixel_test.TellApart | None,
) -> None:
    """Measure the first videos of every set of the comparison in `out`, and write the results into `target`.

    The videos of the first `report_videos` conditions and of the first seed are written for the report. `tell_apart`
    is the two-sample test of pixels; None = none.
    """
    comparison, store = read_comparison(out), out / LATENTS_STORE
    count = min(max_videos, comparison.count)
    report_names = [latent_set_name(candidate, comparison.seeds[0]) for candidate in comparison.contestants]
    size = latent_store.describe_group(store, report_names[0]).spec.frame_size
    first_frames = decode_first_frames(tools, size, count, batch_size)  # once, as every set starts from them
    test = pixel_test.open_pixel_test(comparison, tell_apart) if tell_apart else None
    names = sets_to_measure(comparison, references=tools.i3d is not None or test is not None)
    results = {name: SetResults() for name in names}
    with ProgressBar(count * len(results), label="measure videos") as progress:
        for name, result in results.items():
            windows, fps = [], latent_store.describe_group(store, name).spec.fps
            for start, videos, prompts in decode_set(tools.vae, store, name, count, batch_size):
                result.add(tools, videos, first_frames[start : start + len(videos)], prompts)
                if test:
                    windows.append(pixel_test.cut_window(videos))
                if name in report_names:
                    for row, video in enumerate(videos[: max(0, report_videos - start)], start=start):
                        write_report_video(target / VIDEOS_FOLDER / name / f"{row:03d}.mp4", video, fps=fps)
                progress.advance(count=len(videos))
            if test:
                test.add(name, windows)
    facts = {"videos": count, "shown": min(report_videos, count), "i3d": tools.i3d is not None}
    write_results(target, results, facts | {"told_apart": test.answers if test else {}})


def write_results(target: Path, results: Mapping[str, SetResults], facts: Mapping[str, object]) -> None:
    """Write the results of all sets, and the features of an I3D network: the distance between sets is the report's."""
    if facts["i3d"]:
        features = {name: torch.stack(result.features) for name, result in results.items()}
        write_file(target / FEATURES_FILE, save(features))
    sets = {name: result.summarize() for name, result in results.items()}
    write_file(target / PIXELS_FILE, (json.dumps({**facts, "sets": sets}, indent=1) + "\n").encode())


def decode_set(
    model: vae.WanVae, store: Path, name: str, count: int, batch_size: int
) -> Iterator[tuple[int, Tensor, list[str]]]:
    """Yield the first row, the videos (B F X Y 3) uint8 and the prompts of each batch of a set's first rows."""
    group = latent_store.describe_group(store, name)
    for start in range(0, count, batch_size):
        rows = range(start, min(start + batch_size, count))
        yield (
            start,
            decode_latents(model, read_finite_latents(store, group, rows)),
            list(group.prompts[start : rows.stop]),
        )


def sets_to_measure(comparison: Comparison, *, references: bool) -> list[str]:
    """Return the names of the sets, with the teacher's further seeds only if a distance needs these `references`.

    They come first, so that every other set can be compared as soon as it is decoded.
    """
    names = [latent_set_name(comparison.teacher, seed) for seed in comparison.references] if references else []
    names += [latent_set_name(candidate, seed) for candidate in comparison.contestants for seed in comparison.seeds]
    return list(dict.fromkeys(names))  # a reference may be one of the teacher's own seeds


def decode_latents(model: vae.WanVae, latents: Tensor) -> Tensor:
    """Return pixels (B F X Y 3) uint8 on the VAE's device of latents (B C T H W)."""
    if len(latents) > 1:
        return model.decoder.decode_batch(latents)
    return vae.decode_video(model, latents[0])[None].to(model.device)  # streamed, so that a large video fits


def decode_first_frames(tools: EvaluationTools, size: FrameSize, count: int, batch_size: int) -> list[Tensor | None]:
    """Return the given first frames (X Y 3) uint8 as the VAE decodes them; None for records without one."""
    (group,) = (one for one in tools.data.size_groups if one.spec.frame_size == size)
    latents = [tools.data.read_record(group.record_index(row)).first_frame for row in range(count)]
    present = [frame for frame in latents if frame is not None]
    batches = [present[start : start + batch_size] for start in range(0, len(present), batch_size)]
    pictures = (picture for batch in batches for picture in decode_latents(tools.vae, torch.stack(batch))[:, 0])
    return [None if frame is None else next(pictures) for frame in latents]


def write_report_video(path: Path, video: Tensor, *, fps: int) -> None:
    """Write a video (F X Y 3) uint8, scaled down to the report's width."""
    frames = video.cpu().numpy()
    height, width = frames.shape[1:3]
    if width > MAX_REPORT_WIDTH:
        size = (MAX_REPORT_WIDTH, round(height * MAX_REPORT_WIDTH / width / 2) * 2)  # H.264 needs even sizes
        frames = numpy.stack([numpy.asarray(Image.fromarray(frame).resize(size)) for frame in frames])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, frames, fps=fps)
