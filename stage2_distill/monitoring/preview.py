"""Previews: what the averaged student samples for a few fixed conditions, one step of RUN/previews.zarr per interval.

Each rank samples a part of the rows. A step is marked complete once it has all rows, and is not sampled again then.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from common.condition import Denoiser
from common.timer import PhaseTimer
from shards import latent_store
from shards.dataset import DataSet, open_data_set
from shards.manifest import check_manifest
from shards.mixture import DataSetMixture
from shards.record import Record, collate_records
from stage2_distill.config import DistillConfig
from stage2_distill.distributed.process_group import RankContext
from stage2_distill.dmd.rollout import sample_student
from stage2_distill.optim.ema import EmaWeights

PREVIEW_STORE = "previews.zarr"


@dataclass(frozen=True)
class PreviewWriter:
    """Samples the previews of a run from fixed records."""

    store: Path
    records: tuple[Record, ...]
    config: DistillConfig
    ranks: RankContext
    net: nn.Module  # the student
    denoiser: Denoiser  # of `net`
    ema: EmaWeights
    timer: PhaseTimer

    def is_due(self, iteration: int) -> bool:
        """Whether a preview follows `iteration` completed iterations; 0 shows the student before training."""
        return self.config.preview_every > 0 and iteration % self.config.preview_every == 0

    def write_step(self, iteration: int) -> None:
        """Sample and store the preview after `iteration` iterations; all ranks call it together."""
        step, is_main_rank = f"step-{iteration:06d}", self.ranks.rank == 0
        exists = (self.store / "zarr.json").is_file() and step in latent_store.complete_groups(self.store)
        dist.barrier()  # all ranks have looked before rank 0 writes
        if exists:
            return
        if is_main_rank:
            keys, prompts = tuple(r.key for r in self.records), tuple(r.source.prompt for r in self.records)
            seeds = (self.config.seed,) * len(keys)
            group = latent_store.LatentGroup(step, self.config.spec, keys, prompts, seeds)
            latent_store.create_group(self.store, group)
        dist.barrier()
        with self.timer("preview"), self.ema.swapped_into(self.net):
            for rows in rank_batches(len(self.records), self.config.batch_size, self.ranks):
                self._sample_rows(step, rows)
        dist.barrier()
        if is_main_rank:
            latent_store.finish_group(self.store, step)

    def close(self, *, complete: bool) -> None:
        """Record in the store whether more steps will follow; rank 0 calls it."""
        if self.config.preview_every > 0:
            latent_store.mark_store_complete(self.store, complete)

    @torch.no_grad()
    def _sample_rows(self, step: str, rows: list[int]) -> None:
        config, count = self.config, len(self.records)
        batch = collate_records([self.records[row % count] for row in rows], max_text_tokens=config.max_text_tokens)
        condition, keys = batch.condition.to(self.ranks.device), [(config.seed, 0, row) for row in rows]
        shape, sigmas = config.spec.latent_shape, config.sigmas
        x0 = sample_student(self.denoiser, condition, sigmas=sigmas, latent_shape=shape, keys=keys, purpose="preview")
        stored_rows = [row for row in rows if row < count]
        if stored_rows:  # the last batch of a rank may be padding only
            latent_store.write_latents(self.store, step, stored_rows, x0[: len(stored_rows)])


def rank_batches(count: int, batch_size: int, ranks: RankContext) -> list[list[int]]:
    """This rank's batches of rows, equal in number and size on all ranks; rows from `count` on are padding.

    A sharded network computes only if all ranks take part, so a rank without rows samples padding.
    """
    rank, world = ranks.rank, ranks.world
    size = min(batch_size, -(-count // world))
    return [list(range(start, start + size)) for start in range(rank * size, count + rank * size, size * world)]


def read_preview_records(config: DistillConfig, data: DataSet | DataSetMixture) -> tuple[Record, ...]:
    """The first records of `preview_data`, or else of the training data; none if a run has no previews.

    ValueError if `preview_data` was encoded with other settings than the training data.
    """
    if not config.preview_every:
        return ()
    preview_set = data
    if config.preview_data is not None:
        preview_set, encoder = open_data_set(config.preview_data), data.manifest.encoder
        encoder_facts: dict[str, object] = {"vae": encoder.vae, "text_encoder": encoder.text_encoder}
        check_manifest(Path(config.preview_data), preview_set.manifest, spec=config.spec, encoder=encoder_facts)
    count = min(config.preview_count, preview_set.num_records)
    return tuple(preview_set.read_record(index) for index in range(count))
