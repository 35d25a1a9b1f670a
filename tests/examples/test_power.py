"""The table of what the two-sample test finds: its rows; on a GPU, a small shift in thousands of true clips."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan

from examples.nano.power import change_contrast, encode_clips, format_accuracy, table_rows
from stage2_distill.evaluation.two_sample import Accuracy, ClassifierSettings, two_sample_accuracy

MODEL = Path(__file__).parents[2] / "examples" / "nano" / "model"


def test_rows_say_what_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def share(one: torch.Tensor, other: torch.Tensor, *, settings: ClassifierSettings, **_: object) -> Accuracy:
        mean = 0.5 + 10 * float((one - other).abs().mean()) * (2 if settings.whiten else 1)
        return Accuracy(mean, mean - 0.05, mean + 0.05, (mean,), len(one))

    monkeypatch.setattr("examples.nano.power.two_sample_accuracy", share)
    clips = torch.ones(4, 2, 3, 2, 2)
    rows = list(table_rows({"the same": clips}, [2], [1.0, 1.01], "cpu", (0,)))
    assert rows[0] == "| clips | against | test | contrast 1 | contrast 1.01 |" and rows[1] == "|---|---|---|---|---|"
    assert rows[2] == "| 2 | the same | whitened | 0.500 [0.450, 0.550] | **0.633 [0.583, 0.683]** |"
    assert rows[3] == "| 2 | the same | plain | 0.500 [0.450, 0.550] | **0.567 [0.517, 0.617]** |"
    assert format_accuracy(Accuracy(0.52, 0.5, 0.54, (0.52,), 8)).startswith("0.520"), "not above 0.5"
    assert change_contrast(clips, 2.0)[0, 0, :, 0, 0].tolist() == [1, 2, 2], "the first frame is given"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_one_percent_of_contrast_is_found_in_thousands_of_clips() -> None:
    device = torch.device("cuda")
    clips = encode_clips(AutoencoderKLWan.from_pretrained(MODEL / "vae").to(device), device, 0, 4096)
    itself = two_sample_accuracy(clips, clips.clone(), seeds=(0,), device=device)
    assert itself.low <= 0.5 <= itself.high
    found = two_sample_accuracy(change_contrast(clips, 1.01), clips, seeds=(0,), device=device)
    assert found.low > 0.55
