"""The text encoder against transformers' own, and the batches of prompts."""

from pathlib import Path

import torch
from transformers import UMT5EncoderModel

from stage1_encode import text


def test_the_text_encoder_is_the_one_of_transformers_in_fewer_passes(model: Path) -> None:
    theirs = UMT5EncoderModel.from_pretrained(model / "text_encoder").eval()
    with torch.no_grad():
        for index, weight in enumerate(p for n, p in theirs.named_parameters() if "layer_norm" in n):
            weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(index))
        ids = torch.randint(3, 200, (3, 20), generator=torch.Generator().manual_seed(0))
        expected = theirs(ids).last_hidden_state
        ours = text.fused(theirs)
        kinds = {type(module).__name__ for module in ours.modules()}
        assert {"RMSNorm", "GELU"} <= kinds and not {"UMT5LayerNorm", "NewGELUActivation"} & kinds
        torch.testing.assert_close(ours(ids).last_hidden_state, expected, rtol=1e-5, atol=1e-5)


def test_prompts_are_padded_within_their_batch_only() -> None:
    tokens = [[1] * length for length in (9, 2, 30, 3, 2, 29)]
    groups = text.group(tokens, 60)
    assert groups == [[1, 4, 3, 0], [5, 2]]
    assert all(len(group) * max(len(tokens[place]) for place in group) <= 60 for group in groups)
    assert text.group([[1] * 100], 60) == [[0]]
