"""What the averaged student makes of a few fixed conditions, now and then: one step of RUN/previews.zarr each time.

Every rank samples some rows; a step is marked as done when all rows are there. A step that is done is not made again.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from common.condition import Condition, Denoiser
from common.seed import draw_normal, make_generator
from common.timer import PhaseTimer
from common.video import VideoSpec
from shards import latent_store
from shards.dataset import DataSet, open_data_set
from shards.manifest import check_manifest
from shards.mixture import DataSetMixture
from shards.record import Record, collate_records
from stage2_distill.distributed.process_group import RankContext
from stage2_distill.dmd.rollout import rollout
from stage2_distill.optim.ema import EmaWeights

PREVIEW_STORE = "previews.zarr"


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
    """The student, its average, and what sampling it needs."""

    options: PreviewOptions
    ranks: RankContext
    net: nn.Module
    denoiser: Denoiser  # of `net`
    ema: EmaWeights
    clock: PhaseTimer


@dataclass(frozen=True)
class PreviewWriter:
    """Where previews go and what they are made from."""

    store: Path
    records: tuple[Record, ...]
    interval: int  # iterations; 0 = never

    def is_due(self, iteration: int) -> bool:
        """Whether a preview belongs behind iteration `done`; one shows the student before the first iteration."""
        return self.interval > 0 and iteration % self.interval == 0

    def write_step(self, student: PreviewStudent, iteration: int) -> None:
        """Sample and store the step of iteration `done`; all ranks call it together."""
        step, first = f"step-{iteration:06d}", student.ranks.rank == 0
        exists = (self.store / "zarr.json").is_file() and step in latent_store.complete_groups(self.store)
        dist.barrier()  # every rank has looked before the first one writes
        if exists:
            return
        if first:
            keys, prompts = [r.key for r in self.records], [r.source.prompt for r in self.records]
            seeds = (student.options.seed,) * len(keys)
            group = latent_store.LatentGroup(step, student.options.spec, tuple(keys), tuple(prompts), seeds)
            latent_store.create_group(self.store, group)
        dist.barrier()
        with student.clock("preview"), student.ema.swapped_into(student.net):
            for rows in rank_batches(len(self.records), student):
                self._sample_rows(student, step, rows)
        dist.barrier()
        if first:
            latent_store.finish_group(self.store, step)

    def close(self, *, complete: bool) -> None:
        """Say on rank 0 whether more steps will come."""
        if self.interval > 0:
            latent_store.mark_store_complete(self.store, complete)

    def _sample_rows(self, student: PreviewStudent, step: str, rows: list[int]) -> None:
        """Sample some rows; rows beyond the last only keep the ranks in step and are not stored."""
        options, device = student.options, student.ranks.device
        real_rows = [row for row in rows if row < len(self.records)]
        records = [self.records[row % len(self.records)] for row in rows]
        condition: Condition = collate_records(records, max_text_tokens=options.max_text_tokens).condition.to(device)
        generators = [make_generator(options.seed, 0, row, "preview", device) for row in rows]
        noise = draw_normal(options.spec.latent_shape, generators)
        with torch.no_grad():
            x0 = rollout(student.denoiser, noise, condition, sigmas=options.sigmas, generators=generators)
        if real_rows:  # the last ranks may have padding alone
            latent_store.write_latents(self.store, step, real_rows, x0[: len(real_rows)])


def rank_batches(count: int, student: PreviewStudent) -> list[list[int]]:
    """This rank's batches of rows; every rank has the same number of batches of the same size, the last are padding."""
    rank, world = student.ranks.rank, student.ranks.world
    size = min(student.options.batch_size, -(-count // world))
    rows_per_round = size * world
    return [list(range(start + rank * size, start + rank * size + size)) for start in range(0, count, rows_per_round)]


def open_previews(out: Path, options: PreviewOptions, data: DataSet | DataSetMixture) -> PreviewWriter:
    """The first records of the previews' data set, or of the training's; ValueError where it does not belong to it."""
    if not options.preview_every:
        return PreviewWriter(out / PREVIEW_STORE, (), 0)
    preview_set = data
    if options.preview_data is not None:
        preview_set = open_data_set(options.preview_data)
        encoder_facts = data.manifest.encoder
        encoder: dict[str, object] = {"vae": encoder_facts.vae, "text_encoder": encoder_facts.text_encoder}
        check_manifest(Path(options.preview_data), preview_set.manifest, spec=options.spec, encoder=encoder)
    records = tuple(
        preview_set.read_record(index) for index in range(min(options.preview_count, preview_set.num_records))
    )
    return PreviewWriter(out / PREVIEW_STORE, records, options.preview_every)
