"""Memory of a training run by part: what `--optimizer-form auto` decides by, and what `plan` prints. Imports no torch.

Every figure is counted: bytes per parameter of the state, and for activations numbers of tensors of one value per token
and width. The test compares them with the measured peaks of benchmarks/results.
"""

from dataclasses import dataclass, fields

from stage2_distill.config import AUTO, COMPACT, STANDARD, DistillConfig, ranks_per_copy
from stage2_distill.planning.network_size import TransformerSize

HALF, SINGLE = 2, 4  # bytes of a bfloat16 and of a float32
REMAINDER = 2  # bytes that a float32 master weight has beyond its bf16 weight
MOMENT_BYTES = {"8bit": 1 + 2 / 64, "float32": 4}  # second moment in the compact form; 8bit: with a scale per 64 values
# Tensors (B N D) that a block keeps for its backward pass (LOG, "where each byte of the 5B is"): its input, and what
# `activation_checkpoint` selects. `offload` has its inputs in host memory; `off` was counted on a CPU.
TENSORS_PER_BLOCK = {"full": 1, "offload": 0, "selective": 2, "selective-mlp": 3, "off": 47}
WORKING_TENSORS = 25.5  # at once, at the peak: one block that is computed again, and its gradients
ADAPTER_WORKING_TENSORS = 31.5  # the same with adapters on top: their products are kept apart
PROCESS_BYTES = 2 << 30  # host memory of a rank that trains (benchmarks/results/modes-*)
SPARE_BYTES = 2 << 30  # that a GPU must have beyond the peak: the driver's context, and gaps between tensors
# Of a sharded run torch reserves up to this much beyond what is used. With less, it returns memory and asks for it
# again, which made the standard form on two 80 GB cards slower than the compact one.
COMFORTABLE_BYTES = 14 << 30


@dataclass(frozen=True)
class HostPlacement:
    """What waits in host memory while the GPU does not need it."""

    student_state: bool  # of the student's optimizer
    average: bool


def place_on_host(form: str, offload: str, *, accumulates: bool, unsharded: bool) -> HostPlacement:
    """What option `offload` moves: only state of the compact form, and only if each GPU holds whole networks.

    The student's steps in one of `student_update_interval` iterations: if each GPU holds all of its state, that can
    wait in host memory, which makes room for gradients that are summed in float32. Without such sums it may stay.
    """
    is_possible = form == COMPACT and unsharded
    state = offload == "all" or (offload == "average" and accumulates)
    return HostPlacement(student_state=is_possible and state, average=is_possible and offload != "none")


@dataclass(frozen=True)
class ParameterBytes:
    """Bytes of each trained parameter, by what they hold; the optimizer's and the weight's are those of one role."""

    weight: float
    optimizer: float
    gradient: float
    critic_average: float
    average: float = SINGLE

    @property
    def in_checkpoint(self) -> float:
        """Bytes that a checkpoint stores: both roles and the averages."""
        return 2 * (self.weight + self.optimizer) + self.average + self.critic_average


def parameter_bytes(config: DistillConfig, form: str, *, accumulates: bool) -> ParameterBytes:
    """How a form stores a trained parameter."""
    critic_average = SINGLE if config.critic_ema_decay else 0
    if form != COMPACT or config.lora_rank:
        return ParameterBytes(SINGLE, SINGLE * (1 if config.beta1 == 0 else 2), SINGLE, critic_average)
    gradient = SINGLE if accumulates else HALF  # sums are float32
    # With replicas FSDP2 holds each block's float32 gradient until the backward pass ends, beside its bf16 copy.
    gradient += SINGLE * (config.replicate > 1)
    return ParameterBytes(HALF, REMAINDER + MOMENT_BYTES[config.second_moment], gradient, critic_average)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per GPU at the peak, by part, and bytes of host memory per rank."""

    student: float
    critic: float
    teacher: float  # of adapters: the base of all three
    optimizer: float  # second moments, and the low halves of master weights in the compact form
    average: float
    critic_average: float  # of option critic_ema_decay
    gradients: float
    activations: float  # kept for the backward pass
    not_at_once: float  # negative: activations are freed while gradients are made
    workspace: float  # of attention and of the block that is computed again
    collectives: float  # weights that FSDP2 gathers, and gradients on their way
    host: float  # per rank, with the copies for a checkpoint
    checkpoint: float  # of all ranks together

    @property
    def gpu_parts(self) -> dict[str, float]:
        """The parts on a GPU, by name."""
        names = [item.name for item in fields(self) if item.name not in ("host", "checkpoint")]
        return {name: vars(self)[name] for name in names}

    @property
    def gpu(self) -> float:
        """Peak of a GPU, as torch counts what is allocated."""
        return sum(self.gpu_parts.values())

    def fits(self, total: float, spare: float = SPARE_BYTES) -> bool:
        """Whether a GPU of `total` bytes holds it with `spare` bytes left."""
        return self.gpu + spare <= total


def estimate_memory(config: DistillConfig, size: TransformerSize, *, world: int, form: str) -> MemoryEstimate:
    """Memory of a run on `world` ranks with the optimizers of `form`."""
    shards, accumulates = ranks_per_copy(world, config.replicate), config.accumulation_steps(world) > 1
    trained = (size.adapter_parameters(config.lora_rank) if config.lora_rank else size.parameters) / shards
    of_one, compute_bytes = parameter_bytes(config, form, accumulates=accumulates), computed_bytes(config)
    host = place_on_host(form, config.offload, accumulates=accumulates, unsharded=shards == 1)
    token_tensor = config.batch_size * config.spec.num_tokens * size.width * compute_bytes
    gradients = of_one.gradient * trained
    activations = TENSORS_PER_BLOCK[config.activation_checkpointing] * size.num_layers * token_tensor
    working = WORKING_TENSORS + ADAPTER_WORKING_TENSORS * bool(config.lora_rank)
    checkpoint = of_one.in_checkpoint * trained * shards
    offloaded = of_one.average * host.average + of_one.optimizer * host.student_state
    copies = checkpoint / world if config.async_checkpoint else 0
    return MemoryEstimate(
        student=of_one.weight * trained,
        critic=of_one.weight * trained,
        teacher=compute_bytes * size.parameters / shards,
        optimizer=of_one.optimizer * trained * (1 if host.student_state else 2),
        average=0 if host.average else of_one.average * trained,
        critic_average=of_one.critic_average * trained,
        gradients=gradients,
        activations=activations,
        not_at_once=0 if accumulates else -min(gradients, activations),  # sums are there in the next pass too
        workspace=working * token_tensor,
        collectives=gathered_bytes(size, compute_bytes) if needs_fsdp(config, world, form) else 0,
        host=PROCESS_BYTES + offloaded * trained + copies,
        checkpoint=checkpoint,
    )


def computed_bytes(config: DistillConfig) -> int:
    """Bytes of a value in the precision of the computation."""
    return HALF if config.dtype == "bfloat16" else SINGLE


def needs_fsdp(config: DistillConfig, world: int, form: str) -> bool:
    """Whether weights are gathered block by block: on several ranks, or if masters are cast to compute."""
    return world > 1 or (not config.lora_rank and form != COMPACT and config.dtype == "bfloat16")


def gathered_bytes(size: TransformerSize, compute_bytes: int) -> int:
    """Two blocks' weights, of which one is fetched ahead, and one block's float32 gradients."""
    return size.block_parameters * (2 * compute_bytes + SINGLE)


def choose_form(config: DistillConfig, size: TransformerSize, *, world: int, gpu_bytes: float) -> str:
    """The form that `auto` takes on GPUs of `gpu_bytes`: standard if it fits with memory to spare, else compact."""
    if config.optimizer_form != AUTO:
        return config.optimizer_form
    if config.lora_rank or config.dtype != "bfloat16" or config.beta1 != 0:  # the compact form supports none of these
        return STANDARD
    standard = estimate_memory(config, size, world=world, form=STANDARD)
    return STANDARD if standard.fits(gpu_bytes, COMFORTABLE_BYTES) else COMPACT
