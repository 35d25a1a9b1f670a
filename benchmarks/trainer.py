"""A trainer of random weights and random data, at the true size or a tiny one, on any number of ranks."""

import argparse
import resource
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import mean
from typing import get_type_hints

import torch
from torch import Tensor

from benchmarks.device import Case, meta_network, randomize_weights
from common.condition import Condition
from common.options import convert_value
from common.video import VideoSpec
from stage2_distill.build import CRITIC_AVERAGE, build_trainer
from stage2_distill.config import OLD_ACTIVATION_CHECKPOINTING, STANDARD, DistillConfig, parse_lengths
from stage2_distill.distributed.dtensor import local_tensor
from stage2_distill.distributed.fsdp import apply_fsdp
from stage2_distill.distributed.process_group import RankContext, gather_from_ranks
from stage2_distill.dmd.schedule import CRITIC, STUDENT, MicroBatch, Schedule
from stage2_distill.dmd.video_shapes import SampleShapes
from stage2_distill.model.attention import enable_determinism
from stage2_distill.model.layers import ExecutionPlan
from stage2_distill.model.lora import AdapterView, add_adapters, lora_settings
from stage2_distill.model.transformer import WanTransformer
from stage2_distill.model.wan import make_denoiser, materialize_transformer
from stage2_distill.monitoring.metrics_log import UpdateResult
from stage2_distill.optim.ema import CriticAverage
from stage2_distill.optim.optimizers import OptimizerSettings
from stage2_distill.trainer import Roles, TrainedRole, Trainer, update_critic, update_student

UPDATES = {CRITIC: update_critic, STUDENT: update_student}


def make_config(case: Case, ranks: RankContext, **changes: object) -> DistillConfig:
    """Return the published recipe with one clip per GPU."""
    spec = case.spec
    recipe = DistillConfig(
        shards=("random",), model="random", out="random",
        num_frames=spec.num_frames, height=spec.height, width=spec.width, fps=spec.fps,
        global_batch=ranks.world, iterations=1_000_000, ema_start=1_000_000,
        compile=not case.tiny, device=case.device.type, dtype=str(case.dtype).removeprefix("torch."),
    )  # fmt: skip
    return replace(recipe, **changes)


def config_changes(options: argparse.Namespace) -> dict[str, object]:
    """Return the fields of the configuration that the flags of `train_step` change."""
    return {
        "optimizer_form": options.memory,
        "activation_checkpointing": OLD_ACTIVATION_CHECKPOINTING.get(options.keep, options.keep),
        "replicate": options.replicate,
        "compile": not (options.tiny or options.eager),
        "offload": options.offload,
        "attention": options.attention,
        "lora_rank": options.lora,
        **parse_options(options.set),
    }


def parse_options(text: str) -> dict[str, object]:
    """Return options of distill given as KEY=VALUE, separated by spaces."""
    hints = get_type_hints(DistillConfig)
    pairs = (item.split("=") for item in text.split())
    switches = {"true": True, "false": False}
    return {name: switches.get(value, convert_value(value, hints[name])) for name, value in pairs}


def random_role(case: Case, ranks: RankContext, net: WanTransformer, *, casts: bool = False) -> WanTransformer:
    """Shard a network that computes in the case's dtype, and give it random weights."""
    materialize_transformer(apply_fsdp(net, ranks, case.dtype, net_casts=casts), ranks.device)
    parameters = ((name, local_tensor(parameter)) for name, parameter in net.named_parameters())
    randomize_weights(parameters, case.device)
    return net


def random_roles(case: Case, ranks: RankContext, config: DistillConfig) -> Roles:
    """Return the roles of the same random weights, with optimizers and averages, in the memory form of `config`."""
    averages = (CRITIC_AVERAGE,) if config.critic_ema_decay else ()
    plan = ExecutionPlan(config.attention, config.activation_checkpointing, config.compile)
    lora = lora_settings(vars(config))
    if lora is not None:
        net = meta_network(case, plan, case.dtype)
        layers = add_adapters(net, (STUDENT, CRITIC, *averages), lora)
        random_role(case, ranks, net, casts=True)
        nets = [AdapterView(net, layers, adapter) for adapter in (STUDENT, None, CRITIC, *averages)]
    else:
        dtype = torch.float32 if config.optimizer_form == STANDARD else case.dtype
        dtypes = (dtype, case.dtype, dtype, *(dtype for _ in averages))
        nets = [random_role(case, ranks, meta_network(case, plan, kind)) for kind in dtypes]
        nets[1].requires_grad_(False)
    settings = OptimizerSettings.of(config, ranks, config.optimizer_form)
    student, critic = (
        TrainedRole(name, net, settings.build_optimizer(net, name), make_denoiser(net, case.dtype))
        for name, net in ((STUDENT, nets[0]), (CRITIC, nets[2]))
    )
    ema = settings.build_ema(student.optimizer, ranks)
    critic_averages = [
        CriticAverage(net, make_denoiser(net, case.dtype), critic.optimizer.master_weights, config.critic_ema_decay)
        for net in nets[3:]
    ]
    return Roles(settings.form, student, critic, nets[1], make_denoiser(nets[1], case.dtype), ema, *critic_averages)


def make_trainer(case: Case, ranks: RankContext, config: DistillConfig, roles: Roles) -> Trainer:
    """Return a trainer of built roles, with deterministic kernels as in a run."""
    enable_determinism(config.attention, case.dtype, ranks.device)
    negative_text = torch.randn(512, case.network["text_dim"], device=case.device)
    return build_trainer(config, ranks, Schedule.of(config, ranks.world), roles, negative_text)


def random_condition(case: Case, batch: int = 1) -> Condition:
    """Return a first frame and a text of all rows."""
    frames = torch.randn(batch, *case.spec.first_frame_shape, device=case.device)
    return Condition(frames, torch.randn(batch, 512, case.network["text_dim"], device=case.device))


def one_shape(spec: VideoSpec) -> SampleShapes:
    """Return samples that all have one shape."""
    return SampleShapes(0, parse_lengths(spec.num_frames), lambda position: spec)


def random_batches(
    case: Case, ranks: RankContext, role: str, iteration: int, count: int = 1
) -> Iterator[tuple[MicroBatch, Condition]]:
    """Yield the `count` micro-batches of one update."""
    for index in range(count):
        own, last = (ranks.rank,), index == count - 1
        micro_batch = MicroBatch(iteration, role, own, own, 1 / count, last, case.spec, index)
        yield micro_batch, random_condition(case)


def iteration_with_exit(schedule: Schedule, role: str, exit_index: int) -> int:
    """Return the first iteration in which a role's update leaves the rollout at this step."""
    return next(n for n in range(10_000) if schedule.draw_exit_index(n, role) == exit_index)


def role_update(case: Case, trainer: Trainer, role: str, exit_index: int) -> Callable[[], UpdateResult]:
    """Return an update of a role that leaves the rollout at this step; it can be called once."""
    iteration = iteration_with_exit(trainer.schedule, role, exit_index)
    batches = random_batches(case, trainer.ranks, role, iteration)
    return lambda: UPDATES[role](trainer, iteration, batches)


def balanced_start(schedule: Schedule, count: int) -> int:
    """Return the student turn from which `count` iterations come nearest to the mean exit in both roles."""
    middle = (len(schedule.timesteps) - 1) / 2

    def deviation(start: int) -> float:
        turns = {
            CRITIC: range(start, start + count),
            STUDENT: [n for n in range(start, start + count) if schedule.is_student_turn(n)],
        }
        return max(abs(mean(schedule.draw_exit_index(n, role) for n in turns[role]) - middle) for role in turns)

    return min(range(schedule.student_update_interval, 2000, schedule.student_update_interval), key=deviation)


def host_peak_gib() -> float:
    """Return the most host memory that this process has used, in GiB; mapped files count."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def gpu_peaks(case: Case) -> str:
    """Return the most memory in use so far on any rank's GPU, in GiB; all ranks must call it."""
    if case.device.type != "cuda":
        return "not measured"
    own = torch.tensor([torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()], device=case.device)
    used, reserved = (gather_from_ranks(own).amax(0) / 2**30).tolist()
    return f"{used:.1f} GiB, reserved {reserved:.1f}"


def all_finite(values: list[float]) -> bool:
    """Return whether all values are finite."""
    return bool(Tensor(values).isfinite().all())
