"""What the averaged student makes of a few fixed conditions, now and then: one step of RUN/previews.zarr each time.

Every rank samples some rows; a step is marked as done when all rows are there. A step that is done is not made again.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from common.condition import Condition
from common.seed import generator, normal
from shards import latents
from shards.manifest import check_manifest
from shards.mix import Mixture
from shards.read import DataSet, open_data_set
from shards.record import Record, collate
from stage2_distill.config import DistillConfig
from stage2_distill.rollout import rollout
from stage2_distill.train import Trainer

STORE = "previews.zarr"


@dataclass(frozen=True)
class Previews:
    """Where previews go and what they are made from."""

    store: Path
    records: tuple[Record, ...]
    every: int  # iterations; 0 = never

    def due(self, done: int) -> bool:
        """Whether a preview belongs behind iteration `done`; one shows the student before the first iteration."""
        return self.every > 0 and done % self.every == 0

    def make(self, trainer: Trainer, done: int) -> None:
        """Sample and store the step of iteration `done`; all ranks call it together."""
        step, first = f"step-{done:06d}", trainer.ranks.rank == 0
        there = (self.store / "zarr.json").is_file() and step in latents.steps(self.store)
        dist.barrier()  # every rank has looked before the first one writes
        if there:
            return
        if first:
            keys, prompts = [r.key for r in self.records], [r.source.prompt for r in self.records]
            seeds = (trainer.config.seed,) * len(keys)
            group = latents.LatentGroup(step, trainer.config.spec, tuple(keys), tuple(prompts), seeds)
            latents.create(self.store, group)
        dist.barrier()
        with trainer.clock("preview"), trainer.ema.in_place_of(trainer.roles.student):
            for rows in rows_of_rank(len(self.records), trainer):
                self._write(trainer, step, rows)
        dist.barrier()
        if first:
            latents.finish(self.store, step)

    def close(self, *, done: bool) -> None:
        """Say on rank 0 whether more steps will come."""
        if self.every > 0:
            latents.set_complete(self.store, done)

    def _write(self, trainer: Trainer, step: str, rows: list[int]) -> None:
        """Sample some rows; rows beyond the last only keep the ranks in step and are not stored."""
        config, device = trainer.config, trainer.ranks.device
        true = [row for row in rows if row < len(self.records)]
        records = [self.records[row % len(self.records)] for row in rows]
        condition: Condition = collate(records, text_rows=config.text_rows).condition.to(device)
        draws = [generator(config.seed, 0, row, "preview", device) for row in rows]
        noise = normal(config.spec.latent_shape, draws)
        student = trainer.denoiser(trainer.roles.student)
        with torch.no_grad():
            x0 = rollout(student, noise, condition, ladder=config.sigmas, generators=draws)
        if true:  # the last ranks may have padding alone
            latents.write(self.store, step, true, x0[: len(true)])


def rows_of_rank(count: int, trainer: Trainer) -> list[list[int]]:
    """This rank's batches of rows; every rank has the same number of batches of the same size, the last are padding."""
    rank, world = trainer.ranks.rank, trainer.ranks.world
    size = min(trainer.config.batch_size, -(-count // world))
    together = size * world
    return [list(range(start + rank * size, start + rank * size + size)) for start in range(0, count, together)]


def open_previews(out: Path, config: DistillConfig, data: DataSet | Mixture) -> Previews:
    """The first records of the previews' data set, or of the training's; ValueError where it does not belong to it."""
    if not config.preview_every:
        return Previews(out / STORE, (), 0)
    shown = data
    if config.preview_data is not None:
        shown = open_data_set(config.preview_data)
        made_by = data.manifest.encoder
        encoder: dict[str, object] = {"vae": made_by.vae, "text_encoder": made_by.text_encoder}
        check_manifest(Path(config.preview_data), shown.manifest, spec=config.spec, encoder=encoder)
    records = tuple(shown.record(index) for index in range(min(config.preview_count, shown.records)))
    return Previews(out / STORE, records, config.preview_every)
