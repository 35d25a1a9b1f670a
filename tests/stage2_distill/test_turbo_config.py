"""Recipes of ours load key by key; a configuration in the reference's keys is translated key by key."""

from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from cli import cli
from common.options import resolve_config
from stage2_distill.config import DistillConfig
from stage2_distill.turbo_config import (
    ALLOWED_VALUES,
    JOINT_KEYS,
    RENAMED_KEYS,
    RENAMED_VALUES,
    WITHOUT_EFFECT,
    translate_config,
    translated_options,
)

ROOT = Path(__file__).parents[2]
NEEDED = {"shards": ("d",), "model": "m", "out": "o"}
PUBLISHED = {  # the published recipe, in the reference's words
    "real_name": "Wan2.2-TI2V-5B",
    "fake_name": "Wan2.2-TI2V-5B",
    "generator_name": "Wan2.2-TI2V-5B",
    "generator_type": "bidirectional",
    "generator_fsdp_wrap_strategy": "size",
    "text_encoder_cpu_offload": True,
    "i2v": False,
    "denoising_step_list": [1000, 750, 500, 250],
    "warp_denoising_step": True,
    "ts_schedule": False,
    "num_train_timestep": 1000,
    "timestep_shift": 5.0,
    "model_kwargs": {"timestep_shift": 5.0},
    "guidance_scale": 6.0,
    "denoising_loss_type": "x0",
    "mixed_precision": True,
    "seed": 0,
    "wandb_key": "SECRET",
    "sharding_strategy": "full",
    "lr": 5.0e-7,
    "lr_critic": 1.0e-7,
    "beta1": 0.0,
    "beta2": 0.999,
    "beta1_critic": 0.0,
    "beta2_critic": 0.999,
    "batch_size": 1,
    "total_batch_size": 64,
    "ema_weight": 0.99,
    "ema_start_step": 200,
    "log_iters": 500,
    "negative_prompt": "bad",
    "dfake_gen_update_ratio": 5,
    "image_or_video_shape": [1, 31, 48, 44, 80],
    "num_frames": 121,
    "h": 704,
    "w": 1280,
    "distribution_loss": "dmd",
    "trainer": "score_distillation_wan22",
    "gradient_checkpointing": True,
    "num_frame_per_block": 31,
    "num_training_frames": 31,
    "load_raw_video": False,
}


@pytest.mark.parametrize("name", ["wan22-ti2v-5b", "wan22-ti2v-5b-2step"])
def test_every_key_of_a_recipe_loads(name: str) -> None:
    path = ROOT / "recipes" / f"{name}.yaml"
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    config = resolve_config(DistillConfig, NEEDED | {"config": str(path)})
    for key, value in values.items():
        loaded = asdict(config)[key]
        assert (list(loaded) if isinstance(loaded, tuple) else loaded) == value, key


def test_the_first_recipe_is_the_defaults_and_names_every_knob() -> None:
    path = ROOT / "recipes" / "wan22-ti2v-5b.yaml"
    compiled = replace(DistillConfig(**NEEDED), compile=True)  # as the stated cost counts on; it changes no number
    assert resolve_config(DistillConfig, NEEDED | {"config": str(path)}) == compiled
    second = resolve_config(DistillConfig, NEEDED | {"config": str(path.with_name("wan22-ti2v-5b-2step.yaml"))})
    changed = {"timesteps": (1000.0, 500.0), "critic_warmup": 200, "exit_schedule": "stratified"}
    assert second == replace(compiled, **changed)


def write(folder: Path, values: dict[str, object]) -> str:
    (folder / "foreign.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(folder / "foreign.yaml")


def test_the_published_recipe_becomes_the_defaults(tmp_path: Path) -> None:
    options, notes = translated_options(NEEDED | {"config": write(tmp_path, PUBLISHED)})
    assert resolve_config(DistillConfig, options) == DistillConfig(**NEEDED)
    text = "\n".join(notes)
    assert "guidance_scale -> guidance_scale=7.0" in text
    assert "wandb_key: without effect" in text
    assert "SECRET" not in text
    named = {note.removeprefix(f"{tmp_path}/foreign.yaml: ").split(" ")[0].rstrip(":") for note in notes}
    silent = set(PUBLISHED) - named
    assert silent <= {"warp_denoising_step", "model_kwargs", "beta1_critic", "beta2_critic", "image_or_video_shape",
                      "num_training_frames"}, "said with the key that they go with"  # fmt: skip


def test_the_command_line_wins_over_a_foreign_file(tmp_path: Path) -> None:
    given = NEEDED | {"config": write(tmp_path, PUBLISHED), "student_lr": 1e-6, "seed": None}
    config = resolve_config(DistillConfig, translated_options(given)[0])
    assert (config.student_lr, config.critic_lr, config.seed) == (1e-6, 1e-7, 0)


@pytest.mark.parametrize(
    ("change", "option", "value"),
    [
        ({"guidance_scale": 3.0}, "guidance_scale", 4.0),
        ({"real_guidance_scale": 5.0, "fake_guidance_scale": 0.0}, "guidance_scale", 6.0),
        ({"denoising_loss_type": "v"}, "critic_loss", "flow"),
        ({"denoising_step_list": [1000, 500, 0]}, "timesteps", (1000.0, 500.0)),
        ({"mixed_precision": False}, "dtype", "float32"),
        ({"ema_weight": -1}, "ema_decay", 0.0),
        ({"dfake_gen_update_ratio": 3}, "student_update_interval", 3),
        ({"ts_schedule_max": True}, "ts_schedule_max", True),
        ({"gradient_checkpointing": False}, "activation_checkpointing", "off"),
        ({"log_iters": 50}, "checkpoint_every", 50),
    ],
)
def test_values_are_translated(change: dict[str, object], option: str, value: object) -> None:
    found = translate_config(PUBLISHED | change)
    assert found.refused == []
    assert found.options[option] == value


def test_an_unwarped_list_loses_its_shift() -> None:
    """Times 937.5, 625 are the indices 750, 250 after a shift of 5."""
    found = translate_config(PUBLISHED | {"denoising_step_list": [1000, 937.5, 625], "warp_denoising_step": False})
    assert found.options["timesteps"] == pytest.approx((1000, 750, 250))


def test_what_a_silent_file_means() -> None:
    """The reference's own defaults: score times from the next step upwards, one rate, size from the latents."""
    silent = {"ts_schedule", "lr_critic", "num_frames", "h", "w", "beta1_critic", "ema_weight"}
    found = translate_config({key: value for key, value in PUBLISHED.items() if key not in silent})
    assert found.refused == []
    wanted = {"ts_schedule": True, "critic_lr": 5e-7, "num_frames": 121, "height": 704, "width": 1280, "ema_decay": 0.0}
    assert {key: found.options[key] for key in wanted} == wanted


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"real_name": "Wan2.1-T2V-14B"}, "real_name=Wan2.1-T2V-14B: only Wan2.2"),
        ({"generator_type": "causal"}, "causal students are not supported"),
        ({"distribution_loss": "sid"}, "distribution_loss=sid"),
        ({"generator_ckpt": "ode.pt"}, "--init-from"),
        ({"beta1_critic": 0.5}, "beta1_critic=0.5: differs"),
        ({"model_kwargs": {"timestep_shift": 8.0}}, "there is one shift"),
        ({"num_frames": 81}, "image_or_video_shape"),
        ({"num_training_frames": 21}, "the video has 31 latent frames"),
        ({"fake_guidance_scale": 1.0}, "the critic has no guidance"),
        ({"denoising_loss_type": "eps"}, "choose one of x0, flow, v, noise"),
        ({"sponsor": 1}, "sponsor=1: not a key of ours"),
        ({"denoising_step_list": "four"}, "needs a list of numbers"),
    ],
)
def test_what_cannot_be_followed_is_refused_with_its_reason(
    tmp_path: Path, change: dict[str, object], words: str
) -> None:
    with pytest.raises(ValueError, match="foreign.yaml: ") as refusal:
        translated_options({"config": write(tmp_path, PUBLISHED | change)})
    assert words in str(refusal.value)


def test_no_key_has_two_meanings_and_every_option_named_is_ours() -> None:
    tables = [set(RENAMED_KEYS), set(ALLOWED_VALUES), set(WITHOUT_EFFECT), set(JOINT_KEYS), set(RENAMED_VALUES)]
    assert sum(map(len, tables)) == len(set().union(*tables))
    assert set(RENAMED_KEYS.values()) <= {item.name for item in fields(DistillConfig)}


def test_our_own_files_pass_through(tmp_path: Path) -> None:
    given = NEEDED | {"config": write(tmp_path, {"seed": 3})}
    assert translated_options(given) == (given, [])


def test_the_command_says_what_became_of_each_key(tmp_path: Path) -> None:
    path = write(tmp_path, PUBLISHED)
    done = CliRunner().invoke(cli, ["distill", "--config", path, "--shards", "none", "--model", "none", "--out", "o"])
    assert "guidance_scale -> guidance_scale=7.0" in done.output
    assert isinstance(done.exception, ValueError), "there is no such model; one line in the real command"
