"""The `evaluate` command: latents and report of stage two, measurements of videos of stage one."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from common.device import pick_device
from common.files import LOCK_FILE, UNFINISHED_FOLDER, refuse_foreign_files, staged_output
from common.model_folder import locate_model
from shards.comparison import COMPARISON_FILE, LATENTS_STORE, Comparison, write_comparison
from stage1_encode.models.vae import load_vae
from stage1_encode.video_metrics.evaluate_videos import EvaluationTools, load_tools, measure_videos
from stage1_encode.video_metrics.true_clips import TRUE_CLIPS, check_clips, encode_true_clips
from stage2_distill.distributed.process_group import join_ranks, own_folder, wait_for_ranks
from stage2_distill.evaluation.compare import EvaluationSetup, list_record_sizes, open_evaluation, sample_comparison
from stage2_distill.evaluation.config import EvaluateConfig
from stage2_distill.evaluation.latent_metrics import MIN_TESTED
from stage2_distill.evaluation.report import EVALUATION_CONFIG_FILE, PAGE_FILE, write_report
from stage2_distill.evaluation.selection import (
    RankedCheckpoint,
    check_run,
    rank_checkpoints,
    write_best_checkpoint,
)
from stage2_distill.evaluation.size_report import write_size_report
from stage2_distill.evaluation.two_sample import tell_pixels_apart

SIZE_FOLDER = re.compile(r"\d+x\d+")  # of an evaluation of several sizes


def evaluate_students(config: EvaluateConfig) -> Path:
    """Sample all candidates (stage two), measure their videos (stage one), report (stage two); returns the page.

    Several sizes are compared one after the other, in folders of their names, and their figures put side by side.
    Under torchrun the processes share the sampling, and the first one does the rest.
    """
    rank, _ = join_ranks(config.device)
    if rank == 0:
        check_output(Path(config.out))
    if config.select:
        check_run(config.checkpoint[0])
    sizes, out = list_record_sizes(config), Path(config.out)
    if config.videos and rank == 0:
        open_tools(config)  # and let go: mistakes show before hours of sampling, which need the memory
    if len(sizes) == 1:
        return evaluate_size(config, rank, select=config.select)
    with own_folder(out):
        parts = {size: replace(config, size=str(size), out=str(out / str(size))) for size in sizes}
        if config.select:  # on all sizes, before the chosen one is compared on any
            rankings = [rank_size(part) for part in parts.values()]
            write_best_checkpoint(Path(config.checkpoint[0]), rankings, rank)
        pages = {size: evaluate_size(part, rank, select=False) for size, part in parts.items()}
        if rank == 0:
            write_size_report(config, pages)
        wait_for_ranks()
    return out / PAGE_FILE


def check_output(out: Path) -> None:
    """Raise ValueError for an output that is a file, or a folder of files that no evaluation wrote."""
    marks = (EVALUATION_CONFIG_FILE, COMPARISON_FILE, LATENTS_STORE, LOCK_FILE, UNFINISHED_FOLDER)
    if not any((out / name).exists() for name in marks):
        refuse_foreign_files(out, lambda name: SIZE_FOLDER.fullmatch(name) is not None)


def open_tools(config: EvaluateConfig) -> EvaluationTools:
    """Load what decodes and measures videos."""
    return load_tools(config.model, config.shards, config.device,
                      judge=config.judge, i3d_model=config.i3d_model, clip_model=config.clip_model,
                      decoder=config.decoder)  # fmt: skip


def rank_size(config: EvaluateConfig) -> dict[str, RankedCheckpoint]:
    """Rank the checkpoints of the run on records of one size."""
    setting = open_evaluation(config)
    with own_folder(Path(config.out)):
        return rank_checkpoints(setting)


def evaluate_size(config: EvaluateConfig, rank: int, *, select: bool) -> Path:
    """Compare on records of one size, after the choice of the best checkpoint on them if `select`; returns the page."""
    setting, out = open_evaluation(config), Path(config.out)
    with own_folder(out):
        if select:
            write_best_checkpoint(Path(config.checkpoint[0]), [rank_checkpoints(setting)], rank)
        if config.true_clips:  # mistakes show before hours of sampling
            check_clips(Path(config.true_clips), setting.records, setting.facts.spec)
        comparison = sample_comparison(setting)
        if config.true_clips and rank == 0:
            add_true_clips(setting, comparison)
        if config.videos and rank == 0:
            with staged_output(out) as staging:
                measure_videos(out, staging, open_tools(config), max_videos=config.videos,
                               report_videos=config.report_videos, batch_size=config.batch_size,
                               tell_apart=pixel_test_of(config, len(setting.records)))  # fmt: skip
        return write_report(config) if rank == 0 else out / PAGE_FILE


def add_true_clips(setting: EvaluationSetup, comparison: Comparison) -> None:
    """Encode the whole clips of the conditions (stage one), and add them to the comparison as its last row."""
    config = setting.config
    model = load_vae(locate_model(config.model, ("vae",)), dtype=torch.float32, device=pick_device(config.device))
    encode_true_clips(model, setting.store, Path(str(config.true_clips)), setting.records, setting.facts.spec,
                      seeds=comparison.seeds, batch_size=config.batch_size)  # fmt: skip
    contestants = (*comparison.contestants, TRUE_CLIPS)
    write_comparison(Path(config.out), replace(comparison, contestants=contestants))


def pixel_test_of(
    config: EvaluateConfig, count: int
) -> Callable[[Tensor, Tensor, int], tuple[float, float, float]] | None:
    """The two-sample test of decoded videos, of stage two; None if there are too few videos."""
    if min(config.videos, count) < MIN_TESTED:
        return None
    return partial(tell_pixels_apart, device=str(pick_device(config.device)))
