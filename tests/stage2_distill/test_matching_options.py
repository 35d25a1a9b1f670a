"""Options against plain DMD's faults, in whole runs: what they do to the weights, and exact resume in every form."""

from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from stage2_distill.checkpointing.format import list_checkpoints, load_checkpoint, newest_checkpoint
from stage2_distill.model.split_float32 import join_master
from stage2_distill.monitoring.metrics_log import METRICS_FILE, complete_lines
from stage2_distill.train import register_step_hooks
from tests.stage2_distill.training_helpers import make_config, make_shards, run_here, run_jobs, tensors

FORMS = {
    "standard": {},
    "compact": {"dtype": "bfloat16", "optimizer_form": "compact", "student_lr": 1e-4, "critic_lr": 1e-4},
    "lora": {"lora_rank": 2, "student_lr": 1e-2, "critic_lr": 1e-2},
}
EVERY = {"iterations": 3, "checkpoint_every": 1, "keep_last": 9, "timesteps": (1000.0, 500.0), "max_text_tokens": 16}
ALL = EVERY | {
    "critic_ema_decay": 0.9, "ida_share": 0.1, "teacher_warmup": 1, "score_time_low_share": 0.5,
    "critic_time_low_share": 0.5, "exit_weights": (0.5, 1.0), "decoupled_guidance": True, "guidance_rescale": 0.5,
    "temporal_variance_weight": 0.05, "temporal_variance_cutoff": 1.2, "anchor_weight": 0.05, "anchor_steps": 2,
    "regression_weight": 1.0, "regression_steps": 2, "student_update_interval": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def shards(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards") / "data", model)


def masters(checkpoint: Path, group: str) -> dict[str, torch.Tensor]:
    """Float32 weights of a role or of the critic's average, by name."""
    stored = tensors(checkpoint)
    weights = {n.removeprefix(f"{group}."): v for n, v in stored.items() if n.startswith(f"{group}.")}
    found = {}
    for name in (name for name in weights if not name.endswith(".remainder")):
        rest = stored.get(f"{group}_optimizer.{name}.remainder", weights.get(f"{name}.remainder"))
        found[name] = weights[name] if rest is None else join_master(weights[name], rest)
    return found


@pytest.mark.parametrize("form", FORMS)
def test_ida_moves_the_critic_and_the_average_follows_it(form: str, model: Path, shards: Path, tmp_path: Path) -> None:
    """The critic, which does not learn here, is 0.7 of itself and 0.3 of the student, and its average a quarter new."""
    still = {"ida_share": 0.3, "critic_lr": 0.0, "student_update_interval": 1, "critic_ema_decay": 0.75}
    whole = run_here(make_config(shards, model, tmp_path / "whole", **FORMS[form] | EVERY | still))
    steps = list_checkpoints(whole.parent)
    for before, after in zip(steps, steps[1:], strict=False):
        student, critic, average = masters(after, "student"), masters(after, "critic"), masters(after, "critic_ema")
        critic_before, average_before = masters(before, "critic"), masters(before, "critic_ema")
        assert critic.keys() == average.keys()
        for name, value in critic.items():
            assert torch.equal(value, critic_before[name].lerp(student[name], 0.3)), name
            assert torch.equal(average[name], average_before[name].lerp(value, 0.25)), name
        assert not all(torch.equal(value, critic_before[name]) for name, value in critic.items())


@pytest.mark.parametrize("form", ["compact", "lora"])
def test_all_options_together_resume_to_the_bit(form: str, model: Path, shards: Path, tmp_path: Path) -> None:
    options = FORMS[form] | ALL | {"iterations": 4, "checkpoint_every": 2}
    whole = tensors(run_here(make_config(shards, model, tmp_path / "whole", **options)))
    run_here(make_config(shards, model, tmp_path / "half", **options | {"iterations": 2}))
    again = tensors(run_here(make_config(shards, model, tmp_path / "half", **options)))
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_all_options_together_are_one_run_on_any_number_of_ranks(model: Path, shards: Path, tmp_path: Path) -> None:
    """One process against two ranks that accumulate."""
    options = ALL | {"iterations": 4, "checkpoint_every": 4, "global_batch": 8, "eps": 1e-2, "grad_clip": 1.0}
    options |= {"student_lr": 1e-2, "critic_lr": 1e-2, "activation_checkpointing": "off"}
    cases = {"alone": (1, 8), "ranks": (2, 2)}
    run_jobs(
        [
            (world, [make_config(shards, model, tmp_path / name, batch_size=size, **options)], {})
            for name, (world, size) in cases.items()
        ],
        tmp_path,
    )
    expected = tensors(newest_checkpoint(tmp_path / "alone"))
    found = {name: torch.zeros_like(value) for name, value in expected.items()}
    load_checkpoint(newest_checkpoint(tmp_path / "ranks"), found)
    for role in ("student.", "critic.", "ema.", "critic_ema."):
        names = [name for name in expected if name.startswith(role)]
        off = sum((found[name] - expected[name]).square().sum() for name in names)
        assert off.sqrt() / sum(expected[name].square().sum() for name in names).sqrt() < 1e-6, role


def test_a_step_of_the_student_waits_for_copies_of_the_critic_that_it_moves() -> None:
    for share, count in ((0.0, 1), (0.03, 2)):
        run, writer = Mock(), Mock()
        run.trainer.ida_share, roles = share, run.trainer.roles
        roles.student.name, roles.critic.name = "student", "critic"
        register_step_hooks(run, writer)
        registered = [call.args[0] for call in writer.register_step_hooks.call_args_list]
        assert len(registered) == count
        assert registered[-1]["critic"] is (roles.student if share else roles.critic).optimizer


def test_a_warm_up_updates_the_student_alone_and_resumes(model: Path, shards: Path, tmp_path: Path) -> None:
    """Stopped in it; the critic is the model's until its end, and the loss is that of the regression."""
    options = FORMS["lora"] | EVERY | {"teacher_warmup": 2, "critic_ema_decay": 0.9, "rollout_reuse": True}
    options |= {"iterations": 5, "student_update_interval": 5}
    whole = run_here(make_config(shards, model, tmp_path / "whole", **options))
    steps = list_checkpoints(whole.parent)
    for number, trained in ((0, False), (1, False), (2, True)):
        factors = [value for name, value in masters(steps[number], "critic").items() if ".lora_B." in name]
        assert all(bool(value.any()) is trained for value in factors)
    lines = [line for _, line in complete_lines(whole.parent / METRICS_FILE)]
    assert [[f"{role}_loss" in line for role in ("student", "critic")] for line in lines] == (
        [[True, False]] * 2 + [[False, True]] * 3
    )
    assert not any("critic_teacher_gap" in line for line in lines)
    run_here(make_config(shards, model, tmp_path / "half", **options | {"iterations": 1}))
    again = tensors(run_here(make_config(shards, model, tmp_path / "half", **options)))
    assert all(torch.equal(value, again[name]) for name, value in tensors(whole).items())


def test_the_student_follows_the_average(model: Path, shards: Path, tmp_path: Path) -> None:
    """The first update is that of plain DMD, as average and critic are equal; the second one is another."""
    options = FORMS["lora"] | EVERY
    runs = [
        list_checkpoints(run_here(make_config(shards, model, tmp_path / f"{d}", **options, critic_ema_decay=d)).parent)
        for d in (0.0, 0.9)
    ]
    for number, equal in ((0, True), (2, False)):
        plain, averaged = (masters(run[number], "student") for run in runs)
        assert all(torch.equal(value, averaged[name]) for name, value in plain.items()) is equal
    assert not masters(runs[0][0], "critic_ema")


def test_a_run_from_another_begins_its_average_at_that_runs_critic(model: Path, shards: Path, tmp_path: Path) -> None:
    source = run_here(make_config(shards, model, tmp_path / "source", iterations=1))
    still = {"iterations": 1, "student_lr": 0.0, "critic_lr": 0.0, "weight_decay": 0.0, "critic_ema_decay": 0.5}
    begun = run_here(make_config(shards, model, tmp_path / "run", **still, init_from=str(source)))
    average, critic = masters(begun, "critic_ema"), masters(source, "critic")
    assert all(torch.equal(value, critic[name]) for name, value in average.items())
