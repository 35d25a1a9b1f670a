"""Where a run begins: at its newest whole checkpoint, at another run's, or at the model itself."""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from shards.fingerprint import locate
from stage2_distill.checkpoint import (
    STUDENT,
    checkpoints,
    chosen,
    damage,
    iteration_of,
    load,
    read_facts,
    set_aside,
)  # fmt: skip
from stage2_distill.optim import masters, remainders, state_tensors
from stage2_distill.parallel import Ranks, on_any_rank
from stage2_distill.schedule import position
from stage2_distill.train import Trainer
from stage2_distill.weights import read_weights


def state(trainer: Trainer) -> dict[str, Tensor]:
    """Everything that training changes, as live tensors."""
    roles = trainer.roles
    groups: dict[str, Mapping[str, Tensor]] = {}
    groups["student"] = dict(roles.student.named_parameters())
    groups["critic"] = dict(roles.critic.named_parameters())
    groups["ema"] = trainer.ema.weights
    groups["student_optimizer"] = state_tensors(roles.student, trainer.student_optimizer)
    groups["critic_optimizer"] = state_tensors(roles.critic, trainer.critic_optimizer)
    return {f"{group}.{name}": value.detach() for group, named in groups.items() for name, value in named.items()}


def begin(out: Path, trainer: Trainer) -> int:
    """Fill the trainer from the run's newest whole checkpoint, if there is one; the number of iterations done."""
    checkpoint = newest_whole(out, trainer.ranks)
    done = 0 if checkpoint is None else iteration_of(checkpoint)
    if checkpoint is not None:
        try:
            load(checkpoint, state(trainer))
        except CheckpointException as error:
            raise ValueError(
                f"out={out}: {checkpoint.name} holds other tensors than this command trains; "
                "on other GPUs --memory auto chooses another form: give --memory standard or compact, as it was"
            ) from error
        facts, here = read_facts(checkpoint), position(done, trainer.config)
        assert facts.position == here, (facts.position, here)
    elif trainer.config.init_from is not None:
        begin_from(trainer, trainer.config.init_from)
    dist.barrier()  # every rank has looked
    if trainer.ranks.rank == 0:
        set_aside(out, after=done)
    return done


def newest_whole(out: Path, ranks: Ranks) -> Path | None:
    """The newest checkpoint without damage; None where there is no checkpoint, ValueError where all are damaged."""
    found = checkpoints(out)
    dist.barrier()
    for checkpoint in reversed(found):
        problem = damage(checkpoint, rank=ranks.rank, world=ranks.world)
        if problem is not None:
            logging.warning("%s is damaged: %s; it is set aside", checkpoint, problem)
        if not on_any_rank(problem is not None):
            if checkpoint != found[-1] and ranks.rank == 0:
                logging.warning("going on from %s instead", checkpoint.name)
            return checkpoint
    if found:
        raise ValueError(
            f"out={out}: none of its checkpoints is whole; name another folder, or delete it to begin anew"
        )
    return None


def begin_from(trainer: Trainer, source: str) -> None:
    """Start student, average and critic from a run, a checkpoint, or a folder of diffusers weights."""
    folder = Path(source)
    trained = ((trainer.roles.student, trainer.student_optimizer), (trainer.roles.critic, trainer.critic_optimizer))
    if (folder / STUDENT).is_file() or checkpoints(folder):
        _from_checkpoint(trainer, chosen(folder))
        for net, optimizer in trained:
            for rest in remainders(net, optimizer).values():
                rest.zero_()  # weights that live in bf16 start as they compute
    elif trainer.config.lora_rank:
        raise ValueError(f"init_from={source}: adapters start from a run of adapters; another base is named by --model")
    else:
        weights = folder if (folder / "config.json").is_file() else locate(source, ("transformer",)) / "transformer"
        for net, optimizer in trained:
            read_weights(weights, dict(net.named_parameters()), remainders(net, optimizer))
    trainer.ema.update(masters(*trained[0]), 0.0, trainer.ranks.device)


def _from_checkpoint(trainer: Trainer, checkpoint: Path) -> None:
    problem = damage(checkpoint)
    if problem is not None:
        raise ValueError(f"init_from={checkpoint}: is damaged: {problem}")
    wanted = {name: value for name, value in state(trainer).items() if name.startswith(("student.", "critic."))}
    try:
        load(checkpoint, wanted)
    except CheckpointException as error:
        raise ValueError(f"init_from={checkpoint}: does not fit the model {trainer.config.model}") from error
