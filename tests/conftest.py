"""What all tests share: the tiny model, clips, and a data set encoded from them."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from stage1_encode.config import EncodeConfig
from stage1_encode.encode import encode
from tests import tiny_models
from tests.forked import stop_server

# One thread per process, here and in the processes that tests start: `make test` runs two workers at once, and threads
# that wait for each other on busy cores made whole tests four times slower.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def forks_end() -> Iterator[None]:
    """Let the process of tests/forked.py end before coverage is added up."""
    yield
    stop_server()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random model."""
    return tiny_models.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def fp8_model(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny model with a transformer of width 32 instead of 24: sizes for products in 8 bits."""
    folder = tmp_path_factory.mktemp("fp8") / "model"
    shutil.copytree(model, folder)
    config = WanTransformer3DModel.load_config(folder / "transformer")
    net = WanTransformer3DModel.from_config(dict(config) | {"attention_head_dim": 16, "ffn_dim": 64})
    for weight in net.parameters():
        weight.data.mul_(3 if weight.dim() > 1 else 1)  # so that the blocks do something
    shutil.rmtree(folder / "transformer")
    net.save_pretrained(folder / "transformer")
    return folder


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of 6 clips of 64x96 and their clips.csv."""
    return tiny_models.make_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory, model: Path, clips: Path) -> Path:
    """Folder of the clips' data set: 9 frames of 64x96, two shards of 4 and 2 records, float32 encoders."""
    out = tmp_path_factory.mktemp("data") / "set"
    encode(
        EncodeConfig(
            data=str(clips / "clips.csv"),
            model=str(model),
            out=str(out),
            num_frames=9,
            height=64,
            width=96,
            shard_size=4,
            text_dtype="float32",
            device="cpu",
            workers=1,
        )
    )
    return out
