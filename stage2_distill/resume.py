"""Where a run begins: at its newest valid checkpoint, at the weights of another run, or at those of the model."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from common.model_folder import locate_model, same_fingerprint
from stage2_distill.checkpointing.format import (
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
from stage2_distill.dmd.schedule import Schedule
from stage2_distill.model.split_float32 import join_master
from stage2_distill.model.weight_loading import copy_weights, read_weights
from stage2_distill.trainer import Roles, TrainedRole

READ_GROUP_SIZE = 40  # tensors of a source that are read together


def training_state(roles: Roles) -> dict[str, Tensor]:
    """Everything that training changes, as live tensors by their names in a checkpoint."""
    groups: dict[str, Mapping[str, Tensor]] = {
        "student": dict(roles.student.net.named_parameters()),
        "critic": dict(roles.critic.net.named_parameters()),
        "ema": roles.ema.weights,
        "student_optimizer": roles.student.optimizer.state_tensors(),
        "critic_optimizer": roles.critic.optimizer.state_tensors(),
    }
    return {f"{group}.{name}": value.detach() for group, named in groups.items() for name, value in named.items()}


def resume_run(run_folder: Path, roles: Roles, facts: StudentFacts, ranks: RankContext, schedule: Schedule) -> int:
    """Load the newest valid checkpoint of the run and return its iteration; 0 if there is none.

    facts: what checkpoints of this command say. ValueError if the run's are those of another command.
    """
    checkpoint = newest_valid(run_folder, ranks)
    completed = 0 if checkpoint is None else iteration_of(checkpoint)
    if checkpoint is not None:
        stored_facts, expected_position = read_facts(checkpoint), schedule.stream_position(completed)
        if not same_fingerprint(stored_facts.transformer, facts.transformer):
            raise ValueError(f"model={facts.base_model}: not the model of {checkpoint}, {stored_facts.base_model}")
        tensors = training_state(roles)
        check_tensors(checkpoint, tensors, stored_facts)
        load_checkpoint(checkpoint, tensors)  # in place
        assert stored_facts.position == expected_position, (stored_facts.position, expected_position)
    dist.barrier()  # every rank must have looked before the first one renames
    if ranks.rank == 0:
        set_aside(run_folder, after=completed)
    return completed


def check_tensors(checkpoint: Path, tensors: Mapping[str, Tensor], facts: StudentFacts) -> None:
    """Raise ValueError if a checkpoint has other tensors: in another form the same names have other meanings."""
    stored = stored_dtypes(checkpoint)
    expected = {name: value.dtype for name, value in tensors.items()}
    differing = [name for name in stored.keys() | expected.keys() if stored.get(name) != expected.get(name)]
    if differing:
        raise ValueError(
            f"{checkpoint}: {len(differing)} tensors, such as {min(differing)}, are not those of this command; "
            f"use --optimizer-form {facts.memory or 'standard or compact'}, as before"
        )


def newest_valid(run_folder: Path, ranks: RankContext) -> Path | None:
    """The newest undamaged checkpoint; None if there is no checkpoint, ValueError if all are damaged."""
    candidates = list_checkpoints(run_folder)
    dist.barrier()  # all ranks list the same ones
    for checkpoint in reversed(candidates):
        problem = checkpoint_damage(checkpoint, rank=ranks.rank, world=ranks.world)
        if problem is not None:
            logging.warning("%s is damaged: %s; it is set aside", checkpoint, problem)
        if not on_any_rank(problem is not None):  # each rank checks a part of the files
            if checkpoint != candidates[-1] and ranks.rank == 0:
                logging.warning("resuming from %s instead", checkpoint.name)
            return checkpoint
    if candidates:
        raise ValueError(f"out={run_folder}: all checkpoints are damaged; use another folder, or delete this one")
    return None


def initialize_from(source: str, roles: Roles, facts: StudentFacts, ranks: RankContext) -> None:
    """Set student, critic and average to another run's or checkpoint's masters, or to the weights of a model folder."""
    folder, trains_adapters = Path(source), bool(facts.config["lora_rank"])
    with roles.ema.update_after(decay=0):  # decay 0 copies the new masters
        if (folder / STUDENT_FILE).is_file() or list_checkpoints(folder):
            checkpoint = resolve_checkpoint(folder)
            check_source(checkpoint, roles, facts, ranks)
            for role in (roles.student, roles.critic):
                weights = stored_master_weights(checkpoint, role)
                copy_weights(weights, dict(role.net.named_parameters()), role.optimizer.remainders())
        elif trains_adapters:
            raise ValueError(f"init_from={source}: must be a run of adapters; use --model for another base")
        else:
            if not (folder / "config.json").is_file():
                folder = locate_model(source, ("transformer",)) / "transformer"
            for role in (roles.student, roles.critic):
                read_weights(folder, dict(role.net.named_parameters()), role.optimizer.remainders())


def check_source(checkpoint: Path, roles: Roles, facts: StudentFacts, ranks: RankContext) -> None:
    """Raise ValueError if a checkpoint is damaged or has other networks; adapters also need the same base."""
    problem = checkpoint_damage(checkpoint, rank=ranks.rank, world=ranks.world)
    if on_any_rank(problem is not None):
        raise ValueError(f"init_from={checkpoint}: is damaged: {problem or 'see the log of the other ranks'}")
    trained = (roles.student, roles.critic)
    expected = {f"{role.name}.{name}" for role in trained for name, _ in role.net.named_parameters()}
    missing = expected - stored_dtypes(checkpoint).keys()
    if missing:
        raise ValueError(f"init_from={checkpoint}: does not fit the model {facts.base_model}: lacks {min(missing)}")
    if facts.config["lora_rank"] and not same_fingerprint(read_facts(checkpoint).transformer, facts.transformer):
        raise ValueError(f"init_from={checkpoint}: its adapters belong to another base than {facts.base_model}")


def stored_master_weights(checkpoint: Path, role: TrainedRole) -> Iterator[tuple[str, Tensor]]:
    """Yield names and float32 masters of a role from a checkpoint of any form, sharded as the network is."""
    dtypes, parameters = stored_dtypes(checkpoint), list(role.net.named_parameters())
    for start in range(0, len(parameters), READ_GROUP_SIZE):
        stored = dict[str, Tensor]()
        for name, parameter in parameters[start : start + READ_GROUP_SIZE]:
            for key in (f"{role.name}.{name}", f"{role.name}_optimizer.{name}.remainder"):
                if key in dtypes:  # only the compact form stores remainders
                    stored[key] = torch.empty_like(parameter, dtype=dtypes[key], requires_grad=False)
        load_checkpoint(checkpoint, stored)
        for name, _ in parameters[start : start + READ_GROUP_SIZE]:
            weight = local_tensor(stored[f"{role.name}.{name}"])
            remainder = stored.get(f"{role.name}_optimizer.{name}.remainder")
            yield name, weight.float() if remainder is None else join_master(weight, local_tensor(remainder))
