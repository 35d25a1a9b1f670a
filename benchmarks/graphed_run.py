"""Training runs of the product as CUDA graphs, several at once on one GPU: for experiments that need many runs.

A run of a tiny network is bound by the host, which starts thousands of kernels in each iteration. Here the product's
own `update_student` and `update_critic` are recorded once for each exit of the rollout, and replayed. Three things are
exchanged, because a graph cannot hold them: random numbers come from a `DrawTape`, the optimizer keeps its rate and
steps on the device, and nothing is read back. On a CPU the same functions run again in each iteration.
Shapes: N conditions, B batch, C channels, T latent frames, H W latent size, L text rows, D text width.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.trainer import UPDATES
from common.condition import Condition
from common.timer import PhaseTimer
from stage2_distill import trainer as product
from stage2_distill.build import build_trainer
from stage2_distill.config import STANDARD, DistillConfig
from stage2_distill.distributed.process_group import RankContext
from stage2_distill.dmd import rollout, score_noise
from stage2_distill.dmd.latent_stats import LATENT_STATS
from stage2_distill.dmd.schedule import CRITIC, STUDENT, MicroBatch, Schedule
from stage2_distill.model.layers import ExecutionPlan
from stage2_distill.model.transformer import WanTransformer
from stage2_distill.model.wan import load_transformer, make_denoiser
from stage2_distill.model.weight_loading import copy_weights
from stage2_distill.monitoring.metrics_log import UpdateResult
from stage2_distill.optim.adamw import RoleOptimizer, trained_parameters
from stage2_distill.optim.ema import CriticAverage, EmaWeights

UpdateKey = tuple[str, int, bool]  # role, exit index, whether in the warm-up: what a graph depends on


@dataclass(frozen=True)
class ConditionPool:
    """Conditions on the device, as a data set's records hold them."""

    first_frame: Tensor  # (N C 1 H W) bfloat16
    text: Tensor  # (N L D) bfloat16, zero rows after a prompt's end
    negative: Tensor  # (L D) bfloat16

    def take(self, rows: slice) -> Condition:
        """The conditions of some rows."""
        return Condition(self.first_frame[rows], self.text[rows])


class DrawTape:
    """Random numbers of one update, in tensors that keep their address; the product's draws read them in order."""

    def __init__(self, normals: Tensor, uniforms: Tensor) -> None:
        self.normals, self.uniforms = normals, uniforms  # (K B C T H W) and (3 B)
        self.rewind()

    @classmethod
    def allocate(cls, steps: int, batch: int, shape: Sequence[int], device: torch.device) -> "DrawTape":
        """A tape long enough for an update: a noise per step of the rollout, of the scores and of the guidance."""
        return cls(torch.zeros(steps + 2, batch, *shape, device=device), torch.zeros(3, batch, device=device))

    def fill(self, generator: torch.Generator) -> None:
        """Draw all numbers again, in two kernels."""
        self.normals.normal_(generator=generator)
        self.uniforms.uniform_(generator=generator)

    def rewind(self) -> None:
        """Go back to the first number."""
        self.next_normal, self.next_uniform = iter(self.normals), iter(self.uniforms)

    def normal(self, shape: Sequence[int], generators: Sequence[object]) -> Tensor:
        """What `draw_normal` returns (B *shape)."""
        draws = next(self.next_normal)
        assert draws.shape == (len(generators), *shape), (draws.shape, shape)
        return draws

    def uniform(self, generators: Sequence[object]) -> Tensor:
        """What `draw_uniform` returns (B)."""
        return next(self.next_uniform)[: len(generators)]


@contextmanager
def draws_from(tape: DrawTape) -> Iterator[None]:
    """Let the rollout and the score noise of the product read a tape from its start."""
    tape.rewind()
    functions = {"draw_normal": tape.normal, "make_generator": lambda *_: None}
    with ExitStack() as stack:
        for module, extra in ((rollout, {}), (score_noise, {"draw_uniform": tape.uniform})):
            stack.enter_context(mock.patch.multiple(module, **functions, **extra))
        yield


class DeviceAdamW(RoleOptimizer, torch.optim.AdamW):
    """torch's AdamW, which the product's equals, with rate and steps in tensors on the device."""

    def __init__(self, net: nn.Module, config: DistillConfig) -> None:
        parameters = trained_parameters(net)
        device = next(iter(parameters.values())).device
        self.rate, cuda = torch.zeros((), device=device), device.type == "cuda"
        super().__init__(
            parameters.values(), self.rate, (config.beta1, config.beta2), eps=config.eps,
            weight_decay=config.weight_decay, capturable=cuda, fused=cuda or None,
        )  # fmt: skip
        self.named = parameters
        for parameter in parameters.values():  # made now: a graph would set it to zero in every replay
            self.state[parameter] = {
                "step": torch.zeros((), device=device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def restart(self) -> None:
        """Forget all updates."""
        torch._foreach_zero_(list(self.state_tensors().values()))


class DeviceAverage(EmaWeights):
    """The average of the student, without the streams for host memory, which a graph cannot hold."""

    @torch.no_grad()
    def _update(self, decay: float) -> None:
        torch._foreach_lerp_(list(self._weights.values()), [master for _, master in self.masters()], 1 - decay)

    def restart(self) -> None:
        """Copy the student."""
        self._update(0.0)


def apply_on_device(
    trainer: product.Trainer, optimizer: RoleOptimizer, lr: float, accumulated: product.Accumulated
) -> UpdateResult:
    """The product's `apply_update` without reading results: its loss and norm stay tensors on the device."""
    del lr  # `iterate` has put it into the optimizer's tensor
    norm = optimizer.clip_gradients(trainer.grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    loss, *stats = accumulated.stats
    return UpdateResult(loss, norm, accumulated.exit_index, tuple(stats))  # type: ignore[arg-type]


def build_device_roles(
    config: DistillConfig, model: Path, teacher: WanTransformer, device: torch.device
) -> product.Roles:
    """Roles as `RoleBuilder` makes them in float32, around a teacher that several runs share."""
    plan = ExecutionPlan(compiled=config.compile)
    nets = [load_transformer(model, torch.float32, plan).to(device) for _ in range(3 if config.critic_ema_decay else 2)]
    student, critic = (
        product.TrainedRole(name, net, DeviceAdamW(net, config), make_denoiser(net, torch.float32))
        for name, net in zip((STUDENT, CRITIC), nets, strict=False)
    )
    averages = [
        CriticAverage(net, make_denoiser(net, torch.float32), critic.optimizer.master_weights, config.critic_ema_decay)
        for net in nets[2:]
    ]
    ema = DeviceAverage(student.optimizer.master_weights, device)
    return product.Roles(STANDARD, student, critic, teacher, make_denoiser(teacher, torch.float32), ema, *averages)


class GraphedRun:
    """One run of training, on a stream of its own on a GPU."""

    def __init__(
        self, config: DistillConfig, model: Path, teacher: WanTransformer, pool: ConditionPool, ranks: RankContext
    ) -> None:
        self.config, self.schedule, self.pool = config, Schedule.of(config, 1), pool
        device, batch = ranks.device, config.batch_size
        roles = build_device_roles(config, model, teacher, device)
        built = build_trainer(config, ranks, self.schedule, roles, pool.negative)
        timer = PhaseTimer(torch.device("cpu"))  # events of a recorded update measure nothing
        self.trainer = replace(built, accumulator=replace(built.accumulator, timer=timer))
        self.tape = DrawTape.allocate(len(config.timesteps), batch, config.spec.latent_shape, device)
        self.batch = pool.take(slice(batch))  # replaced in place by `load_batch`
        self.batch = Condition(*(part.clone() for part in (self.batch.first_frame, self.batch.text)))
        self.readings = {role: torch.zeros(2 + len(LATENT_STATS), device=device) for role in (STUDENT, CRITIC)}
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.graphs: dict[UpdateKey, torch.cuda.CUDAGraph] = {}
        self.generator = torch.Generator(device)
        self.restart()

    def restart(self) -> None:
        """Go back to the teacher's weights and iteration 0."""
        roles, self.iteration = self.trainer.roles, 0
        self.generator.manual_seed(self.config.seed)
        self.order = torch.empty(0, dtype=torch.long, device=self.generator.device)
        for role in (roles.student, roles.critic):
            copy_weights(roles.teacher.named_parameters(), dict(role.net.named_parameters()), {})
            role.optimizer.restart()
        roles.ema.restart()
        if roles.critic_average is not None:
            roles.critic_average.copy_critic()

    def update(self, role: str, iteration: int, *, use_tape: bool = True) -> None:
        """One update by the product's function, on the present batch and tape."""
        samples = tuple(range(self.config.batch_size))
        part = MicroBatch(iteration, role, samples, samples, 1.0, last=True, spec=self.config.spec, step=0)
        draws = draws_from(self.tape) if use_tape else nullcontext()
        with draws, mock.patch.object(product, "apply_update", apply_on_device):
            result = UPDATES[role](self.trainer, iteration, iter([(part, self.batch)]))
        self.readings[role].copy_(torch.stack([result.loss, result.grad_norm, *result.latent_stats]))

    def update_key(self, role: str, iteration: int) -> UpdateKey:
        """Which graph an update replays."""
        schedule = self.schedule
        return role, schedule.draw_exit_index(iteration, role), schedule.is_teacher_warmup(iteration)

    def record_graphs(self) -> None:
        """Record a graph of every kind of update, on a GPU; the run then starts again."""
        if self.stream is None:
            return
        # The last iteration of each kind, because the first ones copy the student instead of averaging it.
        kinds = {
            self.update_key(role, number): number
            for number in range(self.config.iterations)
            for role in self.schedule.updated_roles(number)
        }
        # Once before the recording: kernels are compiled, and workspaces of the stream taken.
        first = kinds.items() if self.config.compile else {key[0]: (key, n) for key, n in kinds.items()}.values()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for key, number in first:
                self.update(key[0], number)
        self.stream.synchronize()
        pool = torch.cuda.graph_pool_handle()  # shared: the graphs of a run are never replayed at the same time
        for key, number in kinds.items():
            self.graphs[key] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[key], pool, self.stream, capture_error_mode="thread_local"):
                self.update(key[0], number)
        torch.cuda.synchronize()
        self.restart()
        torch.cuda.synchronize()

    def load_batch(self) -> None:
        """Take the next conditions, in an order drawn again for every pass over them, and new random numbers."""
        size = self.config.batch_size
        if len(self.order) < size:
            order = torch.randperm(len(self.pool.text), generator=self.generator, device=self.generator.device)
            self.order = torch.cat([self.order, order])
        rows, self.order = self.order[:size], self.order[size:]
        assert self.batch.first_frame is not None
        self.batch.first_frame.copy_(self.pool.first_frame[rows])
        self.batch.text.copy_(self.pool.text[rows])
        self.tape.fill(self.generator)

    def iterate(self) -> None:
        """The next iteration, queued on the run's stream."""
        number, roles = self.iteration, self.trainer.roles
        with torch.cuda.stream(self.stream):  # None: no effect
            for name in self.schedule.updated_roles(number):
                self.load_batch()
                role = roles.student if name == STUDENT else roles.critic
                role.optimizer.rate.fill_(self.schedule.learning_rate(number, name))
                if self.stream is None:
                    self.update(name, number)
                else:
                    self.graphs[self.update_key(name, number)].replay()
                if name == STUDENT and self.schedule.ema_decay_after(number) == 0:
                    roles.ema.restart()
        self.iteration += 1

    def graph_error(self, iterations: int = 2) -> float:
        """How far the student of the graphs is from that of the same updates without them, over the way it moved.

        0 on a CPU, and rounding on a GPU. The run then starts again.
        """
        graphs, ends = self.stream, []
        for stream in (graphs, None):  # without a stream nothing is replayed
            self.restart()
            if graphs is not None:
                torch.cuda.synchronize()
            self.stream = stream
            for _ in range(iterations):
                self.iterate()
            if graphs is not None:
                torch.cuda.synchronize()
            ends.append(
                torch.cat([weight.detach().flatten() for weight in self.trainer.roles.student.net.parameters()])
            )
        self.stream = graphs
        self.restart()
        start = torch.cat([weight.detach().flatten() for weight in self.trainer.roles.teacher.parameters()])
        return float((ends[0] - ends[1]).norm() / (ends[1] - start).norm())

    def average_weights(self) -> Mapping[str, Tensor]:
        """A copy of the averaged student's weights by name, ordered after the iterations so far."""
        with torch.cuda.stream(self.stream):
            return {name: weight.clone() for name, weight in self.trainer.roles.ema.weights.items()}

    def check_finite(self) -> None:
        """Wait for the iterations so far; DivergedError if the last loss or gradient of a role is not finite."""
        if self.stream is not None:
            self.stream.synchronize()
        values = list(chain.from_iterable(reading.tolist() for reading in self.readings.values()))
        if not torch.tensor(values).isfinite().all():
            raise product.DivergedError(f"iteration {self.iteration}: {self.readings}")


def forward_passes(config: DistillConfig) -> float:
    """Forward passes of a mean iteration, a backward pass counted as two: its cost on any machine, in one number."""
    teacher = 1 if config.guidance_scale == 1 else 2
    rollout_mean = (len(config.timesteps) - 1) / 2  # without the last step, which may have a gradient
    regression = config.regression_steps * teacher
    matching = rollout_mean + 3 + 1 + (3 if config.decoupled_guidance else teacher)
    matching += regression * (config.regression_weight > 0)
    matching += config.anchor_steps * teacher / len(config.timesteps) * (config.anchor_weight > 0)
    warmup_share = config.teacher_warmup / config.iterations
    critic_share = min(1.0 - warmup_share, config.critic_warmup / config.iterations)
    student = (1 - warmup_share - critic_share) * matching / config.student_update_interval
    return warmup_share * (rollout_mean + 3 + regression) + student + (1 - warmup_share) * (rollout_mean + 4)
