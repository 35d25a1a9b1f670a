"""A run of the experiments equals the product's trainer: same losses, same weights, from the same random numbers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.graphed_run import ConditionPool, DrawTape, GraphedRun, draws_from, forward_passes
from stage2_distill.build import build_roles, build_trainer
from stage2_distill.config import DistillConfig
from stage2_distill.distributed.process_group import start_process_group
from stage2_distill.dmd import rollout, score_noise
from stage2_distill.dmd.schedule import CRITIC, STUDENT, Schedule
from stage2_distill.dmd.video_shapes import SampleShapes
from stage2_distill.model.wan import load_transformer
from stage2_distill.trainer import train_step
from tests.stage2_distill.training_helpers import SPEC
from tests.tiny_models import TEXT_DIM

KNOBS = {
    "plain": {},
    "all": {
        "critic_ema_decay": 0.9, "ida_share": 0.1, "teacher_warmup": 1, "exit_weights": (0.5, 1.0),
        "guidance_scale": 1.5, "decoupled_guidance": True, "guidance_rescale": 0.5, "temporal_variance_weight": 0.05,
        "anchor_weight": 0.05, "anchor_steps": 2, "regression_weight": 1.0, "regression_steps": 2,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def pool() -> ConditionPool:
    draws = torch.Generator().manual_seed(0)
    frames = torch.randn((4, *SPEC.first_frame_shape), generator=draws)
    text = 30 * torch.randn((4, 8, TEXT_DIM), generator=draws)
    text[:, -1] = 0
    return ConditionPool(frames.bfloat16(), text.bfloat16(), text[0].flip(0).bfloat16())


def recipe(model: Path, **changes: object) -> DistillConfig:
    base = DistillConfig(
        shards=("-",), model=str(model), out="-", num_frames=SPEC.num_frames, height=SPEC.height, width=SPEC.width,
        fps=SPEC.fps, iterations=4, timesteps=(1000.0, 500.0), guidance_scale=1.0, student_lr=1e-3, critic_lr=1e-3,
        lr_cooldown=2, student_update_interval=1, ema_start=0, ema_decay=0.9, batch_size=2, global_batch=2,
        dtype="float32", optimizer_form="standard", activation_checkpointing="off", device="cpu", critic_loss="flow",
    )  # fmt: skip
    return replace(base, **changes)


@pytest.mark.parametrize("knobs", KNOBS)
def test_iterations_equal_the_products(knobs: str, model: Path, pool: ConditionPool) -> None:
    config, ranks = recipe(model, **KNOBS[knobs]), start_process_group("cpu")
    run = GraphedRun(config, model, load_transformer(model, torch.float32).requires_grad_(False), pool, ranks)
    schedule, roles = Schedule.of(config, 1), build_roles(config, ranks, model)
    expected = build_trainer(config, ranks, schedule, roles, pool.negative)
    shapes = SampleShapes(0, config.lengths, lambda position: SPEC)
    batches = schedule.micro_batches(start=0, rank=0, shapes=shapes)
    for number in range(2):
        result = train_step(expected, number, ((part, run.batch) for part in batches))
        for name, update in ((STUDENT, result.student), (CRITIC, result.critic)):
            if update is not None:
                trained = run.trainer.roles.student if name == STUDENT else run.trainer.roles.critic
                trained.optimizer.rate.fill_(schedule.learning_rate(number, name))
                run.update(name, number, use_tape=False)  # the product's own random numbers
                read = [update.loss, update.grad_norm, *update.latent_stats]
                assert run.readings[name].tolist() == pytest.approx(read, rel=1e-5)
    pairs = {"student": (roles.student.net, run.trainer.roles.student.net)}
    pairs["critic"] = roles.critic.net, run.trainer.roles.critic.net
    if roles.critic_average is not None:
        pairs["critic average"] = roles.critic_average.net, run.trainer.roles.critic_average.net
    weights = {name: [dict(net.named_parameters()) for net in pair] for name, pair in pairs.items()}
    weights["average"] = [dict(roles.ema.weights), dict(run.trainer.roles.ema.weights)]
    for name, (left, right) in weights.items():
        for part, value in left.items():
            torch.testing.assert_close(right[part], value, rtol=0, atol=1e-5, msg=f"{name} {part}")
    start = dict(load_transformer(model, torch.float32).named_parameters())
    moved = max(float((value - start[part]).abs().max().detach()) for part, value in weights["student"][1].items())
    assert moved > 1e-4  # ten times what is allowed above


def test_tape_gives_the_products_numbers_in_order(model: Path, pool: ConditionPool, monkeypatch) -> None:  # noqa: ANN001
    """An update from a tape of the product's draws has the loss of one that draws them itself."""
    config, ranks = recipe(model, **KNOBS["all"] | {"teacher_warmup": 0}), start_process_group("cpu")
    run = GraphedRun(config, model, load_transformer(model, torch.float32).requires_grad_(False), pool, ranks)
    number = next(n for n in range(9) if run.schedule.draw_exit_index(n, STUDENT) == 1)  # the longest rollout
    drawn: dict[str, list[torch.Tensor]] = {"draw_normal": [], "draw_uniform": []}

    def recording(name, draw):  # noqa: ANN001, ANN202
        return lambda *args: drawn[name].append(draw(*args)) or drawn[name][-1]

    with monkeypatch.context() as patch:
        for module, name in ((rollout, "draw_normal"), (score_noise, "draw_normal"), (score_noise, "draw_uniform")):
            patch.setattr(module, name, recording(name, getattr(module, name)))
        run.update(STUDENT, number, use_tape=False)
    loss = run.readings[STUDENT].clone()
    run.restart()
    run.tape.normals[: len(drawn["draw_normal"])] = torch.stack(drawn["draw_normal"])
    run.tape.uniforms[: len(drawn["draw_uniform"])] = torch.stack(drawn["draw_uniform"])
    run.update(STUDENT, number)
    assert torch.equal(run.readings[STUDENT], loss)


def test_restart_repeats_a_run(model: Path, pool: ConditionPool) -> None:
    config, ranks = recipe(model, critic_ema_decay=0.9), start_process_group("cpu")
    run = GraphedRun(config, model, load_transformer(model, torch.float32).requires_grad_(False), pool, ranks)
    results = []
    for _ in range(2):
        run.restart()
        run.iterate()
        results.append(run.average_weights())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())
    run.check_finite()
    assert run.graph_error(1) == 0.0  # on a GPU it compares graphs with single updates
    assert run.iteration == 0


def test_tape_refuses_other_shapes() -> None:
    tape = DrawTape.allocate(2, 3, (4, 5), torch.device("cpu"))
    with draws_from(tape), pytest.raises(AssertionError):
        rollout.draw_normal((4, 6), [None] * 3)


def test_cost_of_an_iteration_in_passes(model: Path) -> None:
    plain = recipe(model, timesteps=(1000.0, 750.0, 500.0, 250.0))
    assert forward_passes(plain) == (1.5 + 3 + 1 + 1) + (1.5 + 1 + 3)
    assert forward_passes(replace(plain, regression_weight=4.0)) == 12 + 10
    assert forward_passes(replace(plain, guidance_scale=1.5, decoupled_guidance=True)) == 12 + 2
    assert forward_passes(replace(plain, teacher_warmup=4)) == 1.5 + 3 + 10  # no critic
