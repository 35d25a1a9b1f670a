"""Where a run begins: at its newest whole checkpoint, at another run's, or at the model itself."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.model_folder import locate_model
from stage2_distill.checkpointing.format import (  # fmt: skip
    STUDENT_FILE,
    StudentFacts,
    checkpoint_damage,
    iteration_of,
    list_checkpoints,
    load_checkpoint,
    read_facts,
    resolve_checkpoint,
    set_aside,
    stored_dtypes,
)
from stage2_distill.distributed.dtensor import local_tensor
from stage2_distill.distributed.process_group import RankContext, on_any_rank
from stage2_distill.dmd.schedule import CRITIC, stream_position
from stage2_distill.dmd.schedule import STUDENT as TAUGHT
from stage2_distill.model.split_float32 import join_master
from stage2_distill.model.weight_loading import copy_weights, read_weights
from stage2_distill.optim.optimizers import master_remainders, master_weights, state_tensors
from stage2_distill.trainer import Trainer

READ_GROUP_SIZE = 40  # tensors of a source that are read at once


def training_state(trainer: Trainer) -> dict[str, Tensor]:
    """Everything that training changes, as live tensors."""
    roles = trainer.roles
    groups: dict[str, Mapping[str, Tensor]] = {}
    groups["student"] = dict(roles.student.named_parameters())
    groups["critic"] = dict(roles.critic.named_parameters())
    groups["ema"] = trainer.ema.weights
    groups["student_optimizer"] = state_tensors(roles.student, trainer.student_optimizer)
    groups["critic_optimizer"] = state_tensors(roles.critic, trainer.critic_optimizer)
    return {f"{group}.{name}": value.detach() for group, named in groups.items() for name, value in named.items()}


def resume_run(run_folder: Path, trainer: Trainer, facts: StudentFacts) -> int:
    """Fill the trainer from the run's newest whole checkpoint, if there is one; the number of iterations done.

    facts: what checkpoints of this command say. ValueError where those that are there are another's.
    """
    checkpoint = newest_valid(run_folder, trainer.ranks)
    completed = 0 if checkpoint is None else iteration_of(checkpoint)
    if checkpoint is not None:
        stored_facts, expected_position = read_facts(checkpoint), stream_position(completed, trainer.config)
        if stored_facts.transformer != facts.transformer:
            raise ValueError(f"model={facts.base_model}: not the model of {checkpoint}, {stored_facts.base_model}")
        tensors = training_state(trainer)
        check_tensors(checkpoint, tensors, stored_facts)
        load_checkpoint(checkpoint, tensors)
        assert stored_facts.position == expected_position, (stored_facts.position, expected_position)
    elif trainer.config.init_from is not None:
        initialize_from(trainer, trainer.config.init_from, facts)
    dist.barrier()  # every rank has looked
    if trainer.ranks.rank == 0:
        set_aside(run_folder, after=completed)
    return completed


def check_tensors(checkpoint: Path, tensors: Mapping[str, Tensor], facts: StudentFacts) -> None:
    """ValueError where a checkpoint holds more, less or others: in another form the same names mean other numbers."""
    stored = stored_dtypes(checkpoint)
    expected = {name: value.dtype for name, value in tensors.items()}
    differing = [name for name in stored.keys() | expected.keys() if stored.get(name) != expected.get(name)]
    if differing:
        raise ValueError(
            f"{checkpoint}: {len(differing)} tensors, such as {min(differing)}, are not those that this command trains; "
            f"give --memory {facts.memory or 'standard or compact'}, as it was"
        )


def newest_valid(run_folder: Path, ranks: RankContext) -> Path | None:
    """The newest checkpoint without damage; None where there is no checkpoint, ValueError where all are damaged."""
    candidates = list_checkpoints(run_folder)
    dist.barrier()
    for checkpoint in reversed(candidates):
        problem = checkpoint_damage(checkpoint, rank=ranks.rank, world=ranks.world)
        if problem is not None:
            logging.warning("%s is damaged: %s; it is set aside", checkpoint, problem)
        if not on_any_rank(problem is not None):
            if checkpoint != candidates[-1] and ranks.rank == 0:
                logging.warning("going on from %s instead", checkpoint.name)
            return checkpoint
    if candidates:
        raise ValueError(
            f"out={run_folder}: none of its checkpoints is whole; name another folder, or delete it to begin anew"
        )
    return None


def initialize_from(trainer: Trainer, source: str, facts: StudentFacts) -> None:
    """Start student, average and critic from a run, a checkpoint, or a folder of diffusers weights."""
    folder, roles = Path(source), trainer.roles
    trained_roles = (
        (TAUGHT, roles.student, trainer.student_optimizer),
        (CRITIC, roles.critic, trainer.critic_optimizer),
    )
    if (folder / STUDENT_FILE).is_file() or list_checkpoints(folder):
        checkpoint = resolve_checkpoint(folder)
        check_source(checkpoint, trainer, facts)
        for role, net, optimizer in trained_roles:
            copy_weights(
                stored_master_weights(checkpoint, role, net),
                dict(net.named_parameters()),
                master_remainders(net, optimizer),
            )
    elif trainer.config.lora_rank:
        raise ValueError(f"init_from={source}: adapters start from a run of adapters; another base is named by --model")
    else:
        weights = (
            folder if (folder / "config.json").is_file() else locate_model(source, ("transformer",)) / "transformer"
        )
        for _, net, optimizer in trained_roles:
            read_weights(weights, dict(net.named_parameters()), master_remainders(net, optimizer))
    trainer.ema.update(master_weights(roles.student, trainer.student_optimizer), 0.0, trainer.ranks.device)


def check_source(checkpoint: Path, trainer: Trainer, facts: StudentFacts) -> None:
    """ValueError where a checkpoint is damaged, or not one of such networks; adapters belong to their base."""
    problem = checkpoint_damage(checkpoint, rank=trainer.ranks.rank, world=trainer.ranks.world)
    if on_any_rank(problem is not None):
        raise ValueError(f"init_from={checkpoint}: is damaged: {problem or 'another rank says where'}")
    nets = {TAUGHT: trainer.roles.student, CRITIC: trainer.roles.critic}
    expected = {f"{role}.{name}" for role, net in nets.items() for name, _ in net.named_parameters()}
    missing = expected - stored_dtypes(checkpoint).keys()
    if missing:
        raise ValueError(f"init_from={checkpoint}: does not fit the model {facts.base_model}: lacks {min(missing)}")
    if trainer.config.lora_rank and read_facts(checkpoint).transformer != facts.transformer:
        raise ValueError(f"init_from={checkpoint}: adapters of another base than {facts.base_model}")


def stored_master_weights(checkpoint: Path, role: str, net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and float32 masters of a role in a checkpoint of any form, sharded as the network is; a few at a time."""
    dtypes, parameters = stored_dtypes(checkpoint), list(net.named_parameters())
    for start in range(0, len(parameters), READ_GROUP_SIZE):
        stored = dict[str, Tensor]()
        for name, parameter in parameters[start : start + READ_GROUP_SIZE]:
            for key in (f"{role}.{name}", f"{role}_optimizer.{name}.remainder"):
                if key in dtypes:
                    stored[key] = torch.empty_like(parameter, dtype=dtypes[key], requires_grad=False)
        load_checkpoint(checkpoint, stored)
        for name, _ in parameters[start : start + READ_GROUP_SIZE]:
            weight, remainder = local_tensor(stored[f"{role}.{name}"]), stored.get(f"{role}_optimizer.{name}.remainder")
            yield name, weight.float() if remainder is None else join_master(weight, local_tensor(remainder))
