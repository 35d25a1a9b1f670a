"""A tiny model whose layers have sizes for products in 8 bits."""

import shutil
from pathlib import Path

import pytest
from diffusers import WanTransformer3DModel


@pytest.fixture(scope="session")
def fp8_model(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny model with a transformer of width 32 instead of 24."""
    folder = tmp_path_factory.mktemp("fp8") / "model"
    shutil.copytree(model, folder)
    config = WanTransformer3DModel.load_config(folder / "transformer")
    net = WanTransformer3DModel.from_config(dict(config) | {"attention_head_dim": 16, "ffn_dim": 64})
    for weight in net.parameters():
        weight.data.mul_(3 if weight.dim() > 1 else 1)  # so that the blocks do something
    shutil.rmtree(folder / "transformer")
    net.save_pretrained(folder / "transformer")
    return folder
