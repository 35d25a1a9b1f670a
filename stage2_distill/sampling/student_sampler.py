"""Samples latents from a checkpoint. Shapes: B batch, C channels, T latent frames, H W latent size."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from common.condition import Condition
from common.device import MovableTensors, OffloadedTensors, pick_device
from common.flow import timestep_sigmas
from common.model_folder import locate_model
from common.planning.cards import find_card, planned_kernel
from common.video import PATCH_SIZE, SPACE_STRIDE, TEXT_LENGTH, TIME_STRIDE, FrameSize, VideoSpec
from shards.record import Record, collate_records
from stage2_distill.checkpointing import format as checkpoints
from stage2_distill.config import FP8
from stage2_distill.distributed.process_group import start_process_group
from stage2_distill.dmd.rollout import sample_student
from stage2_distill.low_precision.fp8_support import check_fp8, store_weights_in_fp8
from stage2_distill.model import wan
from stage2_distill.model.attention import choose_kernel, kernel_name
from stage2_distill.model.context_parallel import check_context_parallel
from stage2_distill.model.layers import ExecutionPlan
from stage2_distill.model.lora import AdapterView, LoraSettings, add_adapters, lora_settings
from stage2_distill.model.transformer import WanTransformer
from stage2_distill.model.weight_loading import read_weights
from stage2_distill.offload.streamed_blocks import StreamedModule
from stage2_distill.planning.duration import denoising_seconds, forward_seconds
from stage2_distill.planning.network_size import TransformerSize
from stage2_distill.sampling.compile_cache import keep_compiled_code
from stage2_distill.sampling.config import SampleConfig
from stage2_distill.sampling.student_source import check_base, check_model, check_sampler, find_student, trained_loras
from stage2_distill.weight_files.lora_files import LoraFile, parse_loras, read_deltas
from stage2_distill.weight_files.stored_tensors import EditedTensor, MappedTensor


@dataclass(frozen=True)
class StudentSampler:
    """A student that is ready to sample."""

    net: WanTransformer
    spec: VideoSpec
    sigmas: tuple[float, ...]  # noise levels of the steps, falling
    dtype: torch.dtype  # in which the network computes
    max_text_tokens: int = TEXT_LENGTH  # rows of padded text: fewer are faster
    denoising_seconds: float | None = None  # of a video, predicted; None if its speed is not known
    sizes: tuple[FrameSize, ...] = ()  # of which each picture takes the nearest, that of `spec` first; empty = `spec`
    streamed_net: MovableTensors | None = None  # the network, if its blocks pass through the GPU one by one

    @property
    def device(self) -> torch.device:
        """The network's current device."""
        return next(self.net.parameters()).device

    @property
    def ranks(self) -> int:
        """The number of processes that share a video."""
        return self.net.blocks[0].plan.ranks

    @cached_property
    def tensors(self) -> MovableTensors:
        """The network's parameters and buffers."""
        return self.streamed_net or OffloadedTensors([*self.net.parameters(), *self.net.buffers()])

    def move_to(self, device: torch.device) -> None:
        """Move the network to a device."""
        self.tensors.move_to(device)

    def __call__(self, records: Sequence[Record], seeds: Sequence[int], segment: int = 0) -> Tensor:
        """Latents (B C T H W) of records, from the noise of their seeds and of the segment."""
        return self.sample_latents(self.build_condition(records), seeds, segment)

    def build_condition(self, records: Sequence[Record]) -> Condition:
        """The records' condition on the network's device."""
        return collate_records(records, max_text_tokens=self.max_text_tokens).to(self.device)

    @torch.no_grad()
    def sample_latents(self, condition: Condition, seeds: Sequence[int], segment: int) -> Tensor:
        """Latents (B C T H W) of a condition; equal seeds and segments give equal noise.

        H and W are those of the first frame, or of `spec` without one.
        """
        denoiser, keys = wan.make_denoiser(self.net, self.dtype), [(seed, 0, segment) for seed in seeds]
        sigmas, shape = self.sigmas, self.spec.latent_shape
        if condition.first_frame is not None:
            shape = (*shape[:2], *condition.first_frame.shape[-2:])
        return sample_student(denoiser, condition, sigmas=sigmas, latent_shape=shape, keys=keys, purpose="sample")

    def check_size(self, size: FrameSize) -> VideoSpec:
        """The student's videos at another size.

        ValueError if they are larger than the model's positions, or if the ranks that share one cannot divide it.
        """
        spec = replace(self.spec, height=size.height, width=size.width)
        check_positions(spec, self.net.config.rope_max_seq_len)
        check_context_parallel(self.ranks, tokens=spec.num_tokens, heads=self.net.config.num_attention_heads)
        return spec


def open_student(config: SampleConfig, *, streams: bool = False) -> StudentSampler:
    """Load a student onto its device; ValueError if it was distilled from another model.

    streams: its blocks stay in host memory, and pass through the GPU.
    """
    if config.compile:
        keep_compiled_code()
    source, dtype = find_student(config.checkpoint, config.model), getattr(torch, config.dtype)
    facts = source.facts
    check_model(config.model, facts, ("vae", "text_encoder"))
    spec, sizes = choose_sizes(config, facts)
    # A single video is shared by all ranks of torchrun; of many videos each rank samples its own.
    is_shared = config.data is None and int(os.environ.get("WORLD_SIZE", "1")) > 1
    ranks = start_process_group(config.device).world if is_shared else 1
    plan, device = ExecutionPlan(compiled=config.compile, ranks=ranks), pick_device(config.device)
    loras = (*source.loras, *parse_loras(config.base_lora or ()))
    home = torch.device("cpu") if streams else device
    if config.precision == FP8:
        meta_net = wan.build_meta_transformer(locate_model(config.model, ("transformer",)), dtype)
        check_fp8(meta_net, device)  # before gigabytes of weights are read
    net = load_student(
        source.path, plan, model=config.model, weights=config.weights, dtype=dtype, device=home, loras=loras
    )
    if config.precision == FP8:
        store_weights_in_fp8(net)
    # after all that changes the weights: their host copies are made here
    streamed = StreamedModule(net, net.blocks, device) if streams else None
    if streamed:
        streamed.move_to(device)
    sigmas = timestep_sigmas(config.timesteps, s=facts.shift) if config.timesteps else facts.sigmas
    student = StudentSampler(net, spec, sigmas, dtype, config.max_text_tokens, sizes=sizes, streamed_net=streamed)
    if not sizes:
        student.check_size(spec.frame_size)
    if config.precision == FP8:  # whose speed is not measured
        return student
    return replace(student, denoising_seconds=predict_seconds(student, spec))


def choose_sizes(config: SampleConfig, facts: checkpoints.StudentFacts) -> tuple[VideoSpec, tuple[FrameSize, ...]]:
    """The shape of the videos, and the sizes of which each picture takes the nearest; none if there is no choice.

    Of a student of several sizes those with the given height or width are left; if it knows none such, it is warned.
    """
    spec = config.video_spec(facts.spec)
    known = [
        size for size in facts.sizes if config.height in (None, size.height) and config.width in (None, size.width)
    ]
    if facts.sizes and not known:
        listed = ", ".join(map(str, facts.sizes))
        logging.warning("sample: %s is none of the sizes that the student was trained on: %s", spec.frame_size, listed)
    if not known:
        return spec, ()
    own = spec.frame_size if spec.frame_size in known else known[0]
    spec = replace(spec, height=own.height, width=own.width)
    return spec, (own, *(size for size in known if size != own)) if len(known) > 1 else ()


def check_positions(spec: VideoSpec, positions: int) -> None:
    """Raise ValueError for a video with more latent frames, rows or columns of tokens than a model has positions."""
    side = positions * SPACE_STRIDE * PATCH_SIZE
    for name, limit in {"num_frames": TIME_STRIDE * (positions - 1) + 1, "height": side, "width": side}.items():
        if vars(spec)[name] > limit:
            raise ValueError(f"{name}={vars(spec)[name]}: the model has positions up to {limit}; give a smaller number")


def predict_seconds(student: StudentSampler, spec: VideoSpec) -> float | None:
    """Seconds in which a student's GPUs denoise a video, as `plan` predicts them; None for devices of unknown speed."""
    card = None if student.device.type == "cpu" else find_card(torch.cuda.get_device_name(student.device))
    if card is None:
        return None
    is_half = student.dtype == torch.bfloat16
    kernel = kernel_name(choose_kernel("auto", half_on_gpu=is_half)) if is_half else planned_kernel("auto", card)
    size = TransformerSize.of(student.net.config)
    one = forward_seconds(size, spec, card, kernel, text_tokens=student.max_text_tokens)
    is_compiled = student.net.blocks[0].plan.compiled
    return denoising_seconds(one.total, steps=len(student.sigmas), gpus=student.ranks, compiled=is_compiled)


def load_student(
    path: Path,
    plan: ExecutionPlan,
    *,
    model: str,
    weights: str,
    dtype: torch.dtype,
    device: torch.device,
    loras: Sequence[LoraFile] = (),
) -> WanTransformer:
    """Read `weights` (ema or student) of a checkpoint, or a file or folder of another program, onto a device.

    LoRA files are added. No parameter requires a gradient. Raises ValueError if the student was distilled from another
    model or needs another sampler.
    """
    base = locate_model(model, ("transformer",))
    if not (path / checkpoints.STUDENT_FILE).is_file():
        net = empty_student(base, dtype, plan, device)
        read_weights(path, dict(net.named_parameters()), loras=loras)
        return net
    facts = checkpoints.read_facts(path)
    check_base(model, facts)
    check_sampler(path, facts)
    checkpoints.refuse_damaged(path, weights)
    adapter_settings = lora_settings(facts.config)
    if adapter_settings is None and not loras:
        net = empty_student(base, dtype, plan, device)
        load_stored(net, path, weights)
        return net
    # Adapters and files are added to float32 weights, so that the sum is rounded once.
    net_loras = trained_loras(facts) if adapter_settings else ()  # else the checkpoint has every weight
    net = wan.load_transformer(base, torch.float32, plan, net_loras).requires_grad_(False)
    if adapter_settings is None:
        load_stored(net, path, weights)
    else:
        load_merged(net, path, weights, adapter_settings)
    add_loras(net, loras)
    return wan.cast_parameters(net, dtype).to(device)


def empty_student(base: Path, dtype: torch.dtype, plan: ExecutionPlan, device: torch.device) -> WanTransformer:
    """A network of a located model on a device, whose weights are not filled yet and require no gradient."""
    net = wan.build_meta_transformer(base, dtype, plan)
    return wan.materialize_transformer(net, device).requires_grad_(False)


def load_stored(net: WanTransformer, checkpoint: Path, weights: str) -> None:
    """Fill a network with all weights of a checkpoint."""
    checkpoints.load_checkpoint(checkpoint, {f"{weights}.{name}": value for name, value in net.named_parameters()})


@torch.no_grad()
def add_loras(net: WanTransformer, loras: Sequence[LoraFile]) -> None:
    """Add LoRA files to a network's own weights."""
    parameters = dict(net.named_parameters())
    table = {name: MappedTensor(value) for name, value in parameters.items()}
    for name, deltas in read_deltas(loras, table).items():
        parameters[name].copy_(EditedTensor(table[name], deltas)[...])


def load_merged(net: WanTransformer, checkpoint: Path, weights: str, settings: LoraSettings) -> None:
    """Add the adapter `weights` (ema or student) of a checkpoint to a plain network's own weights."""
    layers = add_adapters(net, (weights,), settings)
    adapter = dict(AdapterView(net, layers, weights).named_parameters())
    checkpoints.load_checkpoint(checkpoint, {f"{weights}.{name}": value.data for name, value in adapter.items()})
    for name, layer in [(name, module) for name, module in net.named_modules() if module in layers]:
        layer.merge(False, [weights])  # False: without peft's check for non-finite weights
        net.set_submodule(name, layer.base_layer)  # the plain layer again, now with the sum
    net.requires_grad_(False)
