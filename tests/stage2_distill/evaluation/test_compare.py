"""Evaluate: known answers of the metrics, the contest's samplers, resuming, select, and what goes wrong."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.condition import Condition
from shards import latent_store
from shards.comparison import Comparison, latent_set_name
from shards.manifest import read_manifest, write_manifest
from stage2_distill.checkpointing.format import list_checkpoints, prune_checkpoints, resolve_checkpoint, write_best
from stage2_distill.dmd.rollout import rollout, sample_euler
from stage2_distill.evaluation.compare import open_evaluation, sample_comparison
from stage2_distill.evaluation.config import EvaluateConfig
from stage2_distill.evaluation.latent_metrics import (
    frechet_distance,
    reference_seeds,
    rms_distance,
    score_candidates,
    seed_diversity,
    seed_statistics,
)
from tests.stage2_distill import training_helpers


@pytest.fixture(scope="module")
def way(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set and a run of two checkpoints."""
    folder = tmp_path_factory.mktemp("evaluate")
    training_helpers.make_shards(folder / "data", model)
    training_helpers.run_here(training_helpers.make_config(folder / "data", model, folder / "run"))
    return folder


def config(way: Path, model: Path, out: Path, **changes: object) -> EvaluateConfig:
    base = EvaluateConfig(
        (str(way / "run"),), str(way / "data"), str(model), str(out), num_records=8, seeds=(0, 1), teacher_steps=6,
        videos=0, batch_size=4, dtype="float32", device="cpu",
    )  # fmt: skip
    return replace(base, **changes)


def rows(out: Path, contest: Comparison, name: str, seed: int) -> torch.Tensor:
    one = next(c for c in contest.contestants if c.name == name)
    return latent_store.read_latent_rows(out / "latents.zarr", latent_set_name(one, seed), 0, contest.count)


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


def test_spread_is_students_t() -> None:
    found = seed_statistics((1.0, 2.0, 3.0))
    assert (found.mean, found.deviation) == (2, 1)
    assert found.high == pytest.approx(2 + 4.303 / 3**0.5)
    assert seed_statistics((5.0,)).deviation is None


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


def test_contest_starts_from_the_same_noise_and_scores(way: Path, model: Path, tmp_path: Path) -> None:
    contest = sample_comparison(config(way, model, tmp_path))
    assert [one.evaluations for one in contest.contestants] == [12, 8, 4, 4]
    found = score_candidates(tmp_path / "latents.zarr", contest)
    assert found["teacher"].to_teacher == (0, 0)
    assert found["teacher-few"].to_teacher[0] < found["undistilled"].to_teacher[0]  # Euler alike, re-noising not
    assert found["student"].frechet != found["undistilled"].frechet
    assert min(found["teacher"].frechet) > 0
    first, second = rows(tmp_path, contest, "student", 0), rows(tmp_path, contest, "student", 1)
    assert not torch.equal(first[:, :, 1:], second[:, :, 1:])
    sliced = config(way, model, tmp_path / "one", batch_size=3)
    again = sample_comparison(sliced)
    torch.testing.assert_close(rows(tmp_path / "one", again, "student", 0), first, atol=1e-4, rtol=1e-4)


def test_a_repeated_command_makes_only_what_is_missing(
    way: Path, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sample_comparison(config(way, model, tmp_path, seeds=(0,)))
    capfd.readouterr()
    sample_comparison(config(way, model, tmp_path, seeds=(0,)))
    assert "sample" not in capfd.readouterr().err
    sample_comparison(config(way, model, tmp_path, seeds=(0,), guidance_scale=3.0))
    made = capfd.readouterr().err
    assert "teacher-seed-0" in made
    assert "undistilled" not in made  # it knows no guidance


def test_references_are_independent_sets() -> None:
    assert reference_seeds((0, 1, 2)) == (1, 2, 0)
    assert reference_seeds((4,)) == (5,)
    assert reference_seeds((0, 7)) == (7, 8)


def test_select_names_the_nearest_checkpoint_and_sampling_uses_it(
    way: Path, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = way / "run"
    try:
        contest = sample_comparison(config(way, model, tmp_path, select=True))
        table = json.loads((tmp_path / "selection.json").read_text())
        wanted = min(table, key=lambda row: row["mean"])["checkpoint"]
        assert [row["checkpoint"] for row in table] == ["step-000003", "step-000006"]
        assert json.loads((run / "best").read_text())["checkpoint"] == wanted
        assert wanted in next(one for one in contest.contestants if one.name == "student").sets
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


def test_pruning_keeps_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        (tmp_path / f"step-{step:06d}").mkdir()
        (tmp_path / f"step-{step:06d}" / "student.json").write_text("{}")
    write_best(tmp_path, "step-000001", distance=1.0, iteration=1)
    prune_checkpoints(tmp_path, keep_last=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000001", "step-000003"]


def test_mistakes(way: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint"):
        sample_comparison(config(way, model, tmp_path, checkpoint=(str(tmp_path),)))
    with pytest.raises(ValueError, match="--select chooses"):
        sample_comparison(config(way, model, tmp_path, checkpoint=(str(way / "run" / "step-000003"),), select=True))
    with pytest.raises(ValueError, match="seeds=1,1"):
        config(way, model, tmp_path, seeds=(1, 1))
    short = shutil.copytree(way / "run" / "step-000003", tmp_path / "short")
    text = (short / "student.json").read_text()
    (short / "student.json").write_text(text.replace('"num_frames": 9', '"num_frames": 5'))
    with pytest.raises(ValueError, match=f"checkpoint={short}: 5 frames; a distance needs 9 or more"):
        sample_comparison(config(way, model, tmp_path / "out", checkpoint=(str(short),)))
    for part in ("vae", "transformer"):
        mine = shutil.copytree(model, tmp_path / part)
        (mine / part / "config.json").write_text((model / part / "config.json").read_text() + "\n")
        with pytest.raises(ValueError, match=f"model={mine}: its {part} is not the one that the student was distilled"):
            sample_comparison(config(way, mine, tmp_path / "out"))


def test_another_negative_prompt_is_another_setting(way: Path, model: Path, tmp_path: Path) -> None:
    asked = config(way, model, tmp_path / "out")
    data = shutil.copytree(asked.shards, tmp_path / "data")
    manifest = read_manifest(data)
    write_manifest(data, manifest, torch.ones(3, training_helpers.TEXT_DIM))
    assert open_evaluation(asked).records_digest != open_evaluation(replace(asked, shards=str(data))).records_digest


def test_the_undistilled_student_is_the_rollout_of_the_teacher() -> None:
    """One step from the top of the ladder: Euler and the rollout agree there, which ties the two samplers together."""
    condition, noise = Condition(None, torch.zeros(1, 1, 1)), torch.randn(1, 2, 3, 2, 2)
    draws = [torch.Generator().manual_seed(0)]
    one = rollout(lambda x, s, c: 0.3 * x, noise, condition, sigmas=[1.0], generators=draws)
    torch.testing.assert_close(one, sample_euler(lambda x, s, c: 0.3 * x, noise, condition, sigmas=[1.0]))
