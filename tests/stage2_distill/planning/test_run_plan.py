"""The plan of a run: time, money, disk, modes and remedies; and its command."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.device import TRUE, build_network
from common.planning.cards import find_card
from common.video import FrameSize, VideoSpec
from stage2_distill.config import DistillConfig
from stage2_distill.planning.config import PlanConfig
from stage2_distill.planning.duration import list_shapes
from stage2_distill.planning.network_size import TransformerSize
from stage2_distill.planning.plan_text import format_plan
from stage2_distill.planning.run_plan import RunPlan, kept_checkpoints, make_plan
from tests.forked import run_python

ROOT = Path(__file__).parents[3]
CONFIG = DistillConfig(("d",), "m", "o", compile=True)


def plan_of(config: DistillConfig, card: str, gpus: int, price: float | None = None) -> RunPlan:
    return make_plan(
        list_shapes(config, {}), TransformerSize(), find_card(card), gpus=gpus, records=100_000, price=price
    )


def test_the_published_recipe_on_eight_gpus() -> None:
    """465 H200-hours by the measured mean iteration with FlashAttention-3 (6.54 s), without loss to other GPUs."""
    plan = plan_of(replace(CONFIG, attention="flash"), "h200", 8, price=3.5)
    assert plan.gpu_hours == pytest.approx(465, rel=0.05)
    assert plan.cost == pytest.approx(3.5 * plan.gpu_hours)
    assert (plan.kernel, plan.form, plan.fits, plan.remedy) == ("flash-3", "standard", True, "")
    assert plan.epochs == pytest.approx(4000 * 1.2 * 64 / 100_000)
    assert plan.data_bytes == pytest.approx(1.3e6 * 100_000, rel=0.02)
    assert plan.encode_hours == pytest.approx(100_000 / (65 * 8) / 3600)
    assert plan.run_bytes == pytest.approx(4 * 20 * TransformerSize().parameters)
    assert [item.name for item in plan.faster] == ["--rollout-reuse (another order of samples)"]


def test_sizes_and_lengths_cost_their_mean_and_the_memory_of_the_largest() -> None:
    config = replace(CONFIG, num_frames="81:0.25,121:0.75")
    sizes = PlanConfig(sizes=("704x1280:2", "960x960:1,1280x704:1")).size_shares
    assert sizes == {FrameSize(704, 1280): 0.5, FrameSize(960, 960): 0.25, FrameSize(1280, 704): 0.25}
    shapes = list_shapes(config, sizes)
    assert len(shapes) == 6 and sum(one.share for one in shapes) == pytest.approx(1)
    assert shapes[0].config.spec == VideoSpec(121, 960, 960)
    numbers = {"gpus": 8, "records": 1000, "price": None}
    plan, card = make_plan(shapes, TransformerSize(), find_card("h200"), **numbers), find_card("h200")
    alone = [make_plan((replace(one, share=1.0),), TransformerSize(), card, **numbers) for one in shapes]
    shares = [one.share for one in shapes]
    for name in ("iteration_seconds", "data_bytes", "encode_hours"):
        mean = sum(share * vars(one)[name] for share, one in zip(shares, alone, strict=True))
        assert vars(plan)[name] == pytest.approx(mean), name
    assert plan.memory.gpu == max(one.memory.gpu for one in alone)
    lines = format_plan(plan, config, records=1000, sizes=sizes)
    assert "at 81:0.25,121:0.75 frames of 704x1280 (50%), 960x960 (25%), 1280x704 (25%), 4 steps" in lines[0]
    assert lines[1] == (
        "shapes: 3 sizes x 2 lengths: blocks are compiled for at most 6 shapes, each once; a micro-batch has one "
        "shape; memory is that of 121 x 960 x 960"
    )


@pytest.mark.parametrize(
    ("sizes", "problem"),
    [
        (("704",), "sizes=704: must be HEIGHTxWIDTH"),
        (("704x1280,704x1280",), "sizes=704x1280: each size needs one share above 0"),
        (("704x1280:0",), "each size needs one share"),
        (("704x1280:x",), "sizes=704x1280:x: could not convert"),
        (("700x1280",), "sizes=700x1280: height=700: must be a multiple of 32"),
    ],
)
def test_bad_sizes_are_refused(sizes: tuple[str, ...], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        PlanConfig(sizes=sizes)


def test_one_size_is_that_of_the_recipe() -> None:
    assert PlanConfig(sizes=("480x832",)).distill_options()["height"] == 480


@pytest.mark.parametrize(
    ("card", "gpus", "changes", "remedy"),
    [
        ("h100", 1, {"optimizer_form": "standard"}, "--optimizer-form compact or 2 GPUs"),
        ("rtx4090", 1, {}, "--lora-rank 32 --activation-checkpointing offload or 16 GPUs"),
        ("rtx4090", 1, {"batch_size": 64}, "a smaller --batch-size"),
        ("h100", 1, {"global_batch": 64}, ""),
    ],
)
def test_what_would_make_it_fit(card: str, gpus: int, changes: dict[str, object], remedy: str) -> None:
    plan = plan_of(replace(CONFIG, **changes), card, gpus)
    assert plan.fits == (not remedy)
    assert remedy in plan.remedy


def test_modes_that_the_options_exclude_are_left_out() -> None:
    assert len(plan_of(CONFIG, "h100", 8).modes) == 5
    assert not [m for m in plan_of(replace(CONFIG, dtype="float32"), "h100", 8).modes if "compact" in m.name]


def test_time_follows_the_options() -> None:
    base = plan_of(CONFIG, "h200", 8)
    half = plan_of(replace(CONFIG, global_batch=32), "h200", 8)
    assert half.iteration_seconds == pytest.approx(base.iteration_seconds / 2, rel=0.01)
    assert plan_of(CONFIG, "a100", 8).iteration_seconds > 2.5 * base.iteration_seconds
    assert plan_of(replace(CONFIG, async_checkpoint=False), "h200", 8).pause_seconds == pytest.approx(100, rel=0.01)
    warm = replace(CONFIG, teacher_warmup=CONFIG.iterations, regression_steps=1)  # 6.5 forwards of 8.2
    warmed = plan_of(warm, "h200", 8)
    assert warmed.iteration_seconds == pytest.approx(base.iteration_seconds * 7.5 / 8.2, rel=0.05)
    assert warmed.epochs == pytest.approx(base.epochs / 1.2)
    for changes, passes in (({"decoupled_guidance": True}, 1), ({"anchor_weight": 0.05}, 2 * 5 / 4)):
        more = plan_of(replace(CONFIG, **changes), "h200", 8).iteration_seconds / base.iteration_seconds
        assert more == pytest.approx(1 + passes / 5 / 8.2, rel=0.01)  # a mean iteration is 8.2 forward passes
    assert plan_of(CONFIG, "h200", 16).encode_hours == pytest.approx(base.encode_hours / 2)


@pytest.mark.parametrize(
    ("item", "words"),
    [("lora_rank", "must be KEY=VALUE"), ("lora_rnk=3", "did you mean lora_rank"), ("=3", "must be KEY=VALUE")],
)
def test_mistakes_of_set(item: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PlanConfig(set=(item,)).distill_options()


def plan_command(*options: str, code: int = 0) -> str:
    done = run_python("cli.py", "plan", *options)
    assert done.returncode == code, done.stderr
    return done.stdout or done.stderr


def test_a_model_in_another_layout(tmp_path: Path) -> None:
    """A file of weights alone: its tensors' shapes are its size."""
    size = TransformerSize(num_layers=1, num_attention_heads=2, attention_head_dim=12, ffn_dim=24, text_dim=8)
    with torch.device("cpu"):
        net = build_network({name: vars(size)[name] for name in TRUE})
    save_file(net.state_dict(), tmp_path / "net.safetensors", {"num_attention_heads": "2"})
    found = json.loads(plan_command("--model", str(tmp_path / "net.safetensors"), "--json"))
    assert found["parameters"] == size.parameters


def test_the_command() -> None:
    nano = ["--gpus", "1", "--recipe", "recipes/nano.yaml", "--model", "examples/nano/model"]
    text = plan_command(*nano, "--price", "2")
    assert "5.86 M parameters at 17 x 64 x 96" in text and ", fits" in text and "costs " in text
    time = r"time: [0-9.]+ ms per iteration, \d+ min, 0.0\d+ GPU-hours, costs 0\n  a network as small"
    assert re.search(time, text) and "0.0 G" not in text
    found = json.loads(plan_command(*nano, "--json", "--set", "iterations=1600"))
    assert (found["parameters"], found["form"], found["cost"]) == (5_855_936, "standard", None)
    assert "global_batch=64: not a multiple" in plan_command("--gpus", "7", code=2)
    assert "seed=x: must be int" in plan_command("--set", "seed=x", code=2).replace("'", "")
    assert "gpu=h300: choose one of h100" in plan_command("--gpu", "h300", code=2)
    assert "none" in plan_command("--model", "none", code=2)


def test_a_missing_recipe_is_named_by_its_own_option() -> None:
    with pytest.raises(ValueError, match="^recipe=none.yaml: No such file or directory; give the path of a YAML file$"):
        PlanConfig(recipe="none.yaml").distill_options()


@pytest.mark.parametrize(
    ("options", "kept"),
    [({}, 3), ({"iterations": 600}, 2), ({"keep_every": 1000}, 5), ({"iterations": 4100, "keep_every": 500}, 9)],
)
def test_checkpoints_that_stay(options: dict[str, int], kept: int) -> None:
    """Of 500, 1000, ...: the newest three, and those of every 1000 iterations."""
    assert kept_checkpoints(replace(CONFIG, **options)) == kept
    size = TransformerSize()
    assert plan_of(replace(CONFIG, **options), "h200", 8).run_bytes == pytest.approx(20 * size.parameters * (kept + 1))
