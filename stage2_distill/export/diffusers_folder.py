"""The format `diffusers`: a complete pipeline folder for the stock WanPipeline and WanImageToVideoPipeline.

The VAE, the text encoder and the tokenizer are linked or copied as files; nothing of them is loaded.
"""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from common.model_folder import locate_part
from stage2_distill.checkpointing.format import StudentFacts
from stage2_distill.export.scheduler import OWN_FILE, OWN_MODULE, scheduler_config, scheduler_entry
from stage2_distill.weight_files.safetensors_writer import SHARD_BYTES, TensorShape, write_model_folder
from stage2_distill.weight_files.transformer_config import read_transformer_config

COPIED_PARTS = ("vae", "text_encoder", "tokenizer")
INDEX_FILE = "model_index.json"
LINKED_BYTES = 2**20  # a file from this size on is linked if the file system can; smaller ones may be edited later


def write_diffusers_folder(
    folder: Path,
    model: Path,
    facts: StudentFacts,
    tensors: Iterable[tuple[str, Tensor]],
    shapes: dict[str, TensorShape],
) -> None:
    """Write the pipeline of a student, distilled from the model folder `model`, into an empty folder."""
    transformer = folder / "transformer"
    transformer.mkdir()
    write_json(transformer / "config.json", read_transformer_config(locate_part(model, "transformer")))
    write_model_folder(transformer, shapes, tensors, shard_bytes=SHARD_BYTES)
    for part in COPIED_PARTS:
        path = locate_part(model, part)
        if path != model / part:
            raise ValueError(f"model={model}: has the original {part}; a pipeline needs a folder in diffusers' layout")
        copy_part(path, folder / part)
    write_scheduler(folder / "scheduler", facts)
    write_json(folder / INDEX_FILE, build_index(model, facts))


def write_scheduler(folder: Path, facts: StudentFacts) -> None:
    """Write the scheduler that visits a student's sigmas, with its class if no stock one can."""
    folder.mkdir()
    write_json(folder / "scheduler_config.json", scheduler_config(facts.sigmas))
    if scheduler_entry(facts.sigmas)[0] == OWN_MODULE:
        shutil.copyfile(OWN_FILE, folder / OWN_FILE.name)


def build_index(model: Path, facts: StudentFacts) -> dict[str, Any]:
    """Content of model_index.json: that of the base, with the student's scheduler and steps."""
    path = model / INDEX_FILE
    index = json.loads(path.read_bytes()) if path.is_file() else default_index(model)
    timesteps = [1000 * sigma for sigma in facts.sigmas]
    return index | {
        "expand_timesteps": True,  # one time per token: the first frame's is 0
        "scheduler": list(scheduler_entry(facts.sigmas)),
        # for servers with a pipeline for students of distribution matching distillation, such as vllm-omni
        "dmd2_config": {
            "num_inference_steps": len(timesteps),
            "denoising_timesteps": timesteps,
            "solver": "sde",
            "guidance_scale": 1.0,
        },
    }


def default_index(model: Path) -> dict[str, Any]:
    """The parts of a pipeline, for a base without model_index.json."""
    tokenizer = json.loads((model / "tokenizer" / "tokenizer_config.json").read_bytes())
    return {
        "_class_name": "WanImageToVideoPipeline",
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", tokenizer.get("tokenizer_class", "AutoTokenizer")],
    }


def copy_part(source: Path, target: Path) -> None:
    """Copy the files of one part of a model; large ones become hard links, which survive a move of either folder."""
    target.mkdir()
    for path in sorted(path for path in source.iterdir() if path.is_file()):
        real = path.resolve()  # the hub's cache holds links to its files
        if real.stat().st_size >= LINKED_BYTES and link_file(real, target / path.name):
            continue
        shutil.copyfile(real, target / path.name)


def link_file(source: Path, target: Path) -> bool:
    """Link a file; False if the file system cannot, for example because it is another one."""
    try:
        os.link(source, target)
    except OSError:
        return False
    return True


def write_json(path: Path, value: object) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
