"""Samples latents from a checkpoint. Shapes: B batch, C channels, T latent frames, H W latent size."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from common.condition import Condition
from common.device import OffloadedTensors, pick_device
from common.flow import timestep_sigmas
from common.model_folder import fingerprint_folder, locate_model, same_fingerprint
from common.video import TEXT_LENGTH, VideoSpec
from shards.record import Record, collate_records
from stage2_distill.checkpointing import format as checkpoints
from stage2_distill.distributed.process_group import start_process_group
from stage2_distill.dmd.rollout import sample_student
from stage2_distill.model import wan
from stage2_distill.model.context_parallel import check_context_parallel
from stage2_distill.model.layers import ExecutionPlan
from stage2_distill.model.lora import AdapterView, LoraSettings, add_adapters, lora_settings
from stage2_distill.model.transformer import WanTransformer
from stage2_distill.sampling.config import SampleConfig


@dataclass(frozen=True)
class StudentSampler:
    """A student that is ready to sample."""

    net: WanTransformer
    spec: VideoSpec
    sigmas: tuple[float, ...]  # noise levels of the steps, falling
    dtype: torch.dtype  # in which the network computes
    max_text_tokens: int = TEXT_LENGTH  # rows of padded text: fewer are faster

    @property
    def device(self) -> torch.device:
        """The network's current device."""
        return next(self.net.parameters()).device

    @cached_property
    def tensors(self) -> OffloadedTensors:
        """The network's parameters and buffers."""
        return OffloadedTensors([*self.net.parameters(), *self.net.buffers()])

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
        """Latents (B C T H W) of a condition; equal seeds and segments give equal noise."""
        denoiser, keys = wan.make_denoiser(self.net, self.dtype), [(seed, 0, segment) for seed in seeds]
        sigmas, shape = self.sigmas, self.spec.latent_shape
        return sample_student(denoiser, condition, sigmas=sigmas, latent_shape=shape, keys=keys, purpose="sample")


def open_student(config: SampleConfig) -> StudentSampler:
    """Load the student of a checkpoint onto its device; ValueError if it was distilled from another model."""
    checkpoint, dtype = checkpoints.resolve_checkpoint(Path(config.checkpoint)), getattr(torch, config.dtype)
    facts = checkpoints.read_facts(checkpoint)
    check_model(config.model, facts, ("vae", "text_encoder"))
    spec = config.video_spec(facts.spec)
    # A single video is shared by all ranks of torchrun; of many videos each rank samples its own.
    is_shared = config.data is None and int(os.environ.get("WORLD_SIZE", "1")) > 1
    ranks = start_process_group(config.device).world if is_shared else 1
    plan, device = ExecutionPlan(compiled=config.compile, ranks=ranks), pick_device(config.device)
    net = load_student(checkpoint, plan, model=config.model, weights=config.weights, dtype=dtype, device=device)
    check_context_parallel(ranks, tokens=spec.num_tokens, heads=net.config.num_attention_heads)
    sigmas = timestep_sigmas(config.timesteps, s=facts.shift) if config.timesteps else facts.sigmas
    return StudentSampler(net, spec, sigmas, dtype, config.max_text_tokens)


def check_model(model: str, facts: checkpoints.StudentFacts, parts: Sequence[str]) -> None:
    """Raise ValueError if a part of a model is not the one that the student was distilled with."""
    for part in parts:
        given, distilled = fingerprint_folder(locate_model(model, (part,)) / part), str(vars(facts)[part])
        if not same_fingerprint(given, distilled):
            raise ValueError(
                f"model={model}: its {part} is not the one of the distillation (fingerprint {given}, was {distilled}); "
                f"use {facts.base_model}"
            )


def load_student(
    checkpoint: Path, plan: ExecutionPlan, *, model: str, weights: str, dtype: torch.dtype, device: torch.device
) -> WanTransformer:
    """Read `weights` (ema or student) of a checkpoint directly onto a device; no parameter requires a gradient.

    Raises ValueError if the student was distilled from another model or needs another sampler.
    """
    facts = checkpoints.read_facts(checkpoint)
    check_model(model, facts, ("transformer",))
    if facts.sampler != checkpoints.SAMPLER_KIND:
        raise ValueError(f"{checkpoint}: needs the sampler {facts.sampler}, which this version does not have")
    folder, adapter_settings = locate_model(model, ("transformer",)), lora_settings(facts.config)
    if adapter_settings is None:
        net = wan.materialize_transformer(wan.build_meta_transformer(folder, dtype, plan), device).requires_grad_(False)
        stored = {f"{weights}.{name}": parameter for name, parameter in net.named_parameters()}
        checkpoints.load_checkpoint(checkpoint, stored)
        return net
    # Adapters are added to float32 weights, so that the sum is rounded once.
    net = wan.load_transformer(folder, torch.float32, plan).requires_grad_(False)
    load_merged(net, checkpoint, weights, adapter_settings)
    return wan.cast_parameters(net, dtype).to(device)


def load_merged(net: WanTransformer, checkpoint: Path, weights: str, settings: LoraSettings) -> None:
    """Add the adapter `weights` (ema or student) of a checkpoint to a plain network's own weights."""
    layers = add_adapters(net, (weights,), settings)
    adapter = dict(AdapterView(net, layers, weights).named_parameters())
    checkpoints.load_checkpoint(checkpoint, {f"{weights}.{name}": value.data for name, value in adapter.items()})
    for name, layer in [(name, module) for name, module in net.named_modules() if module in layers]:
        layer.merge(False, [weights])  # False: without peft's check for non-finite weights
        net.set_submodule(name, layer.base_layer)  # the plain layer again, now with the sum
    net.requires_grad_(False)
