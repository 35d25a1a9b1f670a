"""Builds the optimizers and the average of a run."""

from dataclasses import dataclass

from torch import nn

from stage2_distill.config import STANDARD, DistillConfig
from stage2_distill.distributed.process_group import RankContext
from stage2_distill.dmd.schedule import STUDENT
from stage2_distill.optim.adamw import PlainAdamW, RoleOptimizer, TorchAdamW
from stage2_distill.optim.compact_adamw import CompactAdamW
from stage2_distill.optim.ema import EmaWeights
from stage2_distill.planning.memory import HostPlacement, place_on_host


@dataclass(frozen=True)
class OptimizerSettings:
    """The options of both roles' optimizers and of the average."""

    form: str  # STANDARD or COMPACT, never AUTO
    accumulates: bool  # an update has several micro-batches
    unsharded: bool  # each rank holds whole networks, alone or as one of the replicas
    student_lr: float
    critic_lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    second_moment: str
    offload: str

    @classmethod
    def of(cls, config: DistillConfig, ranks: RankContext, form: str) -> "OptimizerSettings":
        """The settings of a run on these ranks."""
        accumulates = config.global_batch > config.batch_size * ranks.world
        return config.select(cls, form=form, accumulates=accumulates, unsharded=config.replicate == ranks.world)

    @property
    def host_placement(self) -> HostPlacement:
        """What waits in host memory."""
        return place_on_host(self.form, self.offload, accumulates=self.accumulates, unsharded=self.unsharded)

    def build_optimizer(self, net: nn.Module, role: str) -> RoleOptimizer:
        """The optimizer of a role."""
        lr = self.student_lr if role == STUDENT else self.critic_lr
        settings = {"lr": lr, "beta2": self.beta2, "eps": self.eps, "weight_decay": self.weight_decay}
        if self.form == STANDARD:
            return PlainAdamW(net, settings) if self.beta1 == 0 else TorchAdamW(net, settings, beta1=self.beta1)
        return CompactAdamW(
            net,
            settings,
            moment=self.second_moment,
            offload=role == STUDENT and self.host_placement.student_state,
            accumulate=self.accumulates,
        )

    def build_ema(self, student: RoleOptimizer, ranks: RankContext) -> EmaWeights:
        """The average of the student's master weights."""
        return EmaWeights(student.master_weights, ranks.device, offload=self.host_placement.average)
