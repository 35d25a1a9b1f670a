"""Builds the roles of a run: networks, adapters, optimizers and average, in the memory form that fits the GPUs."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from common.model_folder import locate_part
from common.seed import make_generator
from common.timer import PhaseTimer
from stage2_distill.checkpointing.format import list_checkpoints, read_facts
from stage2_distill.config import AUTO, STANDARD, DistillConfig
from stage2_distill.distributed.fsdp import apply_fsdp
from stage2_distill.distributed.process_group import RankContext
from stage2_distill.dmd.regression import FirstStepAnchor, TeacherRegression
from stage2_distill.dmd.rollout import StudentRollouts
from stage2_distill.dmd.rollout_reuse import RolloutReuse
from stage2_distill.dmd.schedule import CRITIC, STUDENT, Schedule
from stage2_distill.dmd.score_noise import ScoreNoise
from stage2_distill.dmd.student_objective import StudentObjective
from stage2_distill.model.attention import check_kernel, choose_kernel, kernel_name
from stage2_distill.model.layers import ExecutionPlan
from stage2_distill.model.lora import AdapterView, LoraSettings, add_adapters, lora_settings
from stage2_distill.model.transformer import WanTransformer
from stage2_distill.model.wan import build_meta_transformer, guided, guided_pair, make_denoiser, materialize_transformer
from stage2_distill.model.weight_loading import copy_weights, fill_parameter, read_weights
from stage2_distill.optim.ema import CriticAverage
from stage2_distill.optim.optimizers import OptimizerSettings
from stage2_distill.planning.machine import Machine
from stage2_distill.planning.memory import choose_form
from stage2_distill.planning.network_size import TransformerSize
from stage2_distill.trainer import GradientAccumulator, Roles, TrainedRole, Trainer
from stage2_distill.weight_files.lora_files import LoraFile, parse_loras
from stage2_distill.weight_files.stored_tensors import MappedTensor

CRITIC_AVERAGE = "critic_average"  # the name of its adapter


@dataclass(frozen=True)
class RoleBuilder:
    """Builds the roles of a run: three networks of one model folder, or one network with two adapters."""

    model: Path  # located, of the base
    loras: tuple[LoraFile, ...]  # added to the base's weights
    ranks: RankContext
    plan: ExecutionPlan
    compute_dtype: torch.dtype
    optimizers: OptimizerSettings
    adapters: LoraSettings | None  # None: all weights are trained
    critic_ema_decay: float  # 0: no average of the critic
    ida_share: float
    seed: int

    def build(self) -> Roles:
        """Build networks, optimizers and average, in this order: the average starts as a copy of the weights."""
        student_net, teacher, critic_net, *average_nets = (
            self.build_networks() if self.adapters is None else self.build_adapter_views()
        )
        student, critic = (
            TrainedRole(name, net, self.optimizers.build_optimizer(net, name), make_denoiser(net, self.compute_dtype))
            for name, net in ((STUDENT, student_net), (CRITIC, critic_net))
        )
        if self.adapters is None:
            self.fill_networks(student, teacher, critic)
        ema = self.optimizers.build_ema(student.optimizer, self.ranks)
        averages = [
            CriticAverage(
                net, make_denoiser(net, self.compute_dtype), critic.optimizer.master_weights, self.critic_ema_decay
            )
            for net in average_nets
        ]
        teacher_denoiser = make_denoiser(teacher, self.compute_dtype)
        return Roles(self.optimizers.form, student, critic, teacher, teacher_denoiser, ema, *averages)

    def build_networks(self) -> list[WanTransformer]:
        """Student, teacher, critic and its average without weights, sharded before they take memory."""
        trained_dtype = torch.float32 if self.optimizers.form == STANDARD else self.compute_dtype
        nets = []
        dtypes = [trained_dtype, self.compute_dtype, trained_dtype]  # student, teacher, critic
        if self.critic_ema_decay:
            dtypes.append(trained_dtype)
        for dtype in dtypes:
            net = build_meta_transformer(self.model, dtype, self.plan)
            nets.append(materialize_transformer(apply_fsdp(net, self.ranks, self.compute_dtype), self.ranks.device))
        nets[1].requires_grad_(False)  # the teacher
        return nets

    def fill_networks(self, student: TrainedRole, teacher: nn.Module, critic: TrainedRole) -> None:
        """Read the student's weights and copy them to the others, so that the files are read once."""
        path, parameters = locate_part(self.model, "transformer"), dict(student.net.named_parameters())
        read_weights(path, parameters, student.optimizer.remainders(), self.loras)
        for net, remainders in ((critic.net, critic.optimizer.remainders()), (teacher, {})):
            copy_weights(student.optimizer.master_weights(), dict(net.named_parameters()), remainders)

    def build_adapter_views(self) -> list[AdapterView]:
        """Student, teacher, critic and its average on one base, whose weights are read; adapters have no effect yet."""
        assert self.adapters is not None
        net = build_meta_transformer(self.model, self.compute_dtype, self.plan)
        averages = (CRITIC_AVERAGE,) if self.critic_ema_decay else ()
        layers = add_adapters(net, (STUDENT, CRITIC, *averages), self.adapters)
        materialize_transformer(apply_fsdp(net, self.ranks, self.compute_dtype, net_casts=True), self.ranks.device)
        base = {name.replace(".base_layer.", "."): p for name, p in net.named_parameters() if ".lora_" not in name}
        read_weights(locate_part(self.model, "transformer"), base, loras=self.loras)
        views = [AdapterView(net, layers, adapter) for adapter in (STUDENT, None, CRITIC, *averages)]
        # IDA mixes the factors of both adapters, which means something only if the first ones begin equal
        names = (STUDENT, STUDENT if self.ida_share else CRITIC)
        for view, name in zip((views[0], views[2]), names, strict=True):
            initialize_adapters(view, self.seed, name)
        return views


def build_roles(config: DistillConfig, ranks: RankContext, model: Path) -> Roles:
    """The roles of a run from a model folder; ValueError if the kernel of attention does not support the model."""
    compute_dtype = getattr(torch, config.dtype)  # config.py imports no torch
    meta_net = build_meta_transformer(model, compute_dtype)  # no memory: for its head size and parameter count
    check_kernel(config.attention, meta_net.config.attention_head_dim, compute_dtype, ranks.device)
    plan = ExecutionPlan(config.attention, config.activation_checkpointing, config.compile)
    adapters = lora_settings(vars(config))
    form = STANDARD
    if adapters is None:
        form = choose_optimizer_form(config, ranks, TransformerSize.of(meta_net.config))
    builder = config.select(
        RoleBuilder,
        model=model,
        loras=parse_loras(config.base_lora or ()),
        ranks=ranks,
        plan=plan,
        compute_dtype=compute_dtype,
        optimizers=OptimizerSettings.of(config, ranks, form),
        adapters=adapters,
    )
    return builder.build()


def build_trainer(
    config: DistillConfig, ranks: RankContext, schedule: Schedule, roles: Roles, negative_text: Tensor
) -> Trainer:
    """The trainer of a run; negative_text (L D): padded as the batches' texts are."""
    rollouts = StudentRollouts(roles.student.denoiser, config.seed, config.sigmas)
    critic_rollouts = RolloutReuse(rollouts, schedule) if config.rollout_reuse else rollouts
    timer, score_noise = PhaseTimer(ranks.device), config.select(ScoreNoise)
    plain_teacher, scale, decoupled = roles.teacher_denoiser, config.guidance_scale, config.decoupled_guidance
    rescale = config.guidance_rescale
    teacher = guided(plain_teacher, negative_text=negative_text, scale=scale, rescale=rescale)
    return Trainer(
        ranks,
        roles,
        config.select(
            StudentObjective,
            teacher=teacher,
            matched_teacher=plain_teacher if decoupled else teacher,
            guidance=guided_pair(plain_teacher, negative_text=negative_text, scale=scale, rescale=rescale)
            if decoupled
            else None,
            fake=roles.fake_denoiser,
            score_noise=score_noise,
            regression=config.select(TeacherRegression),
            anchor=config.select(FirstStepAnchor),
        ),
        score_noise,
        schedule,
        GradientAccumulator(rollouts, critic_rollouts, ranks.device, timer),
        config.critic_loss,
        config.grad_clip,
        config.ida_share,
        timer,
    )


def choose_optimizer_form(config: DistillConfig, ranks: RankContext, size: TransformerSize) -> str:
    """STANDARD or COMPACT; `auto` is that of the run's checkpoints, or compact if standard would not fit the GPUs."""
    if config.optimizer_form != AUTO:
        return config.optimizer_form
    for checkpoint in reversed(list_checkpoints(Path(config.out))):
        with suppress(ValueError):  # a damaged one, which `resume_run` sets aside
            if form := read_facts(checkpoint).memory:
                return form
    if ranks.device.type != "cuda":
        return STANDARD
    _, total = torch.cuda.mem_get_info(ranks.device)
    return choose_form(config, size, world=ranks.world, gpu_bytes=total)


def describe_machine(config: DistillConfig, ranks: RankContext) -> Machine:
    """The device of this rank, which stands for all, and the kernel that attention takes there."""
    kernel = choose_kernel(config.attention, half_on_gpu=ranks.device.type == "cuda" and config.dtype == "bfloat16")
    if ranks.device.type != "cuda":
        return Machine(ranks.world, "cpu", 0, kernel)
    _, total = torch.cuda.mem_get_info(ranks.device)
    return Machine(ranks.world, torch.cuda.get_device_name(ranks.device), total, kernel_name(kernel))


@torch.no_grad()
def initialize_adapters(role: AdapterView, seed: int, draws: str | None = None) -> None:
    """Draw first factors uniform within 1/sqrt(inputs), as nn.Linear; zero second factors leave the base unchanged.

    draws: names the random numbers, by default as the adapter; equal names and seeds give equal factors.
    """
    for name, weight in role.named_parameters():
        # drawn in full on every rank, so that the numbers do not depend on the number of ranks
        initial = torch.zeros(weight.shape)
        if ".lora_A." in name:
            bound = weight.shape[1] ** -0.5  # shape of all shards: (rank, inputs)
            initial.uniform_(-bound, bound, generator=make_generator(seed, 0, 0, f"{draws or role.adapter} {name}"))
        fill_parameter(weight, MappedTensor(initial), name)
