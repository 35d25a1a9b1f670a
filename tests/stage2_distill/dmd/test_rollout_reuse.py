"""Rollouts that serve several critic updates: who takes which step, the same values, exact resume."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from common.condition import Condition
from stage2_distill.dmd.rollout import StudentRollouts
from stage2_distill.dmd.rollout_reuse import RolloutReuse, assign_slot, draw_group_exits
from stage2_distill.dmd.schedule import CRITIC, Schedule
from stage2_distill.monitoring.metrics_log import METRICS_FILE, complete_lines
from tests.stage2_distill.dmd.sample_shapes import one_size
from tests.stage2_distill.training_helpers import make_config, make_shards, run_here, tensors


@pytest.fixture(scope="module")
def shards(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards") / "data", model)


@pytest.mark.parametrize(("global_batch", "every"), [(2, 5), (4, 5), (64, 5), (2, 2), (6, 3)])
def test_groups_take_every_step(model: Path, global_batch: int, every: int) -> None:
    """Each trajectory gives each ladder step once; over many cycles all steps are taken equally often."""
    config = make_config(
        Path(),
        model,
        Path(),
        global_batch=global_batch,
        student_update_interval=every,
        iterations=400 * every // global_batch * 2,
    )
    taken: Counter[int] = Counter()
    groups: dict[tuple[int, int], list[int]] = {}
    schedule = Schedule.of(config, world=1)
    for part in schedule.micro_batches(start=0, rank=0, shapes=one_size(config)):
        if part.role == CRITIC:
            slot = assign_slot(part, schedule)
            members = groups.setdefault((part.iteration // every, slot.group), [])
            assert slot.starts_group == (not members)
            members.append(slot.exit_index)
            taken[slot.exit_index] += 1
    for members in groups.values():
        assert len(set(members)) == min(4, len(members))
        assert members[:4] == sorted(members[:4])
    mean = sum(taken.values()) / 4
    assert all(abs(taken[step] / mean - 1) < 0.15 for step in range(4)), taken


def test_a_sample_is_what_a_rollout_gives(model: Path) -> None:
    """Each micro-batch gets the x0 of a plain rollout with its group's noise, at a fifth of the cost and less."""
    config = make_config(
        Path(), model, Path(), student_update_interval=5, global_batch=2, iterations=10, rollout_reuse=True
    )
    calls = 0

    def student(x_t: torch.Tensor, sigma: torch.Tensor, condition: Condition) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return x_t * 0.5 + condition.text.mean() + sigma.mean()

    schedule = Schedule.of(config, world=1)
    rollouts = StudentRollouts(student, config.seed, config.sigmas)
    reuse, first = RolloutReuse(rollouts, schedule), None
    for part in schedule.micro_batches(start=0, rank=0, shapes=one_size(config)):
        if part.role != CRITIC:
            continue
        condition = Condition(None, torch.full((2, 1, 1), float(part.iteration)))
        first = (part, condition) if assign_slot(part, schedule).starts_group else first
        reused = reuse.simulate(part, condition, exit_index=0)
        assert reused.condition is first[1]
        before = calls
        assert torch.equal(reused.x0, rollouts.simulate(*first, reused.exit_index).x0)
        calls = before
    assert calls == 8, "two cycles of five updates, one trajectory of four steps each"


def test_exits_of_a_small_group_are_drawn() -> None:
    drawn = {tuple(draw_group_exits(2, 4, torch.Generator().manual_seed(seed))) for seed in range(100)}
    assert drawn == {(a, b) for a in range(4) for b in range(a + 1, 4)}


def test_stopped_within_a_trajectory_and_resumed_is_the_same_run(model: Path, shards: Path, tmp_path: Path) -> None:
    options = {"rollout_reuse": True, "student_update_interval": 5, "global_batch": 2, "iterations": 8}
    whole = tensors(run_here(make_config(shards, model, tmp_path / "whole", **options)))
    plain = tensors(run_here(make_config(shards, model, tmp_path / "plain", **(options | {"rollout_reuse": False}))))
    stopped = make_config(shards, model, tmp_path / "half", **(options | {"iterations": 3}))
    assert run_here(stopped).name == "step-000003"
    again = tensors(run_here(make_config(shards, model, tmp_path / "half", **options)))
    for name, value in whole.items():
        assert torch.equal(value, again[name]), name
    assert not torch.equal(whole["critic.proj_out.weight"], plain["critic.proj_out.weight"])
    exits = [
        [line["critic_exit"] for _, line in complete_lines(tmp_path / run / METRICS_FILE)] for run in ("whole", "half")
    ]
    assert exits[0] == exits[1] and len(exits[0]) == 8


def test_an_update_of_several_exits_names_none(model: Path, shards: Path, tmp_path: Path) -> None:
    """Two micro-batches an update: their losses are those of two steps of the ladder."""
    options = {"rollout_reuse": True, "batch_size": 1, "global_batch": 2, "student_update_interval": 2, "iterations": 4}
    run = run_here(make_config(shards, model, tmp_path / "run", **options)).parent
    lines = [line for _, line in complete_lines(run / METRICS_FILE)]
    assert len(lines) == 4 and any("critic_exit" not in line for line in lines)
    for line in lines:
        assert ("critic_exit" in line) == any(name.startswith("critic_loss_exit") for name in line)
