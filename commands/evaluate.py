"""The `evaluate` command: latents and report of stage two, measurements of videos of stage one."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from common.files import staged_output
from stage1_encode.video_metrics.evaluate_videos import load_tools, measure_videos
from stage2_distill.distributed.process_group import join_ranks, own_folder, wait_for_ranks
from stage2_distill.evaluation.compare import list_record_sizes, open_evaluation, sample_comparison
from stage2_distill.evaluation.config import EvaluateConfig
from stage2_distill.evaluation.report import PAGE_FILE, write_report
from stage2_distill.evaluation.size_report import write_size_report


def evaluate_students(config: EvaluateConfig) -> Path:
    """Sample all candidates (stage two), measure their videos (stage one), report (stage two); returns the page.

    Several sizes are compared one after the other, in folders of their names, and their figures put side by side.
    Under torchrun the processes share the sampling, and the first one does the rest.
    """
    rank, _ = join_ranks(config.device)
    sizes = list_record_sizes(config)
    if len(sizes) == 1:
        return evaluate_size(config, rank)
    if config.select:
        listed = ", ".join(map(str, sizes))
        raise ValueError(f"select=True: the records have several sizes ({listed}); choose by one of them with --size")
    out = Path(config.out)
    with own_folder(out):
        pages = {size: evaluate_size(replace(config, size=str(size), out=str(out / str(size))), rank) for size in sizes}
        if rank == 0:
            write_size_report(config, pages)
        wait_for_ranks()
    return out / PAGE_FILE


def evaluate_size(config: EvaluateConfig, rank: int) -> Path:
    """Compare on records of one size; returns the page."""
    load = partial(load_tools, config.model, config.shards, config.device,
                   judge=config.judge, i3d_model=config.i3d_model, clip_model=config.clip_model)  # fmt: skip
    if config.videos and rank == 0:
        load()  # and let go: mistakes show before hours of sampling, which need the memory
    setting, out = open_evaluation(config), Path(config.out)
    with own_folder(out):
        sample_comparison(setting)
        if config.videos and rank == 0:
            with staged_output(out) as staging:
                measure_videos(out, staging, load(), max_videos=config.videos,
                               report_videos=config.report_videos, batch_size=config.batch_size)  # fmt: skip
        return write_report(config) if rank == 0 else out / PAGE_FILE
