"""One rank that makes several runs: `torchrun worker.py CONFIG.yaml ...`; each leaves what it saw in OUT/rank-N.json.

Seen are, for each update, the samples with a digest of their noise, text and frame, and the collectives of each pass.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from common.condition import Condition
from common.options import resolve
from stage2_distill import run, train
from stage2_distill.config import DistillConfig

torch.set_num_threads(1)


def digest(*tensors: Tensor) -> str:
    return hashlib.sha256(b"".join(tensor.float().contiguous().numpy().tobytes() for tensor in tensors)).hexdigest()[
        :16
    ]


class Witness:
    """Stands around the rollout and the collectives and writes down what passes."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, str, int, str]] = []
        self.passes: list[dict[str, int]] = []
        self.part = None
        self.simulate, self.rollout, self.reduce_gradients = train.simulate, train.rollout, train.reduce_gradients
        train.simulate, train.rollout, train.reduce_gradients = self.note_part, self.note_noise, self.note_pass
        self.all_reduce, self.reduce_scatter = dist.all_reduce, dist.reduce_scatter_tensor
        dist.all_reduce, dist.reduce_scatter_tensor = self.note_all_reduce, self.note_reduce_scatter

    def leave(self) -> None:
        train.simulate, train.rollout, train.reduce_gradients = self.simulate, self.rollout, self.reduce_gradients
        dist.all_reduce, dist.reduce_scatter_tensor = self.all_reduce, self.reduce_scatter

    def note_part(self, trainer, part, condition: Condition, exit_at: int) -> Tensor:
        self.part = part
        return self.simulate(trainer, part, condition, exit_at)

    def note_noise(self, denoiser, noise: Tensor, condition: Condition, **options) -> Tensor:
        for place, sample in enumerate(self.part.samples):
            drawn = digest(noise[place], condition.text[place], condition.first_frame[place])
            self.seen.append((self.part.iteration, self.part.role, sample, drawn))
        return self.rollout(denoiser, noise, condition, **options)

    def note_pass(self, net, last: bool) -> None:
        self.passes.append({"last": last, "all_reduce": 0, "reduce_scatter": 0})
        self.reduce_gradients(net, last)

    def note_all_reduce(self, tensor: Tensor, *args, **options):
        self.passes[-1]["all_reduce"] += tensor.numel() > 8  # losses and norms are not gradients
        return self.all_reduce(tensor, *args, **options)

    def note_reduce_scatter(self, *args, **options):
        self.passes[-1]["reduce_scatter"] += 1
        return self.reduce_scatter(*args, **options)


def run_watched(config: DistillConfig) -> Path:
    """Run and leave a rank's witness beside the checkpoints; the newest of them."""
    witness = Witness()
    checkpoint = run.distill(config)
    witness.leave()
    note = {"seen": witness.seen, "passes": witness.passes}
    (Path(config.out) / f"rank-{dist.get_rank()}.json").write_text(json.dumps(note))
    return checkpoint


if __name__ == "__main__":
    for name in sys.argv[1:]:
        run_watched(resolve(DistillConfig, {"config": name}))
    dist.destroy_process_group()
