"""The student of a checkpoint, whatever its form and number of ranks, tensor by tensor in bounded memory.

Three forms: all weights in float32 (standard), bf16 weights with their remainders (compact), adapters on a base (LoRA).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from common.model_folder import locate_model, locate_part
from common.progress import track_progress
from stage2_distill.checkpointing.format import (
    StudentFacts,
    load_checkpoint,
    read_facts,
    refuse_damaged,
    resolve_checkpoint,
    stored_shapes,
)
from stage2_distill.model.lora import LoraSettings, lora_settings
from stage2_distill.model.split_float32 import join_master
from stage2_distill.sampling.student_source import check_base, check_sampler, trained_loras
from stage2_distill.weight_files.key_names import split_parameter
from stage2_distill.weight_files.safetensors_writer import TensorShape
from stage2_distill.weight_files.stored_weights import StoredTensors, read_weight_table

GROUP_BYTES = 2**30  # of a checkpoint that are in memory at once
FACTORS = ("lora_A", "lora_B")  # (rank, inputs) and (outputs, rank)
STORED_PREFIX = {"average": "ema", "student": "student"}  # of the tensors in a checkpoint


@dataclass(frozen=True)
class StudentWeights:
    """One set of weights of a checkpoint, over the base that it was distilled from; names are those of diffusers."""

    checkpoint: Path
    facts: StudentFacts
    prefix: str  # of the set's tensors in the checkpoint
    base: StoredTensors
    adapters: LoraSettings | None  # None = all weights were trained
    stored: Mapping[str, TensorShape] = field(repr=False)  # everything in the checkpoint

    def shapes(self, dtype: torch.dtype) -> dict[str, TensorShape]:
        """Shape of every weight of the full network, in the base's order, as it is written in a dtype."""
        return {name: TensorShape(tuple(one.get_shape()), dtype) for name, one in self.base.items()}

    def read_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the full network, with a progress bar: as stored, or for adapters the float32 sum with the base."""
        return track_progress(self._full_network(), total=len(self.base), label="export")

    def _full_network(self) -> Iterator[tuple[str, Tensor]]:
        if self.adapters is None:
            yield from self.read_stored(list(self.base))
            return
        pairs = dict(self.read_adapters())
        for name, one in self.base.items():
            weight, (module, suffix) = one[...], split_parameter(name)
            if module not in pairs or suffix != ".weight":  # adapters have no part in biases
                yield name, weight
                continue
            first, second = pairs[module]
            yield name, weight.float() + (second @ first) * self.adapters.scale

    def read_adapters(self) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
        """Yield each adapted module with its factors A (rank, inputs) and B (outputs, rank), without alpha / rank."""
        assert self.adapters is not None
        ending = f".{FACTORS[0]}.weight"
        start = len(self.prefix) + 1
        modules = [key[start:].removesuffix(ending) for key in self.stored if self._is_own(key, ending)]
        names = [f"{module}.{factor}.weight" for module in modules for factor in FACTORS]
        tensors = self.read_stored(names)
        for module in modules:
            yield module, (next(tensors)[1], next(tensors)[1])

    def read_stored(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors of the set in the given order; the student of the compact form in exact float32."""
        for group in self._groups(names):
            keys = [key for name in group for key in self._keys(name)]
            values = {key: torch.empty(self.stored[key].shape, dtype=self.stored[key].dtype) for key in keys}
            load_checkpoint(self.checkpoint, dict(values))  # joins the slices of all ranks
            for name in group:
                weight, *remainder = (values[key] for key in self._keys(name))
                yield name, join_master(weight, remainder[0]) if remainder else weight

    def _keys(self, name: str) -> list[str]:
        """Keys of a weight in the checkpoint: itself, and in the compact form the other bits of the student's."""
        own, remainder = f"{self.prefix}.{name}", f"{self.prefix}_optimizer.{name}.remainder"
        if own not in self.stored:
            raise ValueError(f"{self.checkpoint}: lacks {own}; it was distilled from another model")
        return [own, remainder] if remainder in self.stored else [own]

    def _is_own(self, key: str, ending: str) -> bool:
        return key.startswith(f"{self.prefix}.") and key.endswith(ending)

    def _groups(self, names: Sequence[str]) -> Iterator[list[str]]:
        group, size = list[str](), 0
        for name in names:
            own = sum(self.stored[key].num_bytes for key in self._keys(name))
            if group and size + own > GROUP_BYTES:
                yield group
                group, size = [], 0
            group.append(name)
            size += own
        if group:
            yield group


def open_student_weights(checkpoint: str, model: str, weights: str) -> StudentWeights:
    """The set `weights` (average or student) of a checkpoint or run.

    ValueError if the student was distilled from another model than `model` or needs another sampler.
    """
    folder = resolve_checkpoint(Path(checkpoint))
    facts = read_facts(folder)
    check_base(model, facts)
    check_sampler(folder, facts)
    refuse_damaged(folder, STORED_PREFIX[weights])
    adapters = lora_settings(facts.config)
    loras = trained_loras(facts) if adapters else ()  # the base of the adapters
    base = read_weight_table(locate_part(locate_model(model, ("transformer",)), "transformer"), loras)
    stored = {name: TensorShape(*entry) for name, entry in stored_shapes(folder).items()}
    return StudentWeights(folder, facts, STORED_PREFIX[weights], base, adapters, stored)


def cast_weight(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in another precision; ValueError if it is not finite, then or before."""
    cast = weight.to(dtype)
    if not cast.isfinite().all():
        label = str(dtype).removeprefix("torch.")
        reason = "is too large; use bfloat16" if weight.isfinite().all() else "is not finite; take another checkpoint"
        raise ValueError(f"dtype={label}: {name} {reason}")
    return cast
