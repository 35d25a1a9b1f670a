"""The size of a model on this machine, in any layout."""

from pathlib import Path

from common.model_folder import locate_model, locate_part
from stage2_distill.planning.network_size import TransformerSize
from stage2_distill.weight_files.transformer_config import read_transformer_config


def read_model_size(model: str) -> TransformerSize:
    """The size of a model's transformer; ValueError if there is none."""
    if not Path(model).exists():
        raise ValueError(f"model={model}: no such folder or file; check the path")
    folder = locate_model(model, ("transformer",)) if Path(model).is_dir() else Path(model)
    return TransformerSize.of(read_transformer_config(locate_part(folder, "transformer")))
