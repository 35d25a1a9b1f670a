"""Samples latents from the teacher: the base model with many guided steps.

Shapes: B batch, C channels, T latent frames, H W latent size, L text rows, D text width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from common.device import MovableTensors, OffloadedTensors
from common.flow import shift
from common.model_folder import locate_model
from common.seed import draw_normal, make_generator
from common.video import VideoSpec
from shards.record import Record, collate_records
from stage2_distill.checkpointing.format import StudentFacts
from stage2_distill.config import DistillConfig
from stage2_distill.dmd.rollout import sample_euler
from stage2_distill.model.transformer import WanTransformer
from stage2_distill.model.wan import guided, load_transformer, make_denoiser
from stage2_distill.sampling.student_source import trained_loras


@dataclass(frozen=True)
class TeacherSampler:
    """The base model, ready to sample from the noise that a student with the same seed starts from."""

    net: WanTransformer
    spec: VideoSpec
    sigmas: tuple[float, ...]  # noise levels of the steps, falling
    guidance_scale: float
    negative_text: Tensor  # (L D), padded like the records' text
    dtype: torch.dtype  # in which the network computes
    streamed_net: MovableTensors | None = None  # the network, if its blocks pass through the GPU one by one

    @cached_property
    def tensors(self) -> MovableTensors:
        """The network's parameters and buffers."""
        return self.streamed_net or OffloadedTensors([*self.net.parameters(), *self.net.buffers()])

    def move_to(self, device: torch.device) -> None:
        """Move the network to a device."""
        self.tensors.move_to(device)

    @torch.no_grad()
    def __call__(self, records: Sequence[Record], seeds: Sequence[int], segment: int = 0) -> Tensor:
        """Latents (B C T H W) of records, from the noise of their seeds and of the segment."""
        device = next(self.net.parameters()).device
        condition = collate_records(records, max_text_tokens=len(self.negative_text)).to(device)
        negative = self.negative_text.to(device)
        denoiser = guided(make_denoiser(self.net, self.dtype), negative_text=negative, scale=self.guidance_scale)
        # the purpose is that of the student, so that both start from equal noise
        generators = [make_generator(seed, 0, segment, "sample", device) for seed in seeds]
        noise = draw_normal(self.spec.latent_shape, generators)
        return sample_euler(denoiser, noise, condition, sigmas=self.sigmas)


def load_teacher(model: str, facts: StudentFacts, *, dtype: torch.dtype, device: torch.device) -> WanTransformer:
    """The network that a student was distilled from, on a device; no parameter requires a gradient."""
    folder = locate_model(model, ("transformer",))
    return load_transformer(folder, dtype, loras=trained_loras(facts)).to(device).requires_grad_(False)


def teacher_sigmas(facts: StudentFacts, steps: int) -> tuple[float, ...]:
    """Noise levels of the teacher's steps, falling from 1, evenly spaced before the student's shift."""
    return tuple(shift(1 - step / steps, facts.shift) for step in range(steps))


def teacher_guidance(facts: StudentFacts, requested: float | None) -> float:
    """The teacher's guidance scale: the requested one, else that of the student's distillation."""
    stored = facts.config.get("guidance_scale", DistillConfig.guidance_scale)
    return float(str(stored if requested is None else requested))
