"""Where a run begins: at its newest valid checkpoint, at the weights of another run, or at those of the model."""

import logging
from collections.abc import Iterable, Iterator, Mapping
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
from stage2_distill.model.lora import lora_settings
from stage2_distill.model.split_float32 import join_master
from stage2_distill.model.weight_loading import copy_weights, read_weights
from stage2_distill.trainer import Roles, TrainedRole
from stage2_distill.weight_files.stored_weights import locate_weights

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
    if roles.critic_average is not None:
        groups["critic_ema"] = roles.critic_average.state_tensors()
    return {f"{group}.{name}": value.detach() for group, named in groups.items() for name, value in named.items()}


def resume_run(run_folder: Path, roles: Roles, ranks: RankContext, schedule: Schedule) -> int:
    """Load the newest valid checkpoint of the run and return its iteration; 0 if there is none.

    `checkpointing/identity.py` has checked that they belong together. ValueError if its tensors have another form.
    """
    checkpoint = newest_valid(run_folder, ranks)
    completed = 0 if checkpoint is None else iteration_of(checkpoint)
    if checkpoint is not None:
        stored_facts, expected_position = read_facts(checkpoint), schedule.stream_position(completed)
        tensors = training_state(roles)
        check_tensors(checkpoint, tensors, stored_facts)
        load_checkpoint(checkpoint, tensors)  # in place
        if stored_facts.position != expected_position:
            problem = f"its position in the data is {stored_facts.position}, by these options {expected_position}"
            raise ValueError(f"{checkpoint}: {problem}; use another folder, or a copy of the checkpoint")
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
    """Set student, critic and averages to another run's or checkpoint's masters, or to weights of a folder or file."""
    folder, adapters = Path(source), lora_settings(facts.config)
    with roles.ema.update_after(decay=0):  # decay 0 copies the new masters
        if (folder / STUDENT_FILE).is_file() or list_checkpoints(folder):
            checkpoint = resolve_checkpoint(folder, option="init_from")
            scale = adapter_scale(checkpoint, facts)
            check_source(checkpoint, roles, facts, ranks)
            for role in (roles.student, roles.critic):
                weights = scale_adapters(stored_master_weights(checkpoint, role), scale)
                copy_weights(weights, dict(role.net.named_parameters()), role.optimizer.remainders())
        elif adapters is not None:
            locate_model(source, (), option="init_from")
            raise ValueError(
                f"init_from={source}: must be a LoRA run, as lora_rank is set; use --model for another base"
            )
        else:
            path = locate_weights(source, option="init_from")
            try:
                for role in (roles.student, roles.critic):
                    read_weights(path, dict(role.net.named_parameters()), role.optimizer.remainders())
            except ValueError as error:  # names the file
                raise ValueError(f"init_from={source}: {str(error).removeprefix(f'{source}: ')}") from error
    if roles.critic_average is not None:
        roles.critic_average.copy_critic()


def check_source(checkpoint: Path, roles: Roles, facts: StudentFacts, ranks: RankContext) -> None:
    """Raise ValueError if a checkpoint is damaged or lacks weights of the networks that are trained."""
    problem = checkpoint_damage(checkpoint, rank=ranks.rank, world=ranks.world)
    if on_any_rank(problem is not None):
        raise ValueError(f"init_from={checkpoint}: is damaged: {problem or 'see the log of the other ranks'}")
    trained = (roles.student, roles.critic)
    expected = {f"{role.name}.{name}" for role in trained for name, _ in role.net.named_parameters()}
    missing = expected - stored_dtypes(checkpoint).keys()
    if missing:
        raise ValueError(
            f"init_from={checkpoint}: does not fit the model {facts.base_model}: lacks {min(missing)}; give its --model"
        )


def adapter_scale(checkpoint: Path, facts: StudentFacts) -> float:
    """The factor that gives a checkpoint's adapters the same effect under this run's alpha; 1 without adapters.

    ValueError if one of them is a LoRA run and the other is not, or if their ranks or bases differ.
    """
    source = read_facts(checkpoint)
    adapters, source_adapters = lora_settings(facts.config), lora_settings(source.config)
    rank, source_rank = (0 if one is None else one.rank for one in (adapters, source_adapters))
    if rank != source_rank:
        kind = "a LoRA run" if source_rank else "a run of all weights"
        raise ValueError(
            f"init_from={checkpoint}: is {kind} (lora_rank={source_rank}), and this one has lora_rank={rank}; "
            f"give --lora-rank {source_rank}"
        )
    if adapters is None or source_adapters is None:
        return 1.0
    if not same_fingerprint(source.transformer, facts.transformer):
        raise ValueError(
            f"init_from={checkpoint}: its adapters belong to another base, {source.base_model} (fingerprint "
            f"{source.transformer}), than {facts.base_model} ({facts.transformer}); give that --model"
        )
    return source_adapters.alpha / adapters.alpha  # the ranks are equal


def scale_adapters(weights: Iterable[tuple[str, Tensor]], scale: float) -> Iterator[tuple[str, Tensor]]:
    """Yield names and weights, the second factors of adapters times `scale`; 1 leaves every bit."""
    for name, weight in weights:
        yield name, weight * scale if scale != 1 and ".lora_B." in name else weight


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
