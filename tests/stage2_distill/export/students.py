"""Small checkpoints with random weights, without training, for tests of exports."""

import warnings
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from common.model_folder import fingerprint_folder
from stage2_distill.checkpointing.format import SAMPLER_KIND, STUDENT_FILE, StudentFacts, write_json
from stage2_distill.checkpointing.writer import build_storage_writer
from stage2_distill.model.lora import LoraSettings
from stage2_distill.model.split_float32 import split_master
from stage2_distill.model.wan import load_transformer
from stage2_distill.weight_files.key_names import is_matrix, split_parameter
from tests.stage2_distill.training_helpers import SPEC

STEPS = {2: (1000.0, 500.0), 3: (1000.0, 2000 / 3, 1000 / 3), 4: (1000.0, 750.0, 500.0, 250.0)}
STEPS[8] = tuple(1000.0 - 125 * step for step in range(8))


def shifted_weights(model: Path, seed: int, scale: float = 0.02) -> dict[str, Tensor]:
    """The base's weights with random changes, float32."""
    draws = torch.Generator().manual_seed(seed)
    named = load_transformer(model, torch.float32).named_parameters()
    return {name: one.detach() + scale * torch.randn(one.shape, generator=draws) for name, one in named}


def adapter_weights(model: Path, seed: int, rank: int) -> dict[str, Tensor]:
    """Random factors of every matrix of the blocks."""
    draws, tensors = torch.Generator().manual_seed(seed), {}
    for name, one in load_transformer(model, torch.float32).named_parameters():
        if is_matrix(name):
            module = split_parameter(name)[0]
            tensors[f"{module}.lora_A.weight"] = torch.randn(rank, one.shape[1], generator=draws)
            tensors[f"{module}.lora_B.weight"] = 0.1 * torch.randn(one.shape[0], rank, generator=draws)
    return tensors


def make_student(
    folder: Path,
    model: Path,
    *,
    timesteps: tuple[float, ...] = STEPS[4],
    compact: bool = False,
    adapters: LoraSettings | None = None,
    shift: float = 5.0,
) -> Path:
    """Write a checkpoint whose student and average differ from each other and from the base."""

    def weights(seed: int) -> dict[str, Tensor]:
        return adapter_weights(model, seed, adapters.rank) if adapters else shifted_weights(model, seed)

    student, average = weights(1), weights(2)
    tensors = {f"ema.{name}": value for name, value in average.items()}
    for name, value in student.items():
        high, low = split_master(value) if compact else (value, None)
        tensors[f"student.{name}"] = high
        if low is not None:
            tensors[f"student_optimizer.{name}.remainder"] = low
    folder.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(tensors, storage_writer=build_storage_writer(folder, tensors, 1), no_dist=True)
    options = {"shards": ["/secret/data"], "out": "/secret/run", "guidance_scale": 7.0, "model": str(model)}
    options |= {"lora_rank": adapters.rank, "lora_alpha": adapters.alpha} if adapters else {}
    facts = StudentFacts(
        iteration=500, ladder=timesteps, shift=shift, sampler=SAMPLER_KIND, spec=SPEC, base_model=str(model),
        transformer=fingerprint_folder(model / "transformer"), vae=fingerprint_folder(model / "vae"),
        text_encoder=fingerprint_folder(model / "text_encoder"), config=options,
    )  # fmt: skip
    write_json(folder / STUDENT_FILE, asdict(facts))
    return folder
