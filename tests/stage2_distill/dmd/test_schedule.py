"""Who is updated when, on which samples."""

import pytest

from common.flow import timestep_sigmas
from stage2_distill.config import DistillConfig
from stage2_distill.dmd.schedule import Schedule
from stage2_distill.dmd.score_noise import ScoreNoise
from stage2_distill.sampling.config import SampleConfig
from tests.stage2_distill.dmd.sample_shapes import one_size


def config(**changes: object) -> DistillConfig:
    values = {"shards": ("d",), "model": "m", "out": "o", "iterations": 20, "global_batch": 8, "batch_size": 2}
    return DistillConfig(**(values | changes))


def schedule(world: int = 1, **changes: object) -> Schedule:
    return Schedule.of(config(**changes), world)


def test_twenty_iterations_are_4_student_and_20_critic_updates_on_24_batches() -> None:
    todo = list(schedule().micro_batches(start=0, rank=0, shapes=one_size(config())))
    updates = [(p.iteration, p.role) for p in todo if p.last]
    pattern = [("student", "critic") if i % 5 == 0 else ("critic",) for i in range(20)]
    assert updates == [(i, role) for i, roles in enumerate(pattern) for role in roles]
    assert sum(role == "student" for _, role in updates) == 4
    assert sum(role == "critic" for _, role in updates) == 20
    positions = [position for part in todo for position in part.positions]
    assert positions == list(range(24 * 8)), "24 distinct batches, in the stream's order"


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 3, 5])
def test_ranks_share_the_same_global_batches(world: int, start: int) -> None:
    alone = list(schedule().micro_batches(start=0, rank=0, shapes=one_size(config())))
    wanted = {(p.iteration, p.role, pos, s) for p in alone for pos, s in zip(p.positions, p.samples, strict=True)}
    wanted = {item for item in wanted if item[0] >= start}
    found = [
        (p.iteration, p.role, pos, s)
        for rank in range(world)
        for p in schedule(world).micro_batches(start=start, rank=rank, shapes=one_size(config()))
        for pos, s in zip(p.positions, p.samples, strict=True)
    ]
    assert len(found) == len(set(found))
    assert set(found) == wanted


def test_shares_add_up_to_one_update() -> None:
    for world in (1, 2, 4):
        parts = schedule(world).micro_batches(start=1, rank=world - 1, shapes=one_size(config()))
        todo = [part for part in parts if part.iteration == 1]
        assert sum(part.share for part in todo) == pytest.approx(1)
        assert [part.last for part in todo] == [False] * (len(todo) - 1) + [True]


def test_impossible_global_batch_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="nearest are 6 and 12"):
        schedule(world=2, global_batch=8, batch_size=3)


@pytest.mark.parametrize("warmup", [0, 1, 5, 7])
@pytest.mark.parametrize("teacher_warmup", [0, 3, 10])
def test_updates_before_counts_the_turns(warmup: int, teacher_warmup: int) -> None:
    turns = schedule(critic_warmup=warmup, teacher_warmup=teacher_warmup)
    for iteration in range(20):
        for role in ("student", "critic"):
            assert turns.updates_of(role, iteration) == sum(role in turns.updated_roles(i) for i in range(iteration))


def test_the_teacher_warmup_comes_before_the_critics() -> None:
    turns = schedule(teacher_warmup=4, critic_warmup=3, student_update_interval=2)
    expected = [("student",)] * 4 + [("critic",)] * 4 + [("student", "critic"), ("critic",)]
    assert [turns.updated_roles(i) for i in range(10)] == expected


def test_exits_are_uniform_and_differ_between_roles_and_seeds() -> None:
    exits = [schedule().draw_exit_index(i, "student") for i in range(2000)]
    assert all(abs(exits.count(k) - 500) < 90 for k in range(4))
    assert exits == [schedule().draw_exit_index(i, "student") for i in range(2000)]
    assert exits != [schedule().draw_exit_index(i, "critic") for i in range(2000)]
    assert exits != [schedule(seed=1).draw_exit_index(i, "student") for i in range(2000)]


def test_score_bounds_follow_the_reference() -> None:
    flags = {
        (low, high): config(ts_schedule=low, ts_schedule_max=high).select(ScoreNoise)
        for low in (False, True)
        for high in (False, True)
    }
    assert flags[False, False].bounds(2) == (0, 1)
    assert flags[True, False].bounds(2) == (0.25, 1)
    assert flags[False, True].bounds(2) == (0, 0.5)
    assert flags[True, True].bounds(2) == (0.25, 0.5)
    assert flags[True, True].bounds(3) == (0, 0.25)


def test_average_copies_until_its_start() -> None:
    decays = [schedule(ema_start=7).ema_decay_after(i) for i in range(0, 20, 5)]
    assert decays == [0, 0, 0.99, 0.99]


@pytest.mark.parametrize(
    "indices",
    [
        (),
        (500, 1000),
        (1000, 0),
        (1200, 5),
        (500, 500),
        (1, 0.75, 0.5, 0.25),
        (999, 500),
        (750,),
        (1000, -5),
        (1000, 1000),
    ],
)
def test_timesteps_that_do_not_fall_from_pure_noise_are_refused(indices: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"timesteps=.*: must start at 1000, which is pure noise, and fall strictly"):
        timestep_sigmas(indices, s=5.0)
    for make in (
        lambda: DistillConfig(shards=("d",), model="m", out="o", timesteps=indices),
        lambda: SampleConfig(checkpoint="c", model="m", out="o.mp4", prompt="p", timesteps=indices),
    ):
        with pytest.raises(ValueError, match="timesteps=.*: must start at 1000"):
            make()
