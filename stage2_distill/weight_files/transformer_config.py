"""The configuration of a transformer, as diffusers writes it, of a folder or file of weights in any form."""

import json
from math import prod
from pathlib import Path
from typing import Any

from common.files import read_file
from stage2_distill.weight_files.stored_weights import StoredTensors, read_raw_table, read_weight_table

HEAD_SIZE = 128  # of every published Wan; other sizes are in config.json or in a file's metadata
CONFIG_FILE, HEADS_KEY = "config.json", "num_attention_heads"


def read_transformer_config(path: Path) -> dict[str, Any]:
    """diffusers' configuration: from its own config.json, else from the shapes of the tensors.

    ValueError if neither is there, or the file is that of another model.
    """
    settings = read_settings(path / CONFIG_FILE) if path.is_dir() else {}
    if "num_layers" in settings and "in_channels" in settings:  # diffusers' own
        return settings
    if path.is_dir() and not settings:
        raise ValueError(f"model={path}: has no readable {CONFIG_FILE}; copy the model again")
    if settings.get("model_type", "ti2v") != "ti2v":
        kind = settings["model_type"]
        raise ValueError(f"model={path}: is a Wan model of type {kind}; this project needs Wan2.2-TI2V-5B")
    metadata = {} if path.is_dir() else read_raw_table(path)[1]
    heads = settings.get("num_heads") or metadata.get(HEADS_KEY)
    return infer_config(path, read_weight_table(path), None if heads is None else int(heads))


def read_settings(path: Path) -> dict[str, Any]:
    """Content of a JSON file; empty if it cannot be read or is no object."""
    try:
        loaded = json.loads(read_file(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def infer_config(path: Path, tensors: StoredTensors, heads: int | None) -> dict[str, Any]:
    """The configuration that the shapes of the tensors imply."""
    try:
        width, channels, *patch = tensors["patch_embedding.weight"].get_shape()
        feed_forward = tensors["blocks.0.ffn.net.0.proj.weight"].get_shape()[0]
        text_width = tensors["condition_embedder.text_embedder.linear_1.weight"].get_shape()[1]
        frequencies = tensors["condition_embedder.time_embedder.linear_1.weight"].get_shape()[1]
        outputs = tensors["proj_out.weight"].get_shape()[0]
    except KeyError as error:
        raise ValueError(f"{path}: lacks {error.args[0]}; download or copy it again") from error
    layers = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    heads = heads or width // HEAD_SIZE
    if heads < 1 or width % heads:
        raise ValueError(f"{path}: a width of {width} fits no heads of {HEAD_SIZE}; give a folder with {CONFIG_FILE}")
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": patch,
        HEADS_KEY: heads,
        "attention_head_dim": width // heads,
        "in_channels": channels,
        "out_channels": outputs // prod(patch),
        "text_dim": text_width,
        "freq_dim": frequencies,
        "ffn_dim": feed_forward,
        "num_layers": layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
    }
