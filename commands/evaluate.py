"""The `evaluate` command: latents and report of stage two, measurements of videos of stage one."""

from functools import partial
from pathlib import Path

from common.files import staged_output
from stage1_encode.video_metrics.evaluate_videos import load_tools, measure_videos
from stage2_distill.distributed.process_group import join_ranks, own_folder
from stage2_distill.evaluation.compare import open_evaluation, sample_comparison
from stage2_distill.evaluation.config import EvaluateConfig
from stage2_distill.evaluation.report import PAGE_FILE, write_report


def evaluate_students(config: EvaluateConfig) -> Path:
    """Sample all candidates (stage two), measure their videos (stage one), report (stage two); returns the page.

    Under torchrun the processes share the sampling, and the first one does the rest.
    """
    rank, _ = join_ranks(config.device)
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
