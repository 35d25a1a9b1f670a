"""Comparison of candidates: metrics with known values, samplers, resuming, `--select` and errors."""

import json
import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch

from common.condition import Condition
from examples.nano.shapes import count_floors
from shards import latent_store
from shards.comparison import Comparison, latent_set_name
from shards.manifest import read_manifest, write_manifest
from stage2_distill.checkpointing.format import list_checkpoints, prune_checkpoints, resolve_checkpoint, write_best
from stage2_distill.dmd.rollout import rollout, sample_euler
from stage2_distill.evaluation.compare import open_evaluation, set_digest, split_records, teacher_samplers
from stage2_distill.evaluation.compare import sample_comparison as sample_opened
from stage2_distill.evaluation.config import EvaluateConfig
from stage2_distill.evaluation.latent_metrics import (
    CandidateScores,
    accuracy_statistics,
    frechet_distance,
    rank_candidates,
    reference_seeds,
    rms_distance,
    score_candidates,
    seed_diversity,
    seed_statistics,
    teacher_errors,
)
from stage2_distill.evaluation.selection import check_run, rank_checkpoints, write_best_checkpoint
from stage2_distill.evaluation.two_sample import Accuracy, ClassifierSettings
from tests.stage2_distill import training_helpers


@pytest.fixture(scope="module")
def workspace(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set and a run of two checkpoints."""
    folder = tmp_path_factory.mktemp("evaluate")
    training_helpers.make_shards(folder / "data", model)
    training_helpers.run_here(training_helpers.make_config(folder / "data", model, folder / "run"))
    return folder


def sample_comparison(evaluation: EvaluateConfig) -> Comparison:
    setting = open_evaluation(evaluation)
    if evaluation.select:
        run = check_run(evaluation.checkpoint[0])
        write_best_checkpoint(run, [rank_checkpoints(setting)], rank=0)
    return sample_opened(setting)


def make_evaluation(workspace: Path, model: Path, out: Path, **changes: object) -> EvaluateConfig:
    base = EvaluateConfig(
        (str(workspace / "run"),), str(workspace / "data"), str(model), str(out), num_records=8,
        seeds=(0, 1), teacher_steps=6, videos=0, batch_size=4, dtype="float32", device="cpu",
    )  # fmt: skip
    return replace(base, **changes)


def read_set(out: Path, comparison: Comparison, name: str, seed: int) -> torch.Tensor:
    candidate = next(c for c in comparison.contestants if c.name == name)
    return latent_store.read_latent_rows(out / "latents.zarr", latent_set_name(candidate, seed), 0, comparison.count)


def test_frechet_of_known_gaussians() -> None:
    draws = torch.randn((4000, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert frechet_distance(draws, draws) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(draws, draws + 2) == pytest.approx(12)  # only the means differ: 3 x 2^2
    assert frechet_distance(draws, 3 * draws) == pytest.approx(  # (3 - 1)^2 of every variance, and the means'
        4 * float(draws.var(0).sum()) + 4 * float(draws.mean(0).square().sum())
    )


def test_distance_and_diversity_count_the_free_frames() -> None:
    a = torch.zeros(2, 48, 3, 2, 2)
    b = a.clone()
    b[:, :, 0] = 100  # given
    b[1, :, 1:] = 3
    assert rms_distance(a, b).tolist() == [0, 3]
    assert seed_diversity([a, b, a]).tolist() == pytest.approx([0, 2])  # pairs 3, 3, 0


def test_interval_is_students_t() -> None:
    statistics = seed_statistics((1.0, 2.0, 3.0))
    assert (statistics.mean, statistics.deviation) == (2, 1)
    assert statistics.high == pytest.approx(2 + 4.303 / 3**0.5)
    assert seed_statistics((5.0,)).deviation is None


def test_interval_of_an_accuracy_counts_conditions_and_seeds() -> None:
    one = accuracy_statistics([(0.6, 0.5, 0.7)])
    assert (one.mean, one.low, one.high, one.deviation) == (0.6, pytest.approx(0.5), pytest.approx(0.7), None)
    two = accuracy_statistics([(0.9, 0.6, 1.0), (0.7, 0.4, 1.0)])  # cut at 1
    half = math.hypot(0.3, 1.96 * 0.02**0.5 / 2**0.5)
    assert (two.mean, two.low, two.high) == (pytest.approx(0.8), pytest.approx(0.8 - half), 1.0)


def test_euler_follows_the_flow_of_a_gaussian() -> None:
    """For N(0, s^2) data x0 = s^2 (1-t) x / ((1-t)^2 s^2 + t^2), and the flow takes noise n to s n."""
    s = 0.5

    def denoise(x: torch.Tensor, sigma: torch.Tensor, condition: Condition) -> torch.Tensor:
        t = sigma[0]
        return s * s * (1 - t) * x / ((1 - t) ** 2 * s * s + t * t)

    noise = torch.randn((1, 2, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    condition = Condition(None, torch.zeros(1, 1, 1))
    errors = [
        float((sample_euler(denoise, noise, condition, sigmas=[1 - i / n for i in range(n)]) - s * noise).abs().max())
        for n in (50, 400)
    ]
    assert errors[0] < 0.1
    assert errors[1] < errors[0] / 6  # first order


def settings_as_accuracy(
    one: torch.Tensor, other: torch.Tensor, *, seeds: Sequence[int], device: torch.device, settings: ClassifierSettings
) -> Accuracy:
    """Stands for the two-sample test, whose training takes its time."""
    assert one.shape == other.shape and device.type in ("cpu", "cuda")
    mean = 0.6 + 0.1 * settings.whiten + 0.1 * seeds[0]
    return Accuracy(mean, mean - 0.1, mean + 0.1, (mean,), len(one))


def test_candidates_share_noise_and_get_scores(
    workspace: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = sample_comparison(make_evaluation(workspace, model, tmp_path))
    assert [one.evaluations for one in comparison.contestants] == [12, 8, 4, 4]
    monkeypatch.setattr("stage2_distill.evaluation.latent_metrics.MIN_TESTED", 8)
    monkeypatch.setattr("stage2_distill.evaluation.latent_metrics.two_sample_accuracy", settings_as_accuracy)
    scores = score_candidates(tmp_path / "latents.zarr", comparison, device="auto")
    student = scores["student"]
    assert [len(one.values) for one in (student.accuracy, student.accuracy_plain)] == [2, 2], (
        "one per seed of the noise"
    )
    assert 0 <= student.accuracy.low <= student.accuracy.mean <= student.accuracy.high <= 1
    assert scores["teacher"].to_teacher == (0, 0)
    assert scores["teacher-few"].to_teacher[0] < scores["undistilled"].to_teacher[0]  # both use Euler steps
    assert scores["student"].frechet != scores["undistilled"].frechet
    assert min(scores["teacher"].frechet) > 0
    floor, *others = (fmean(scores[one.name].frechet) for one in comparison.contestants)
    assert count_floors(tmp_path / "latents.zarr", comparison) == pytest.approx([one / floor for one in others])
    first, second = read_set(tmp_path, comparison, "student", 0), read_set(tmp_path, comparison, "student", 1)
    assert not torch.equal(first[:, :, 1:], second[:, :, 1:])
    other_batches = sample_comparison(make_evaluation(workspace, model, tmp_path / "one", batch_size=3))
    torch.testing.assert_close(read_set(tmp_path / "one", other_batches, "student", 0), first, atol=1e-4, rtol=1e-4)


def test_repeated_command_samples_only_missing_sets(
    workspace: Path, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sample_comparison(make_evaluation(workspace, model, tmp_path, seeds=(0,)))
    capfd.readouterr()
    sample_comparison(make_evaluation(workspace, model, tmp_path, seeds=(0,)))
    assert "sample" not in capfd.readouterr().err
    sample_comparison(make_evaluation(workspace, model, tmp_path, seeds=(0,), guidance_scale=3.0))
    log = capfd.readouterr().err
    assert "teacher-seed-0" in log
    assert "undistilled" not in log  # it uses no guidance


def test_a_set_that_lost_a_chunk_is_sampled_again_and_named(
    workspace: Path, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    evaluation = make_evaluation(workspace, model, tmp_path, seeds=(0,))
    comparison = sample_comparison(evaluation)
    before = read_set(tmp_path, comparison, "teacher", 0)
    chunks = tmp_path / "latents.zarr" / "teacher-seed-0" / "latents" / "c"
    shutil.rmtree(chunks)
    with pytest.raises(ValueError, match="teacher-seed-0: the chunk of .* is missing"):
        score_candidates(tmp_path / "latents.zarr", comparison)
    capfd.readouterr()
    with caplog.at_level(logging.WARNING):
        sample_comparison(evaluation)
    assert f"{chunks}/0/0/0/0/0, is missing" in caplog.text
    assert "the set teacher-seed-0 is sampled again" in caplog.text
    assert "student" not in capfd.readouterr().err  # the other sets are kept
    torch.testing.assert_close(read_set(tmp_path, comparison, "teacher", 0), before, rtol=0, atol=0)


def test_references_are_independent_sets() -> None:
    assert reference_seeds((0, 1, 2)) == (1, 2, 0)
    assert reference_seeds((4,)) == (5,)
    assert reference_seeds((0, 7)) == (7, 8)


def test_select_writes_the_best_checkpoint_for_sampling(
    workspace: Path, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = workspace / "run"
    monkeypatch.setattr("stage2_distill.evaluation.latent_metrics.MIN_TESTED", 2)
    monkeypatch.setattr("stage2_distill.evaluation.latent_metrics.two_sample_accuracy", settings_as_accuracy)
    try:
        comparison = sample_comparison(make_evaluation(workspace, model, tmp_path, select=True))
        table = json.loads((tmp_path / "selection.json").read_text())
        best = min(table, key=lambda row: (row["rank"], row["mean"]))["checkpoint"]
        assert sum(row["rank"] for row in table) == pytest.approx(3), "ranks 1 and 2, or ties"
        means = [[row[key]["mean"] for key in ("accuracy_plain", "accuracy")] for row in table]
        assert means == [[pytest.approx(0.65), pytest.approx(0.75)]] * 2
        assert [row["errors"][6] for row in table] == [pytest.approx(0.15)] * 2, "of the plain test"
        names = {path.name for path in (tmp_path / "latents.zarr").iterdir() if path.is_dir()}
        assert {"select-teacher-seed-0", "teacher-seed-0"} <= names
        assert [row["checkpoint"] for row in table] == ["step-000003", "step-000006"]
        assert json.loads((run / "best").read_text())["checkpoint"] == best
        assert best in next(one for one in comparison.contestants if one.name == "student").sets
        write_best(run, "step-000003", distance=1.0, iteration=3)
        with caplog.at_level(logging.INFO):
            assert resolve_checkpoint(run).name == "step-000003"
        assert "step-000003, the best" in caplog.text
        write_best(run, "step-000009", distance=1.0, iteration=9)
        with pytest.raises(ValueError, match="step-000009, is gone"):
            resolve_checkpoint(run)
    finally:
        (run / "best").unlink(missing_ok=True)
    assert resolve_checkpoint(run).name == "step-000006"


def test_selection_never_uses_the_records_of_the_table() -> None:
    assert split_records(20000, 8192) == (8192, 8192)
    assert split_records(10000, 8192) == (7500, 2500)  # a quarter at least
    assert split_records(8, 8) == (6, 2)
    with pytest.raises(ValueError, match="select: the data set has 7 records"):
        split_records(7, 7)


def test_ranks_count_every_measure_once() -> None:
    half, found = (seed_statistics([value]) for value in (0.5, 0.8))
    near = CandidateScores((1.0,), (9.0,), 1.0, 0.0, (1.0,), (1.0,), (1.01,), (1.0,), (1.0,), found, half)
    far = replace(near, frechet=(0.5,), tanh_frechet=(3.0,), sharpness=(0.9,), accuracy_plain=found, to_teacher=(0.0,))
    assert teacher_errors(near, 2.0) == pytest.approx([1, 1, 1, 0.01, 0, 0, 0, 0.5])
    assert teacher_errors(replace(near, accuracy=half), 2.0) == teacher_errors(near, 2.0), "the whitened test saturates"
    # far is better by one distance, worse by three measures, equal by four; the same-noise distance does not count
    assert rank_candidates({"near": near, "far": far}, 2.0) == {"near": (3 + 2 + 4 * 1.5) / 8, "far": (6 + 1 + 6) / 8}


def test_pruning_keeps_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        (tmp_path / f"step-{step:06d}").mkdir()
        (tmp_path / f"step-{step:06d}" / "student.json").write_text("{}")
    write_best(tmp_path, "step-000001", distance=1.0, iteration=1)
    prune_checkpoints(tmp_path, keep_last=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000001", "step-000003"]


def test_errors_name_the_option(workspace: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint"):
        sample_comparison(make_evaluation(workspace, model, tmp_path, checkpoint=(str(tmp_path),)))
    with pytest.raises(ValueError, match="--select chooses"):
        one_checkpoint = (str(workspace / "run" / "step-000003"),)
        sample_comparison(make_evaluation(workspace, model, tmp_path, checkpoint=one_checkpoint, select=True))
    with pytest.raises(ValueError, match="^num_frames=0: the VAE needs 4k"):
        open_evaluation(make_evaluation(workspace, model, tmp_path, num_frames=0))
    with pytest.raises(ValueError, match="seeds=1,1"):
        make_evaluation(workspace, model, tmp_path, seeds=(1, 1))
    short = shutil.copytree(workspace / "run" / "step-000003", tmp_path / "short")
    text = (short / "student.json").read_text()
    (short / "student.json").write_text(text.replace('"num_frames": 9', '"num_frames": 5'))
    with pytest.raises(ValueError, match=f"checkpoint={short}: 5 frames; a distance needs 9 or more"):
        sample_comparison(make_evaluation(workspace, model, tmp_path / "out", checkpoint=(str(short),)))
    for part in ("vae", "transformer"):
        changed = shutil.copytree(model, tmp_path / part)
        settings = json.loads((model / part / "config.json").read_text()) | {"decides_something": 1}
        (changed / part / "config.json").write_text(json.dumps(settings))
        with pytest.raises(ValueError, match=f"model={changed}: its {part} is not the one .* use {model}$"):
            sample_comparison(make_evaluation(workspace, changed, tmp_path / "out"))


def test_digest_depends_on_the_negative_prompt(workspace: Path, model: Path, tmp_path: Path) -> None:
    evaluation = make_evaluation(workspace, model, tmp_path / "out")
    data = shutil.copytree(evaluation.shards, tmp_path / "data")
    manifest = read_manifest(data)
    write_manifest(data, manifest, torch.ones(3, training_helpers.TEXT_DIM))
    changed = replace(evaluation, shards=str(data))
    assert open_evaluation(evaluation).records_digest != open_evaluation(changed).records_digest


def test_sets_of_the_teacher_are_those_of_its_lora_files(workspace: Path, model: Path, tmp_path: Path) -> None:
    setting = open_evaluation(make_evaluation(workspace, model, tmp_path))
    teacher, *_ = teacher_samplers(setting)
    digests = set()
    for content, weight in (("a", 1.0), ("b", 1.0), ("a", 0.5)):
        facts = replace(
            setting.facts, config=setting.facts.config | {"base_lora": [f"f:{weight}"]}, base_loras=(content,)
        )
        digests.add(set_digest(replace(setting, facts=facts), teacher, 0))
    assert len(digests | {set_digest(setting, teacher, 0)}) == 4


def test_students_of_other_lora_files_are_compared_apart(
    workspace: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stage2_distill.evaluation.compare.teacher_weights", lambda facts: str(facts.iteration))
    runs = tuple(map(str, list_checkpoints(workspace / "run")))
    assert len(runs) == 2
    with pytest.raises(ValueError, match=f"checkpoint={runs[1]}: its teacher has other base_lora files"):
        open_evaluation(make_evaluation(workspace, model, tmp_path, checkpoint=runs))


def test_one_step_of_euler_equals_the_rollout() -> None:
    """One step from sigma 1: Euler and the rollout agree there, which ties the two samplers together."""
    condition, noise = Condition(None, torch.zeros(1, 1, 1)), torch.randn(1, 2, 3, 2, 2)
    draws = [torch.Generator().manual_seed(0)]
    one = rollout(lambda x, s, c: 0.3 * x, noise, condition, sigmas=[1.0], generators=draws)
    torch.testing.assert_close(one, sample_euler(lambda x, s, c: 0.3 * x, noise, condition, sigmas=[1.0]))
