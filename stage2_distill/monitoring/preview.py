"""Previews: what the averaged student samples for a few fixed conditions, one step of RUN/previews.zarr per interval.

Records of several sizes make a step of each size, such as step-000500-704x1280.

Each rank samples a part of the rows. A step is marked complete once it has all rows, and is not sampled again then.
"""

import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from common.condition import Denoiser
from common.timer import PhaseTimer
from common.video import VideoSpec
from shards import latent_store
from shards.dataset import DataSet, open_data_set
from shards.manifest import check_settings
from shards.mixture import DataSetMixture
from shards.record import Record, collate_records
from stage2_distill.distributed.process_group import RankContext
from stage2_distill.dmd.rollout import sample_student
from stage2_distill.optim.ema import EmaWeights

PREVIEW_STORE, DAMAGED_SUFFIX = "previews.zarr", ".damaged"


@dataclass(frozen=True)
class PreviewOptions:
    """Options of training that previews depend on."""

    seed: int
    spec: VideoSpec
    sigmas: tuple[float, ...]
    batch_size: int
    max_text_tokens: int
    preview_every: int
    preview_count: int
    preview_data: str | None


@dataclass(frozen=True)
class PreviewStudent:
    """The student, its average, and what sampling needs."""

    options: PreviewOptions
    ranks: RankContext
    net: nn.Module
    denoiser: Denoiser  # of `net`
    ema: EmaWeights
    clock: PhaseTimer


@dataclass(frozen=True)
class PreviewGroup:
    """The records of one size."""

    suffix: str  # of the step's name
    spec: VideoSpec
    records: tuple[Record, ...]


@dataclass(frozen=True)
class PreviewWriter:
    """Samples the previews of a run from fixed records."""

    store: Path
    groups: tuple[PreviewGroup, ...]
    interval: int  # iterations; 0 = never

    def is_due(self, iteration: int) -> bool:
        """Whether a preview follows `iteration` completed iterations; 0 shows the student before training."""
        return self.interval > 0 and iteration % self.interval == 0

    def write_step(self, student: PreviewStudent, iteration: int) -> None:
        """Sample and store the preview after `iteration` iterations; all ranks call it together."""
        for group in self.groups:
            self._write_group(student, f"step-{iteration:06d}{group.suffix}", group)

    def _write_group(self, student: PreviewStudent, step: str, group: PreviewGroup) -> None:
        is_main_rank = student.ranks.rank == 0
        exists = latent_store.group_damage(self.store, step) is None
        dist.barrier()  # all ranks have looked before rank 0 writes
        if exists:
            return
        if is_main_rank:
            keys, prompts = [r.key for r in group.records], [r.source.prompt for r in group.records]
            seeds = (student.options.seed,) * len(keys)
            stored = latent_store.LatentGroup(step, group.spec, tuple(keys), tuple(prompts), seeds)
            latent_store.create_group(self.store, stored)
        dist.barrier()
        with student.clock("preview"), student.ema.swapped_into(student.net):
            for rows in rank_batches(len(group.records), student):
                self._sample_rows(student, step, group, rows)
        dist.barrier()
        if is_main_rank:
            latent_store.finish_group(self.store, step)

    def open(self) -> None:
        """Record that more steps will follow; a damaged store is set aside. Rank 0 calls it before the others go on."""
        if self.interval > 0 and self.store.exists():
            try:
                latent_store.is_store_complete(self.store)
            except ValueError as error:
                aside = self.store.with_name(self.store.name + DAMAGED_SUFFIX)
                logging.warning("%s; it is kept as %s, and later previews go to a new store", error, aside.name)
                shutil.rmtree(aside, ignore_errors=True)
                self.store.replace(aside)
        self.close(complete=False)

    def close(self, *, complete: bool) -> None:
        """Record in the store whether more steps will follow; rank 0 calls it."""
        if self.interval > 0:
            latent_store.mark_store_complete(self.store, complete)

    @torch.no_grad()
    def _sample_rows(self, student: PreviewStudent, step: str, group: PreviewGroup, rows: list[int]) -> None:
        options, count = student.options, len(group.records)
        condition = collate_records(
            [group.records[row % count] for row in rows], max_text_tokens=options.max_text_tokens
        )
        x0 = sample_student(
            student.denoiser,
            condition.to(student.ranks.device),
            sigmas=options.sigmas,
            latent_shape=group.spec.latent_shape,
            keys=[(options.seed, 0, row) for row in rows],
            purpose="preview",
        )
        stored_rows = [row for row in rows if row < count]
        if stored_rows:  # the last batch of a rank may be padding only
            latent_store.write_latents(self.store, step, stored_rows, x0[: len(stored_rows)])


def rank_batches(count: int, student: PreviewStudent) -> list[list[int]]:
    """This rank's batches of rows, equal in number and size on all ranks; rows from `count` on are padding.

    A sharded network computes only if all ranks take part, so a rank without rows samples padding.
    """
    rank, world = student.ranks.rank, student.ranks.world
    size = min(student.options.batch_size, -(-count // world))
    return [list(range(start, start + size)) for start in range(rank * size, count + rank * size, size * world)]


def open_previews(out: Path, options: PreviewOptions, data: DataSet | DataSetMixture) -> PreviewWriter:
    """The previews of a run, from the first records of `preview_data` or else of the training data.

    Several sizes take turns. ValueError if `preview_data` was encoded with other settings than the training data.
    """
    if not options.preview_every:
        return PreviewWriter(out / PREVIEW_STORE, (), 0)
    preview_set = data
    if options.preview_data is not None:
        preview_set = open_data_set(options.preview_data)
        check_preview_data(options, preview_set, data)
    sizes, groups = preview_set.size_groups, []
    for number, size in enumerate(sizes):
        count = min(len(range(number, options.preview_count, len(sizes))), size.num_records)
        records = tuple(preview_set.read_record(size.record_index(index)) for index in range(count))
        spec, suffix = replace(size.spec, num_frames=options.spec.num_frames), f"-{size.spec.frame_size}"
        if records:
            groups.append(PreviewGroup(suffix if len(sizes) > 1 else "", spec, records))
    return PreviewWriter(out / PREVIEW_STORE, tuple(groups), options.preview_every)


def check_preview_data(options: PreviewOptions, preview_set: DataSet, data: DataSet | DataSetMixture) -> None:
    """Raise ValueError if the data set of the previews has other encoders or sizes than that of training."""
    folder, encoder = str(options.preview_data), data.manifest.encoder
    trained, own = (tuple(group.spec.frame_size for group in one.size_groups) for one in (data, preview_set))
    expected: dict[str, object] = {"vae": encoder.vae, "text_encoder": encoder.text_encoder, "fps": options.spec.fps}
    check_settings(folder, preview_set.manifest, expected | (vars(trained[0]) if len(own) == len(trained) == 1 else {}))
    if others := set(own) - set(trained):
        raise ValueError(
            f"preview_data={folder}: has records of {', '.join(map(str, sorted(others)))} pixels, on which the run "
            f"does not train; its sizes are {', '.join(map(str, trained))}"
        )
