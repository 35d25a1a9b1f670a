"""A trainer of random weights and random data, at the true size or a tiny one, on any number of ranks."""

from collections.abc import Iterator
from dataclasses import replace
from statistics import mean

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from benchmarks.device import Case, randomise
from common.condition import Condition
from stage2_distill.build import build_trainer
from stage2_distill.config import STANDARD, DistillConfig
from stage2_distill.distributed.dtensor import local_tensor
from stage2_distill.distributed.fsdp import apply_fsdp
from stage2_distill.distributed.process_group import RankContext, gather_from_ranks
from stage2_distill.dmd.schedule import CRITIC, STUDENT, MicroBatch, Schedule
from stage2_distill.model.attention import enable_determinism
from stage2_distill.model.layers import ExecutionPlan
from stage2_distill.model.lora import AdapterView, add_adapters, lora_settings
from stage2_distill.model.transformer import WanTransformer, convert_transformer
from stage2_distill.model.wan import cast_parameters, make_denoiser, materialize_transformer
from stage2_distill.optim.optimizers import OptimizerSettings
from stage2_distill.trainer import Roles, TrainedRole, Trainer


def make_config(chosen: Case, ranks: RankContext, **changes: object) -> DistillConfig:
    """The published recipe at one clip a GPU."""
    spec = chosen.spec
    plain = DistillConfig(
        shards=("random",), model="random", out="random",
        num_frames=spec.num_frames, height=spec.height, width=spec.width, fps=spec.fps,
        global_batch=ranks.world, iterations=1_000_000, ema_start=1_000_000,
        compile=not chosen.tiny, device=chosen.device.type, dtype=str(chosen.dtype).removeprefix("torch."),
    )  # fmt: skip
    return replace(plain, **changes)


def random_network(chosen: Case, plan: ExecutionPlan, dtype: torch.dtype) -> WanTransformer:
    """A transformer in `dtype` without memory."""
    with torch.device("meta"):
        net = WanTransformer3DModel(
            patch_size=(1, 2, 2), in_channels=48, out_channels=48, cross_attn_norm=True,
            qk_norm="rms_norm_across_heads", **chosen.network,
        )  # fmt: skip
    return cast_parameters(convert_transformer(net, plan), dtype).eval()


def random_role(chosen: Case, ranks: RankContext, net: WanTransformer, *, casts: bool = False) -> WanTransformer:
    """Shard a network that computes in the case's dtype, with random weights."""
    materialize_transformer(apply_fsdp(net, ranks, chosen.dtype, net_casts=casts), ranks.device)
    draws = torch.Generator(chosen.device).manual_seed(0)
    for name, parameter in net.named_parameters():
        randomise(name, local_tensor(parameter), draws)
    return net


def random_roles(chosen: Case, ranks: RankContext, config: DistillConfig) -> Roles:
    """Three roles of the same random weights, with optimizers and average, in the memory mode of `config`."""
    plan = ExecutionPlan(config.attention, config.activation_checkpointing, config.compile)
    lora = lora_settings(vars(config))
    if lora is not None:
        net = random_network(chosen, plan, chosen.dtype)
        layers = add_adapters(net, (STUDENT, CRITIC), lora)
        random_role(chosen, ranks, net, casts=True)
        nets = [AdapterView(net, layers, adapter) for adapter in (STUDENT, None, CRITIC)]
    else:
        dtype = torch.float32 if config.optimizer_form == STANDARD else chosen.dtype
        kinds = (dtype, chosen.dtype, dtype)
        nets = [random_role(chosen, ranks, random_network(chosen, plan, kind)) for kind in kinds]
        nets[1].requires_grad_(False)
    settings = OptimizerSettings.of(config, ranks, config.optimizer_form)
    student, critic = (
        TrainedRole(name, net, settings.build_optimizer(net, name), make_denoiser(net, chosen.dtype))
        for name, net in ((STUDENT, nets[0]), (CRITIC, nets[2]))
    )
    ema = settings.build_ema(student.optimizer, ranks)
    return Roles(settings.form, student, critic, nets[1], make_denoiser(nets[1], chosen.dtype), ema)


def trainer_of(chosen: Case, ranks: RankContext, config: DistillConfig, roles: Roles) -> Trainer:
    """A trainer of built roles, its kernels in order as those of a run."""
    enable_determinism(config.attention, chosen.dtype, ranks.device)
    negative = torch.randn(512, chosen.network["text_dim"], device=chosen.device)
    return build_trainer(config, ranks, Schedule.of(config, ranks.world), roles, negative)


def random_condition(chosen: Case, batch: int = 1) -> Condition:
    """A first frame and a text of all rows."""
    frames = torch.randn(batch, *chosen.spec.first_frame_shape, device=chosen.device)
    return Condition(frames, torch.randn(batch, 512, chosen.network["text_dim"], device=chosen.device))


def one_batch(chosen: Case, ranks: RankContext, role: str, iteration: int) -> Iterator[tuple[MicroBatch, Condition]]:
    """The only micro-batch of one update."""
    yield MicroBatch(iteration, role, (ranks.rank,), (ranks.rank,), 1.0, True), random_condition(chosen)


def exits(schedule: Schedule, role: str, start: int, count: int) -> list[int]:
    """Where a role's updates in `count` iterations leave the rollout."""
    turns = [n for n in range(start, start + count) if role in schedule.updated_roles(n)]
    return [schedule.draw_exit_index(n, role) for n in turns]


def balanced(schedule: Schedule, count: int) -> int:
    """The student's turn from which the updates of `count` iterations leave at the mean exit, in both roles."""
    middle = (len(schedule.timesteps) - 1) / 2

    def off(start: int) -> float:
        return max(abs(mean(exits(schedule, role, start, count)) - middle) for role in (STUDENT, CRITIC))

    return min(range(schedule.student_update_interval, 2000, schedule.student_update_interval), key=off)


def report_memory(chosen: Case) -> str:
    """Most memory in use so far on any rank's GPU, in GiB; all ranks call it."""
    if chosen.device.type != "cuda":
        return "not measured"
    here = torch.tensor([torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()], device=chosen.device)
    used, reserved = (gather_from_ranks(here).amax(0) / 2**30).tolist()
    return f"{used:.1f} GiB, reserved {reserved:.1f}"


def finite(values: list[float]) -> bool:
    """Whether all are."""
    return bool(torch.isfinite(Tensor(values)).all())
