"""A checkpoint and conditions in, latents out. Shapes: B batch, C channels, T latent frames, H W latent size."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from common.condition import Condition
from common.device import OffloadedTensors, pick_device
from common.model_folder import fingerprint_folder, locate_model
from common.seed import draw_normal, make_generator
from common.video import TEXT_LENGTH, VideoSpec
from shards.record import Record, collate_records
from stage2_distill.checkpointing.format import (
    SAMPLER_KIND,
    StudentFacts,
    load_checkpoint,
    read_facts,
    resolve_checkpoint,
)
from stage2_distill.distributed.process_group import start_process_group
from stage2_distill.dmd.rollout import rollout
from stage2_distill.model.context_parallel import check_context_parallel
from stage2_distill.model.layers import ExecutionPlan
from stage2_distill.model.lora import AdapterView, LoraSettings, add_adapters, lora_settings
from stage2_distill.model.transformer import WanTransformer
from stage2_distill.model.wan import build_meta_transformer, cast_parameters, make_denoiser, materialize_transformer
from stage2_distill.model.wan import load_transformer as load_network
from stage2_distill.sampling.config import SampleConfig


@dataclass(frozen=True)
class StudentSampler:
    """A student, ready to sample."""

    net: WanTransformer
    spec: VideoSpec
    sigmas: tuple[float, ...]
    dtype: torch.dtype
    max_text_tokens: int = TEXT_LENGTH

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.net.parameters()).device

    @cached_property
    def tensors(self) -> OffloadedTensors:
        """The network's."""
        return OffloadedTensors([*self.net.parameters(), *self.net.buffers()])

    def move_to(self, device: torch.device) -> None:
        """Bring the network to a device."""
        self.tensors.move_to(device)

    def __call__(self, records: Sequence[Record], seeds: Sequence[int], segment: int = 0) -> Tensor:
        """Latents (B C T H W) of records, from the noise of their seeds and of the segment."""
        return self.sample_latents(self.build_condition(records), seeds, segment)

    def build_condition(self, records: Sequence[Record]) -> Condition:
        """What the network sees of records, on its device."""
        return collate_records(records, max_text_tokens=self.max_text_tokens).condition.to(self.device)

    @torch.no_grad()
    def sample_latents(self, condition: Condition, seeds: Sequence[int], segment: int) -> Tensor:
        """Latents (B C T H W) of conditions; the same noise for the same seeds and segment."""
        generators = [make_generator(seed, 0, segment, "sample", self.device) for seed in seeds]
        noise = draw_normal(self.spec.latent_shape, generators)
        return rollout(make_denoiser(self.net, self.dtype), noise, condition, sigmas=self.sigmas, generators=generators)


def open_student(config: SampleConfig) -> StudentSampler:
    """The student of a checkpoint, on its device; ValueError where MODEL is not the one it was distilled from."""
    checkpoint = resolve_checkpoint(Path(config.checkpoint))
    facts = read_facts(checkpoint)
    check_model(config.model, facts)
    spec = config.video_spec(facts.spec)
    ranks = (
        start_process_group(config.device).world
        if config.data is None and int(os.environ.get("WORLD_SIZE", "1")) > 1
        else 1
    )
    net = load_student(
        checkpoint,
        facts,
        ExecutionPlan(compiled=config.compile, ranks=ranks),
        model=config.model,
        weights=config.weights,
        dtype=getattr(torch, config.dtype),
        device=pick_device(config.device),
    )
    check_context_parallel(ranks, tokens=spec.num_tokens, heads=net.config.num_attention_heads)
    sigmas = config.explicit_sigmas(facts.shift) or facts.sigmas
    return StudentSampler(net, spec, sigmas, getattr(torch, config.dtype), config.max_text_tokens)


def check_model(model: str, facts: StudentFacts, parts: tuple[str, ...] = ("vae", "text_encoder")) -> None:
    """ValueError where parts of MODEL are not those that the student was distilled with."""
    for part in parts:
        if fingerprint_folder(locate_model(model, (part,)) / part) != vars(facts)[part]:
            raise ValueError(f"model={model}: its {part} is not the one that the student was distilled with")


def load_student(
    checkpoint: Path,
    facts: StudentFacts,
    plan: ExecutionPlan | None = None,
    *,
    model: str,
    weights: str,
    dtype: torch.dtype,
    device: torch.device,
) -> WanTransformer:
    """The student's network in its precision, read straight onto the device.

    ValueError where MODEL is another base than it was distilled from.
    """
    folder = locate_model(model, ("transformer",))
    if fingerprint_folder(folder / "transformer") != facts.transformer:
        raise ValueError(f"model={model}: not the model that {checkpoint} was distilled from, {facts.base_model}")
    if facts.sampler != SAMPLER_KIND:
        raise ValueError(f"{checkpoint}: its student is sampled by {facts.sampler}, which this version cannot do")
    adapter_settings = lora_settings(facts.config)
    if adapter_settings is None:
        net = materialize_transformer(build_meta_transformer(folder, dtype, plan), device).requires_grad_(False)
        load_checkpoint(checkpoint, {f"{weights}.{name}": weight for name, weight in net.named_parameters()})
        return net
    net = load_network(folder, torch.float32, plan).requires_grad_(False)
    load_merged(net, checkpoint, weights, adapter_settings)
    return cast_parameters(net, dtype).to(device)


def load_merged(net: WanTransformer, checkpoint: Path, weights: str, settings: LoraSettings) -> None:
    """Add the adapter `weights` (student or ema) of a checkpoint to a plain network's own weights."""
    layers = add_adapters(net, (weights,), settings)
    load_checkpoint(
        checkpoint,
        {f"{weights}.{name}": value.data for name, value in AdapterView(net, layers, weights).named_parameters()},
    )
    for name, layer in [(name, module) for name, module in net.named_modules() if module in layers]:
        layer.merge(False, [weights])
        parent, _, child = name.rpartition(".")
        net.get_submodule(parent).add_module(child, layer.base_layer)
    net.requires_grad_(False)
