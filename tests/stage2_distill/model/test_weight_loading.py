"""Reading weights: errors, and the memory that a rank needs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from common.options import write_config
from stage2_distill.model.wan import load_transformer
from stage2_distill.model.weight_loading import read_weights
from stage2_distill.weight_files.stored_weights import WEIGHTS_FILE
from tests.stage2_distill.training_helpers import ROOT, make_config, run_torchrun


@pytest.fixture
def model_copy(model: Path, tmp_path: Path) -> Path:
    """A model folder whose transformer a test may damage."""
    shutil.copytree(model / "transformer", tmp_path / "model" / "transformer")
    return tmp_path / "model"


def test_loaded_network_equals_the_stored_one(model: Path) -> None:
    stored, read = WanTransformer3DModel.from_pretrained(model / "transformer"), load_transformer(model, torch.float32)
    for name, value in {**stored.state_dict(), **dict(stored.named_buffers())}.items():
        assert torch.equal(value, {**read.state_dict(), **dict(read.named_buffers())}[name]), name


def rewrite(folder: Path, change) -> None:
    path = folder / "transformer" / WEIGHTS_FILE
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("proj_out.bias"), r"lacks 1 of \d+ weights, such as proj_out.bias \(head.head.bias\)"),
        (lambda t: t.update(more=torch.ones(1)), "holds 1 tensors that the model does not have, such as more"),
        (
            lambda t: t.update({"proj_out.bias": torch.ones(7)}),
            r"proj_out.bias has shape \[7\], the model needs \[192\]",
        ),
    ],
)
def test_unexpected_weights_are_refused(model_copy: Path, change, words: str) -> None:
    rewrite(model_copy, change)
    with pytest.raises(ValueError, match=words):
        load_transformer(model_copy, torch.float32)


def test_damaged_file_is_named(model_copy: Path) -> None:
    path = model_copy / "transformer" / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=f"{WEIGHTS_FILE}: cannot be read"):
        load_transformer(model_copy, torch.float32)
    path.unlink()
    with pytest.raises(ValueError, match=f"holds no {WEIGHTS_FILE}"):
        read_weights(model_copy / "transformer", {})
    (model_copy / "transformer" / "config.json").unlink()
    with pytest.raises(ValueError, match="no readable config.json"):
        load_transformer(model_copy, torch.float32)


# Bytes per stored byte (float32): 3 roles, an average, 2 moments; or 3 roles in bf16, 2 x (remainder, 8-bit moment).
@pytest.mark.parametrize(
    ("ranks", "change", "times"),
    [(2, {}, 6), (1, {"optimizer_form": "compact", "dtype": "bfloat16"}, 3)],
    ids=["standard", "compact"],
)
def test_rank_needs_memory_for_its_part_and_one_file(
    model: Path, tmp_path: Path, ranks: int, change: dict[str, str], times: int
) -> None:
    net = WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=96, in_channels=48, out_channels=48, text_dim=16, ffn_dim=1536,
        num_layers=16, rope_max_seq_len=64,
    )  # fmt: skip
    net.save_pretrained(tmp_path / "model" / "transformer", max_shard_size="64MB")
    files = [path.stat().st_size for path in (tmp_path / "model" / "transformer").glob("*.safetensors")]
    assert len(files) >= 3
    assert sum(files) > 150e6
    write_config(tmp_path / "config", make_config(tmp_path, tmp_path / "model", tmp_path / "out", **change))
    result = run_torchrun(
        [str(ROOT / "tests" / "stage2_distill" / "memory_probe.py"), str(tmp_path / "config"), str(model)], ranks
    )
    assert result.returncode == 0, result.stderr[-2000:]
    for rank in range(ranks):
        figures = json.loads((tmp_path / f"config.{rank}").read_text())
        assert figures["own"] == pytest.approx(times * sum(files) / ranks, rel=0.02)
        assert figures["grown"] < figures["own"] + max(files)
