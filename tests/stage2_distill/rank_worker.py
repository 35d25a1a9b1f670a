"""Makes runs on forked gloo ranks: `rank_worker.py JOBS.json`, a list of {world, configs, ...} done in order.

Each rank leaves what it saw in OUT/rank-FIRST-RANK.json: the samples of each update with a digest of their noise, text
and frame, and the collectives of each pass. With `stop` the last rank alone gets a SIGTERM in that iteration; with
`full` it alone has no room for a checkpoint in that iteration and the next.
"""

import hashlib
import json
import os
import resource
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from common.condition import Condition
from common.options import resolve_config
from stage2_distill import train, trainer
from stage2_distill.config import DistillConfig
from stage2_distill.dmd import rollout

torch.set_num_threads(1)


def digest(*tensors: Tensor) -> str:
    return hashlib.sha256(b"".join(tensor.float().contiguous().numpy().tobytes() for tensor in tensors)).hexdigest()[
        :16
    ]


class Witness:
    """Stands around the rollout and the collectives and writes down what passes."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, str, int, str]] = []
        self.passes: list[dict[str, int]] = [{"last": False, "all_reduce": 0, "reduce_scatter": 0}]
        self.part = None
        self.simulate, self.simulate_state = rollout.StudentRollouts.simulate, rollout.simulate_state
        self.reduce_gradients = trainer.set_gradient_all_reduce
        # a lambda becomes a method, so that the rollouts come as an argument
        rollout.StudentRollouts.simulate = lambda *given: self.note_part(*given)
        rollout.simulate_state, trainer.set_gradient_all_reduce = self.note_noise, self.note_pass
        self.all_reduce, self.reduce_scatter = dist.all_reduce, dist.reduce_scatter_tensor
        dist.all_reduce, dist.reduce_scatter_tensor = self.note_all_reduce, self.note_reduce_scatter

    def leave(self) -> None:
        rollout.StudentRollouts.simulate, rollout.simulate_state = self.simulate, self.simulate_state
        trainer.set_gradient_all_reduce = self.reduce_gradients
        dist.all_reduce, dist.reduce_scatter_tensor = self.all_reduce, self.reduce_scatter

    def note_part(self, rollouts, part, condition: Condition, exit_index: int) -> rollout.Simulated:
        self.part = part
        samples = self.simulate(rollouts, part, condition, exit_index)
        self.part = None  # rollouts of previews are not noted
        return samples

    def note_noise(self, denoiser, noise: Tensor, condition: Condition, **options) -> Tensor:
        for place, sample in enumerate(self.part.samples if self.part else ()):
            drawn = digest(noise[place], condition.text[place], condition.first_frame[place])
            self.seen.append((self.part.iteration, self.part.role, sample, drawn))
        return self.simulate_state(denoiser, noise, condition, **options)

    def note_pass(self, net, last: bool) -> None:
        self.passes.append({"last": last, "all_reduce": 0, "reduce_scatter": 0})
        self.reduce_gradients(net, last)

    def note_all_reduce(self, tensor: Tensor, *args, **options):
        self.passes[-1]["all_reduce"] += tensor.numel() > 8  # losses and norms are not gradients
        return self.all_reduce(tensor, *args, **options)

    def note_reduce_scatter(self, *args, **options):
        self.passes[-1]["reduce_scatter"] += 1
        return self.reduce_scatter(*args, **options)


def disturb(iteration: int, job: dict) -> None:
    """What is done to the last rank before an iteration."""
    if iteration == job.get("stop"):
        os.kill(os.getpid(), signal.SIGTERM)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    for after, limit in ((0, 20_000), (2, hard)):
        if job.get("full") is not None and iteration == job["full"] + after:
            for thread in threading.enumerate():
                if thread.name == "checkpoint":
                    thread.join()
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))


def run_watched(config: DistillConfig, job: dict) -> None:
    """One run."""
    witness, step = Witness(), train.train_step

    def disturbed(trainer, iteration: int, data):
        if trainer.ranks.rank == trainer.ranks.world - 1:
            disturb(iteration, job)
        return step(trainer, iteration, data)

    train.train_step = disturbed
    train.distill(config)
    train.train_step = step
    witness.leave()
    note = {"seen": witness.seen, "passes": witness.passes}
    (Path(config.out) / f"rank-{witness.seen[0][0]}-{dist.get_rank()}.json").write_text(json.dumps(note))


def be_rank(rank: int, world: int, port: int, job: dict) -> None:
    """All that a forked rank does; ends the process."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    code = 1
    try:
        for name in job["configs"]:
            run_watched(resolve_config(DistillConfig, {"config": name}), job)
        dist.destroy_process_group()
        code = 0
    finally:
        if code:
            traceback.print_exc()
        os._exit(code)


def launch(job: dict) -> bool:
    """Fork the ranks of a job and wait for them; where one fails, end the others."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = set()
    for rank in range(job["world"]):
        child = os.fork()
        if not child:
            be_rank(rank, job["world"], port, job)
        children.add(child)
    good = True
    while children:
        child, code = os.wait()
        children.discard(child)
        if code and good:
            good = False
            for other in children:
                os.kill(other, signal.SIGKILL)
    return good


if __name__ == "__main__":
    sys.exit(not all(launch(job) for job in json.loads(Path(sys.argv[1]).read_text())))
