"""The two-sample test: equal sets cannot be told apart, known shifts are found, the answer is repeatable."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stage2_distill.evaluation.two_sample import (
    PIXEL_PATCH,
    SMALL_CLASSIFIER,
    SMALL_PIXELS,
    Accuracy,
    ClassifierSettings,
    FeatureSource,
    TokenWhitening,
    open_source,
    summarize_accuracy,
    tell_pixels_apart,
    two_sample_accuracy,
)

TINY = replace(SMALL_CLASSIFIER, width=8, max_steps=40, learning_rate=5e-3)


def make_videos(seed: int, *, count: int = 96, noise: float = 0.02) -> Tensor:
    """Videos (N 6 3 4 4) of a still picture, a little change in every frame and less noise."""
    generator = torch.Generator().manual_seed(seed)
    still = torch.randn((count, 6, 1, 2, 2), generator=generator).repeat_interleave(2, 3).repeat_interleave(2, 4)
    change = 0.1 * torch.randn((count, 6, 3, 1, 1), generator=generator)
    return still + change + noise * torch.randn((count, 6, 3, 4, 4), generator=generator)


def test_equal_sets_are_at_half_and_changes_are_found() -> None:
    one, other = make_videos(0), make_videos(1)
    same = two_sample_accuracy(one, other, seeds=(0,), device="cpu", settings=TINY)
    assert same.low <= 0.5 <= same.high
    assert same.high - same.low < 0.4
    itself = two_sample_accuracy(one, one.clone(), seeds=(0,), device="cpu", settings=TINY)
    assert itself.mean == 0.5, "each video is right in one set and wrong in the other"
    louder = other.clone()
    louder[:, :, 1:] *= 2  # against the first frame, which is given
    found = two_sample_accuracy(louder, one, seeds=(0,), device="cpu", settings=TINY)
    assert found.low > 0.55


def test_small_noise_is_found_only_by_whitening() -> None:
    one, noisy = make_videos(0), make_videos(1, noise=0.06)
    plain = two_sample_accuracy(noisy, one, seeds=(0,), device="cpu", settings=replace(TINY, whiten=False))
    whitened = two_sample_accuracy(noisy, one, seeds=(0,), device="cpu", settings=TINY)
    assert whitened.low > 0.8
    assert plain.mean < whitened.mean - 0.2


def test_answer_depends_on_the_seed_alone() -> None:
    one, other = make_videos(0, count=16), make_videos(1, count=16, noise=0.06)
    first = two_sample_accuracy(one, other, seeds=(3,), device="cpu", settings=TINY)
    torch.manual_seed(5)
    assert two_sample_accuracy(one, other, seeds=(3,), device="cpu", settings=TINY) == first
    both = two_sample_accuracy(one, other, seeds=(3, 4), device="cpu", settings=TINY)
    assert both.values[0] == first.values[0]
    assert (len(both.values), both.count) == (2, 16)


def test_interval_counts_the_halves_as_one() -> None:
    right = torch.tensor([[1.0, 0.5, 0.5, 0.0, 1.0, 0.5, 0.5, 0.0]])  # variance 1/7
    half = 1.96 * (1 / 7 / 4) ** 0.5
    assert summarize_accuracy(right) == Accuracy(0.5, pytest.approx(0.5 - half), pytest.approx(0.5 + half), (0.5,), 8)
    assert summarize_accuracy(torch.ones(2, 8)) == Accuracy(1, 1, 1, (1, 1), 8)


def test_whitened_tokens_have_variance_one() -> None:
    videos = make_videos(0)
    features = TokenWhitening(videos, ClassifierSettings())(videos)
    assert features.shape == (96, 48, 2, 2, 2)  # 24 directions of the tokens and 24 of their changes
    for part in features.split(24, dim=1):
        torch.testing.assert_close(part.movedim(1, 0).flatten(1).cov(), torch.eye(24), atol=1e-3, rtol=0)
    constant = TokenWhitening(torch.zeros(8, 1, 2, 2, 2), ClassifierSettings())(torch.zeros(2, 1, 2, 2, 2))
    assert torch.equal(constant, torch.zeros(2, 8, 1, 1, 1))


def test_pixels_are_tested_as_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (2, 16, 3, 5, 16, 24), dtype=torch.uint8, generator=generator)
    frames[1, :, :, 1:] //= 2
    settings = replace(TINY, patch=PIXEL_PATCH)
    assert two_sample_accuracy(frames[0], frames[1], seeds=(0,), device="cpu", settings=settings).low > 0.7
    few = two_sample_accuracy(
        frames[0, :, :, [0, 4]], frames[1, :, :, [0, 4]], seeds=(5,), device="cpu", settings=SMALL_PIXELS
    )
    found = tell_pixels_apart(frames[0], frames[1], 5, device="cpu")
    assert found == (few.mean, few.low, few.high), "one frame for each latent frame"


def test_features_that_do_not_fit_are_computed_for_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    sets, rows = (make_videos(0), make_videos(1)), torch.arange(48)
    kept = open_source(sets, rows, torch.device("cpu"), TINY)
    monkeypatch.setattr("stage2_distill.evaluation.two_sample.CACHE_BYTES", 0)
    computed: FeatureSource = open_source(sets, rows, torch.device("cpu"), TINY)
    assert (kept.whitening, computed.sets) == (None, sets)
    torch.testing.assert_close(computed.take(1, rows[5:9]), kept.take(1, rows[5:9]), atol=1e-5, rtol=1e-5)


def test_sets_that_cannot_be_tested_are_refused() -> None:
    videos = make_videos(0, count=8)
    for other in (videos[:7], videos[:, :, :2], videos[0]):
        with pytest.raises(ValueError, match="one, other: shapes .* give two equal ones"):
            two_sample_accuracy(videos, other, seeds=(0,), device="cpu")
    with pytest.raises(ValueError, match="one, other: hold values that are not finite"):
        two_sample_accuracy(videos, videos / 0, seeds=(0,), device="cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_repeats_its_answer() -> None:
    one, other = make_videos(0).cuda(), make_videos(1, noise=0.06).cuda()
    first = two_sample_accuracy(other, one, seeds=(0,), device="cuda", settings=TINY)
    assert first.mean > 0.8
    assert two_sample_accuracy(other, one, seeds=(0,), device="cuda", settings=TINY) == first
