"""Pixel metrics of pictures with known answers; the judge; small models in place of CLIP and I3D."""

from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from stage1_encode.video_metrics import clip_score, custom_judge, frame_metrics, i3d_features
from tests import tiny_models

GREY = numpy.full((32, 32, 3), 100, numpy.uint8)


class FakeI3d(torch.nn.Module):
    """Has the call of an I3D file; its two features are the mean of the first channel and the number of frames."""

    def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
        return torch.stack([x[:, 0].mean(dim=(1, 2, 3)), torch.full((x.shape[0],), float(x.shape[2]))], dim=1)


def test_psnr() -> None:
    grey = torch.from_numpy(GREY)
    result = frame_metrics.psnr(torch.stack([grey, grey]), torch.stack([grey, grey + 10]))
    assert result.tolist() == [100, pytest.approx(20 * numpy.log10(255 / 10))]


def test_motion_saturation_contrast() -> None:
    video = numpy.stack([GREY, GREY + 51, GREY])
    coloured = video.copy()
    coloured[..., 0] = 255  # the others are 100, 151, 100
    both = torch.from_numpy(numpy.stack([video, coloured]))
    assert frame_metrics.frame_motion(both).tolist() == pytest.approx([0.2, 0.2 * 2 / 3])
    assert frame_metrics.frame_motion(both[:, :1]).tolist() == [0, 0]
    assert frame_metrics.colour_saturation(both).tolist() == pytest.approx([0, (155 + 104 + 155) / 3 / 255])
    half = numpy.zeros((2, 1, 4, 4, 3), numpy.uint8)
    half[1, :, :2] = 255
    assert frame_metrics.frame_contrast(torch.from_numpy(half)).tolist() == pytest.approx([0, 0.5])


def test_a_judge_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text("def judge(video, prompt):\n    return {'red': bool(video[0, 0, 0, 0] > 128)}\n")
    judge = custom_judge.load_judge(str(tmp_path / "judge.py"))
    assert judge(torch.from_numpy(GREY[None, None]), ["a"]) == [{"red": False}]
    (tmp_path / "all.py").write_text(
        "def judge(v, p):\n    pass\ndef judge_all(v, p):\n    return [{'n': len(v) == 2}] * 2\n"
    )
    assert custom_judge.load_judge(str(tmp_path / "all.py"))(torch.zeros(2, 1), ["a", "b"]) == [
        {"n": True},
        {"n": True},
    ]
    result = custom_judge.true_shares([{"a": True, "b": [True, False]}, {"a": False}, {"a": True, "b": [False, False]}])
    assert result == {"a": pytest.approx(2 / 3), "b": 0.25}
    (tmp_path / "only.py").write_text("def judge_all(v, p):\n    return [{'n': len(v) == 2}] * 2\n")
    assert custom_judge.load_judge(str(tmp_path / "only.py"))(torch.zeros(2, 1), ["a", "b"]) == [
        {"n": True},
        {"n": True},
    ]
    values = [numpy.bool_(True), torch.tensor(False), 1, numpy.array([True, False]), (True, torch.tensor(True)), []]
    assert custom_judge.true_shares([{"a": value} for value in values]) == {"a": pytest.approx(5 / 7)}
    (tmp_path / "none.py").write_text("x = 1\n")
    for name in ("none.py", "gone.py"):
        with pytest.raises(ValueError, match=f"judge=.*{name}"):
            custom_judge.load_judge(str(tmp_path / name))


def test_i3d_features(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    torch.jit.script(FakeI3d()).save(str(tmp_path / "i3d.pt"))
    video = numpy.stack([GREY] * 5)
    result = i3d_features.extract_i3d_features(i3d_features.load_i3d(str(tmp_path / "i3d.pt"), cpu), video, cpu)
    assert result.tolist() == pytest.approx([100 / 127.5 - 1, 5])
    (tmp_path / "bad.pt").write_text("no")
    with pytest.raises(ValueError, match="bad.pt"):
        i3d_features.load_i3d(str(tmp_path / "bad.pt"), cpu)


def test_clip_score(tmp_path: Path) -> None:
    size = tiny_models.make_tokenizer(tmp_path)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = {"vocab_size": size, "max_position_embeddings": 24, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 0}
    config = CLIPConfig(
        text_config=small | words, vision_config=small | {"image_size": 32, "patch_size": 16}, projection_dim=8
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(tmp_path)
    model = clip_score.load_clip(str(tmp_path), torch.device("cpu"))
    video = numpy.stack([tiny_models.picture(40, 64, seed=2)] * 3)
    score = clip_score.clip_score(model, video, "moves right")
    assert -100 <= score <= 100
    assert score == pytest.approx(clip_score.clip_score(model, video[:1], "moves right"), abs=1e-3), (
        "a mean over equal frames"
    )
    assert score != pytest.approx(clip_score.clip_score(model, video, "the left left left"), abs=1e-3)
    with pytest.raises(ValueError, match="config.json"):
        clip_score.load_clip(str(tmp_path / "none"), torch.device("cpu"))
    weights = load_file(tmp_path / "model.safetensors")
    del weights["logit_scale"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"clip_model=.*: lacks weights \(logit_scale\)"):
        clip_score.load_clip(str(tmp_path), torch.device("cpu"))
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"clip_model=.*: holds no \.safetensors weights"):
        clip_score.load_clip(str(tmp_path), torch.device("cpu"))
