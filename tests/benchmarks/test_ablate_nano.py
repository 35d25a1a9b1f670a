"""The experiment with every knob: its variants, its plan, its table, and the whole command at tiny size."""

import json
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan

from benchmarks import ablate_nano
from benchmarks.ablate_nano import Speed, Variant, list_variants, plan_runs
from benchmarks.ablation_table import Result, curve_rows, error_difference, read_results, table_rows
from benchmarks.graphed_run import ConditionPool, forward_passes
from benchmarks.nano_judge import JUDGE_SEED, MEASURES, Judge, JudgeSettings, Measures, make_pool
from stage2_distill.evaluation.two_sample import PIXEL_PATCH

MEASURED = Measures(0.6, None, 3.0, 2.0, 2.0, 1.0, 1.02, 0.98, 0.95, 0.99, 1.0, 0.98, 0.97)


def result(variant: str, compared_with: str, seed: int, **changes: float) -> Result:
    measures = replace(MEASURED, **changes)
    return Result(variant, compared_with, seed, 9, 9, 90.0, 1.0, 4, measures)


def test_variants_change_what_their_name_says() -> None:
    variants = {one.name: one for one in list_variants()}
    assert len(variants) == len(list_variants())
    base = variants["base"].config(100)
    assert (base.regression_weight, base.lr_cooldown, base.teacher_warmup) == (4.0, 60, 0)
    for one in variants.values():
        assert one.compared_with in ("", *variants)
        assert one.config(100) != base or one.name == "base" or one.length != 1
    alone = variants["regression alone"].config(100)
    assert alone.teacher_warmup == 100
    assert forward_passes(alone) == 1.5 + 3 + 10
    matching = variants["matching"].config(320)
    assert (matching.critic_warmup, matching.lr_cooldown, matching.rollout_reuse) == (20, 160, False)
    assert variants["matching, guidance 1.5, decoupled"].compared_with == "matching, guidance 1.5"


def test_a_plan_gives_every_run_the_same_passes_and_fits(capsys: pytest.CaptureFixture[str]) -> None:
    variants = [one for one in list_variants() if one.name in ("base", "matching", "base, 20 steps of regression")]
    options = Namespace(seeds=0, iterations=0)
    speed = Speed(one_pass=0.001, recording=1.0, judging=2.0)
    planned = plan_runs(variants, options, speed, 300.0)
    passes = [forward_passes(one.config) * one.config.iterations for one in planned]
    assert len(planned) == 3 + 3 + 2
    assert max(passes) < 1.01 * min(passes)
    curves = 6 * 7 * 0.2 * 2.0
    assert sum(passes) * 0.001 == pytest.approx(0.93 * 300 - 8 * 3.0 - curves, rel=0.01)
    assert [one.variant.name for one in planned[:3]] == [one.name for one in variants]  # first a seed of each
    assert " iterations: base\n" in capsys.readouterr().out


def test_longer_runs_and_larger_batches_count_as_what_they_take() -> None:
    names = ("base", "longer: base x 4", "base, batch 256")
    variants = [one for one in list_variants() if one.name in names]
    options, speed = Namespace(seeds=1, iterations=0), Speed(one_pass=0.001, recording=0.0, judging=0.0)
    base, longer, large = (one.config for one in plan_runs(variants, options, speed, 100.0))
    assert (longer.iterations, large.iterations) == (pytest.approx(4 * base.iterations, abs=2), base.iterations)
    seconds = forward_passes(base) * base.iterations * speed.one_pass  # of the base; the others take four and two
    assert 7 * seconds == pytest.approx(0.93 * 100, rel=0.01)
    sizes = {"batch_size": 2, "global_batch": 2}  # as with --batch and --tiny: of all variants
    assert {one.config.batch_size for one in plan_runs(variants, options, speed, 100.0, **sizes)} == {2}


def test_a_plan_that_cannot_fit_is_refused() -> None:
    with pytest.raises(SystemExit, match="minutes=1: 3 runs take .* give fewer with --only or --seeds"):
        plan_runs(list_variants()[:1], Namespace(seeds=0, iterations=0, minutes=1.0), Speed(0.001, 9.0, 9.0), 30.0)


def test_a_difference_counts_if_its_interval_excludes_zero() -> None:
    assert error_difference([1.0, 1.1, 0.9], [2.0, 2.1, 1.9]) == -1
    assert error_difference([2.0, 2.1, 1.9], [1.0, 1.1, 0.9]) == 1
    assert error_difference([1.0, 3.0, 2.0], [2.0, 2.1, 1.9]) == 0
    # pooled deviation 0.1, t(4) = 2.776: half the interval is 0.2267
    assert [error_difference([1.0, 1.1, 0.9], [1 + gap + d for d in (0, 0.1, -0.1)]) for gap in (0.22, 0.24)] == [0, -1]
    assert error_difference([1.0], [2.0]) == 0


def test_a_row_names_what_it_improves_and_a_run_that_diverged(tmp_path: Path) -> None:
    results = [result("base", "", seed, floors=3.0 + 0.1 * seed) for seed in range(3)]
    results += [result("base, knob", "base", seed, floors=1.0 + 0.1 * seed, contrast=1.1) for seed in range(2)]
    results.append(replace(results[-1], seed=2, measures=None))
    results.append(replace(results[0], iteration=4))
    path = tmp_path / "results.jsonl"
    path.write_text("".join(one.line() for one in results))
    assert read_results(path) == results
    base, knob = table_rows(results)
    assert base[:3] == ["base", "3", "9"]
    assert base[3 + MEASURES.index("floors")] == "3.100 ± 0.248"  # t(2) 4.303 x 0.1 / sqrt(3)
    assert (knob[1], knob[-2:]) == ("3, 1 diverged", ["floors", "contrast"])
    assert [row[:3] for row in curve_rows(results)] == [["base", "4", "3.000"], ["base", "9", "3.100 ± 0.248"]]


def test_the_whole_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["ablate_nano", "--tiny", "--only", "regression*", "--out", str(tmp_path)])
    ablate_nano.main()
    table, lines = (next(tmp_path.glob(f"*.{kind}")).read_text() for kind in ("md", "jsonl"))
    rows = [json.loads(line) for line in lines.splitlines()]
    names = ["teacher, guidance 1, 2 steps", "teacher, guidance 1, 4 steps", "undistilled, 4 steps", "regression alone"]
    assert [row["variant"] for row in rows] == names
    assert rows[0]["measures"]["floors"] == pytest.approx(1.0)
    missing = {name for row in rows for name in MEASURES if row["measures"][name] is None}
    assert missing == {"pixel_accuracy"}  # of --thorough
    assert all(f"\n| {name} | 1 | " in table for name in names)


def test_thorough_measures_see_pixels_and_true_clips() -> None:
    first = torch.zeros(1, 48, 1, 4, 6)
    vae = AutoencoderKLWan.from_pretrained(ablate_nano.MODEL / "vae").float()
    pool = ConditionPool(first.bfloat16(), torch.zeros(1, 2, 64), torch.zeros(2, 64))
    judge = Judge(pool, [], vae, lambda *_: first, (48, 5, 4, 6), JudgeSettings(), 4)
    draws = torch.Generator().manual_seed(0)
    clips, pale = (torch.randint(0, top, (48, 3, 3, 16, 16), dtype=torch.uint8, generator=draws) for top in (200, 100))
    assert judge.tell_apart(clips, clips, seed=0, patch=PIXEL_PATCH) == 0.5
    assert judge.tell_apart(clips, pale, seed=0, patch=PIXEL_PATCH) > 0.9
    true = judge.true_latents()
    assert true.shape == (1, 48, 5, 4, 6)
    frame = make_pool(ablate_nano.MODEL, 1, seed=JUDGE_SEED, held=True, device=torch.device("cpu"))[0].first_frame
    assert torch.allclose(true[:, :, :1], frame.float(), atol=0.05)  # the condition is its first frame


def test_a_pattern_without_a_variant_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["ablate_nano", "--tiny", "--only", "bse"])
    with pytest.raises(SystemExit, match="only=bse: matches none of base; "):
        ablate_nano.main()


def test_a_recipe_keeps_its_shares() -> None:
    config = Variant("x", "nano.yaml", warmup_share=0.25).config(40)
    assert (config.lr_cooldown, config.teacher_warmup, config.iterations) == (24, 10, 40)
