"""The text encoder against transformers' own, and the batches of prompts."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import UMT5EncoderModel

from stage1_encode.models import text_encoder
from tests import tiny_models

CPU = torch.device("cpu")


def test_the_text_encoder_is_the_one_of_transformers_in_fewer_passes(model: Path) -> None:
    theirs = UMT5EncoderModel.from_pretrained(model / "text_encoder").eval()
    with torch.no_grad():
        for index, weight in enumerate(p for n, p in theirs.named_parameters() if "layer_norm" in n):
            weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(index))
        ids = torch.randint(3, 200, (3, 20), generator=torch.Generator().manual_seed(0))
        expected = theirs(ids).last_hidden_state
        ours = text_encoder.fuse_layers(theirs)
        kinds = {type(module).__name__ for module in ours.modules()}
        assert {"RMSNorm", "GELU"} <= kinds and not {"UMT5LayerNorm", "NewGELUActivation"} & kinds
        torch.testing.assert_close(ours(ids).last_hidden_state, expected, rtol=1e-5, atol=1e-5)


def test_prompts_are_padded_within_their_batch_only() -> None:
    tokens = [[1] * length for length in (9, 2, 30, 3, 2, 29)]
    groups = text_encoder.group_by_length(tokens, 60)
    assert groups == [[1, 4, 3, 0], [5, 2]]
    assert all(len(group) * max(len(tokens[place]) for place in group) <= 60 for group in groups)
    assert text_encoder.group_by_length([[1] * 100], 60) == [[0]]


def test_a_text_encoder_without_a_weight_is_refused(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    tiny_models.lose_weight(folder / "text_encoder", "encoder.block.0.layer.0.SelfAttention.q.weight")
    said = r"^model=.*/text_encoder: lacks weights \(encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight\); .*$"
    with pytest.raises(ValueError, match=said):
        text_encoder.load_text_encoder(folder, dtype=torch.float32, device=CPU)


def test_the_embedding_may_have_either_name(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    (path,) = (folder / "text_encoder").glob("*.safetensors")
    weights = load_file(path)
    weights["encoder.embed_tokens.weight"] = weights.pop("shared.weight")
    save_file(weights, path, metadata={"format": "pt"})
    found, whole = (
        text_encoder.load_text_encoder(place, dtype=torch.float32, device=CPU).model for place in (folder, model)
    )
    assert torch.equal(found.encoder.embed_tokens.weight, whole.encoder.embed_tokens.weight)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"])
def test_broken_weights_are_one_line_with_their_folder(content: bytes, model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    next((folder / "text_encoder").glob("*.safetensors")).write_bytes(content)
    with pytest.raises(ValueError, match=r"^model=.*/text_encoder: cannot be read: [^\n]*header[^\n]*$"):
        text_encoder.load_text_encoder(folder, dtype=torch.float32, device=CPU)
