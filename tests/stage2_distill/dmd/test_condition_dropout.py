"""Batches in which some samples have a first frame and some have not, and first frames that are not quite sure."""

import dataclasses
from pathlib import Path

import pytest
import torch

from common.condition import Condition, concat_conditions, frame_sigma, free_mean, pin
from common.video import VideoSpec
from shards.record import Record, RecordSource, collate_records
from stage2_distill.config import DistillConfig
from stage2_distill.dmd.condition_dropout import ConditionDropout
from stage2_distill.dmd.losses import critic_loss, dmd_loss
from stage2_distill.dmd.schedule import MicroBatch
from stage2_distill.model.wan import guided, load_transformer, make_denoiser
from tests.stage2_distill.training_helpers import make_config, make_shards, run_here, tensors

SHAPE = (48, 3, 4, 4)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def part(*samples: int, iteration: int = 0) -> MicroBatch:
    return MicroBatch(iteration, "student", samples, samples, 1.0, True, VideoSpec(), 0)


def dropout(**changes: object) -> ConditionDropout:
    return DistillConfig(shards=("d",), model="m", out="o", **changes).select(ConditionDropout)


def conditions(count: int) -> Condition:
    return Condition(normal(count, 48, 1, 4, 4, seed=0), normal(count, 512, 16, seed=1))


def test_a_mixed_batch_equals_its_samples_one_by_one(model: Path) -> None:
    """Prediction, loss and gradient; the third sample has a first frame with a time of its own."""
    net = load_transformer(model, torch.float32).requires_grad_(False)
    whole = dataclasses.replace(
        conditions(3), given=torch.tensor([True, False, True]), frame_time=torch.tensor([0.0, 0.3, 0.03])
    )
    frame, text = whole.first_frame, whole.text
    alone = [
        Condition(frame[:1], text[:1]),
        Condition(None, text[1:2]),
        Condition(frame[2:], text[2:], frame_time=torch.tensor([0.03])),
    ]
    x0, eps, sigma = normal(3, *SHAPE, seed=2), normal(3, *SHAPE, seed=3), torch.tensor([0.2, 0.6, 0.9])
    plain = make_denoiser(net, torch.float32)
    teacher = guided(plain, negative_text=normal(512, 16, seed=4), scale=3.0)

    def values(rows: slice, condition: Condition) -> tuple[torch.Tensor, ...]:
        leaf = x0[rows].clone().requires_grad_()
        draws = {"sigma": sigma[rows], "eps": eps[rows]}
        student = dmd_loss(leaf, condition, teacher=teacher, critic=plain, **draws)
        student.backward()
        critic = critic_loss(leaf, condition, critic=plain, kind="flow", **draws)
        return teacher(x0[rows], sigma[rows], condition), leaf.grad, student.detach(), critic

    together = values(slice(None), whole)
    single = [values(slice(i, i + 1), condition) for i, condition in enumerate(alone)]
    torch.testing.assert_close(together[0], torch.cat([s[0] for s in single]), rtol=0, atol=2e-5)
    torch.testing.assert_close(3 * together[1], torch.cat([s[1] for s in single]), rtol=1e-3, atol=1e-7)
    for place in (2, 3):
        assert together[place].item() == pytest.approx(sum(s[place].item() for s in single) / 3, rel=1e-5)
    assert together[1][0, :, 0].abs().max() == 0
    assert together[1][1, :, 0].abs().max() > 0


def test_pin_and_times_follow_each_sample() -> None:
    whole = dataclasses.replace(
        conditions(3), given=torch.tensor([True, False, True]), frame_time=torch.tensor([0.0, 0.3, 0.03])
    )
    x = normal(3, *SHAPE, seed=5)
    pinned = pin(x, whole)
    assert torch.equal(pinned[0, :, 0], whole.first_frame[0, :, 0])
    assert torch.equal(pinned[1], x[1])
    assert torch.equal(pinned[2, :, 1:], x[2, :, 1:])
    times = frame_sigma(torch.tensor([0.5, 0.5, 0.5]), whole)
    assert times[:, 0].tolist() == pytest.approx([0, 0.5, 0.015])
    assert times[:, 1].tolist() == [0.5] * 3
    assert free_mean(x, whole)[0].item() == pytest.approx(x[0, :, 1:].mean().item(), abs=1e-6)
    assert free_mean(x, whole)[1].item() == pytest.approx(x[1].mean().item(), abs=1e-6)
    assert torch.equal(concat_conditions([whole, whole]).given, whole.given.repeat(2))


def test_who_loses_the_first_frame_depends_on_the_sample_alone() -> None:
    shares = dropout(text_only_fraction=0.3, first_frame_jitter=0.2)
    whole = shares.augment(conditions(4000), part(*range(4000)))
    assert 1 - whole.given.float().mean().item() == pytest.approx(0.3, abs=0.03)
    noisy = whole.frame_time > 0
    assert noisy.float().mean().item() == pytest.approx(0.2, abs=0.03)
    logs = whole.frame_time[noisy].log()
    assert logs.mean().item() == pytest.approx(-3.5, abs=0.08)
    assert logs.std().item() == pytest.approx(0.5, abs=0.05)
    some = shares.augment(conditions(2), part(17, 3999))
    assert some.given.tolist() == whole.given[[17, 3999]].tolist()
    assert torch.equal(some.frame_time, whole.frame_time[[17, 3999]])
    later = shares.augment(conditions(4000), part(*range(4000), iteration=1))
    assert not torch.equal(later.given, whole.given)


def test_without_the_knobs_a_condition_stays_as_it_is() -> None:
    condition = conditions(2)
    assert dropout().augment(condition, part(0, 1)) is condition
    text_only = Condition(None, condition.text)
    assert dropout(text_only_fraction=0.5, first_frame_jitter=1.0).augment(text_only, part(0, 1)) is text_only


def test_records_of_both_kinds_share_a_batch() -> None:
    frame, text = normal(48, 1, 4, 4, seed=0), normal(3, 16, seed=1)
    records = [Record(str(i), RecordSource("p", "", i), frame if i % 2 else None, text) for i in range(3)]
    condition = collate_records(records)
    assert condition.given.tolist() == [False, True, False]
    assert torch.equal(condition.first_frame[1], frame)
    assert condition.first_frame[0].abs().max() == 0
    assert collate_records(records[::2]).first_frame is None
    assert collate_records(records[1:2]).given is None


def test_the_run_does_not_depend_on_the_batch_size(model: Path, tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "data", model)
    found = []
    for batch_size in (1, 4):
        changes = {"batch_size": batch_size, "iterations": 2, "checkpoint_every": 2, "eps": 1e-2}
        changes |= {"text_only_fraction": 0.5, "first_frame_jitter": 0.5}
        found.append(tensors(run_here(make_config(shards, model, tmp_path / str(batch_size), **changes))))
    for name in ("student.proj_out.weight", "critic.blocks.0.ffn.net.2.weight"):
        torch.testing.assert_close(found[0][name], found[1][name], rtol=0, atol=1e-6)
    plain = make_config(shards, model, tmp_path / "plain", batch_size=4, iterations=2, checkpoint_every=2, eps=1e-2)
    assert not torch.equal(tensors(run_here(plain))["critic.proj_out.weight"], found[1]["critic.proj_out.weight"])
