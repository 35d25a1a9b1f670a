"""A configuration in the words of quanhaol/Wan2.2-TI2V-5B-Turbo and guandeh17/Self-Forcing, understood.

Every key is translated, or has no effect here, or is refused with the reason. Nothing is passed over in silence.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from common.options import read_yaml
from common.video import SPACE_STRIDE, TIME_STRIDE

TURBO_ONLY_KEYS = {
    "denoising_step_list",
    "real_name",
    "dfake_gen_update_ratio",
    "distribution_loss",
}  # no option of ours
MODEL = "Wan2.2-TI2V-5B"
Values = Mapping[str, object]


@dataclass
class TranslatedConfig:
    """What became of each key."""

    options: dict[str, object] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


RENAMED_KEYS = {
    "timestep_shift": "shift",
    "lr": "student_lr",
    "lr_critic": "critic_lr",
    "beta1": "beta1",
    "beta2": "beta2",
    "weight_decay": "weight_decay",
    "dfake_gen_update_ratio": "student_update_interval",
    "ts_schedule": "ts_schedule",
    "ts_schedule_max": "ts_schedule_max",
    "ema_weight": "ema_decay",
    "ema_start_step": "ema_start",
    "batch_size": "batch_size",
    "total_batch_size": "global_batch",
    "log_iters": "checkpoint_every",
    "seed": "seed",
    "num_frames": "num_frames",
    "h": "height",
    "w": "width",
}
ALLOWED_VALUES: dict[str, tuple[tuple[object, ...], str]] = {
    "real_name": ((MODEL,), "only Wan2.2-TI2V models are distilled here"),
    "fake_name": ((MODEL,), "the critic starts from the teacher's weights"),
    "generator_name": ((MODEL,), "the student starts from the teacher's weights"),
    "generator_type": (("bidirectional",), "a causal student is not built here"),
    "distribution_loss": (("dmd",), "only Distribution Matching Distillation is built here"),
    "trainer": (("score_distillation", "score_distillation_wan22"), "only its score distillation is built here"),
    "num_train_timestep": ((1000,), "times run from 0 to 1000"),
    "fake_guidance_scale": ((0, 0.0), "the critic has no guidance here"),
    "min_score_timestep": ((0,), "score times start at 0; --score-low bounds sigma"),
    "i2v": ((False,), "it is the Wan2.1 way to give an image; here every record with a first frame gives it"),
    "independent_first_frame": ((False,), "it belongs to causal students"),
    "last_step_only": ((False,), "the rollout leaves at every ladder step in turn; --timesteps 1000 has one step only"),
    "context_noise": ((0, 0.0), "it belongs to causal students"),
    "generator_ckpt": ((None, ""), "it is a pickle; convert it to a diffusers folder and give --init-from FOLDER"),
}
SHARDING_REASON = "FSDP2 shards every transformer block"
SAMPLING_REASON = "it belongs to its sampling script"
CAUSAL_REASON = "it belongs to causal students"
WITHOUT_EFFECT = {
    "generator_fsdp_wrap_strategy": SHARDING_REASON,
    "real_score_fsdp_wrap_strategy": SHARDING_REASON,
    "fake_score_fsdp_wrap_strategy": SHARDING_REASON,
    "text_encoder_fsdp_wrap_strategy": "no text encoder is loaded",
    "image_encoder_fsdp_wrap_strategy": "no image encoder is loaded",
    "text_encoder_cpu_offload": "no text encoder is loaded",
    "sharding_strategy": SHARDING_REASON,
    "negative_prompt": "encode has embedded it into the data set (--negative-prompt)",
    "load_raw_video": "encode has read the videos",
    "data_path": "encode its videos and give --shards",
    "data_type": "encode its videos and give --shards",
    "num_frame_per_block": CAUSAL_REASON,
    "same_step_across_blocks": CAUSAL_REASON,
    "causal": SAMPLING_REASON,
    "wandb_host": "W&B takes it from its own environment",
    "wandb_key": "W&B takes it from its own environment; a key does not belong into a file",
    "wandb_entity": "W&B takes it from its own environment",
    "wandb_project": "W&B takes it from its own environment",
    "initial_step": "a run goes on where it was",
    "gc_interval": "nothing waits for the garbage collector",
    "discriminator_lr_multiplier": "there is no discriminator",
    "sid_alpha": "it belongs to another loss",
    "logdir": "give --out",
    "config_name": "give --out",
    "ckpt_step": SAMPLING_REASON,
    "prompt_name": SAMPLING_REASON,
    "prompt_path": SAMPLING_REASON,
    "eval_first_n": SAMPLING_REASON,
    "num_samples": SAMPLING_REASON,
    "height": SAMPLING_REASON,
    "width": SAMPLING_REASON,
}


def translated_options(options: Values) -> tuple[dict[str, object], list[str]]:
    """Options as `resolve` takes them, a foreign file of `config` replaced by its translation; notes on its keys.

    Raises ValueError that names every key that cannot be followed.
    """
    path = options.get("config")
    values = read_yaml(str(path)) if path else {}
    if not TURBO_ONLY_KEYS & set(values):
        return dict(options), []
    translation = translate_config(values)
    if translation.refused:
        raise ValueError(f"config={path}: {'; '.join(translation.refused)}")
    given_options = {key: value for key, value in options.items() if value is not None and value != ()}
    return translation.options | given_options | {"config": None}, [f"{path}: {note}" for note in translation.notes]


def translate_config(values: Values) -> TranslatedConfig:
    """Every key of a foreign file in our words."""
    translation = TranslatedConfig()
    for key, value in values.items():
        if key in RENAMED_KEYS:
            translation.options[RENAMED_KEYS[key]] = value
            translation.notes.append(f"{key} -> {RENAMED_KEYS[key]}={value}")
        elif key in ALLOWED_VALUES:
            allowed, reason = ALLOWED_VALUES[key]
            if value in allowed:
                translation.notes.append(f"{key}: as it is here")
            else:
                translation.refused.append(f"{key}={value}: {reason}")
        elif key in WITHOUT_EFFECT:
            translation.notes.append(f"{key}: without effect, {WITHOUT_EFFECT[key]}")
        elif key not in JOINT_RULES:
            translation.refused.append(f"{key}={value}: unknown here and in the reference project")
    for rule in dict.fromkeys(JOINT_RULES.values()):
        rule(values, translation)
    return translation


def set_option(translation: TranslatedConfig, key: str, name: str, value: object) -> None:
    """Note a translation that changes the value."""
    translation.options[name] = value
    translation.notes.append(f"{key} -> {name}={value}")


def translate_steps(values: Values, translation: TranslatedConfig) -> None:
    """Its list is ours where it is warped; where it is not, its times already carry the shift. A last 0 is no step."""
    listed = values.get("denoising_step_list")
    if not isinstance(listed, list) or not all(isinstance(item, int | float) for item in listed):
        translation.refused.append(f"denoising_step_list={listed}: needs a list of numbers")
        return
    times = tuple(float(item) for item in listed if item)
    shift = float(str(values.get("timestep_shift", 1)))
    if not values.get("warp_denoising_step", False):
        times = tuple(time / (shift - (shift - 1) * time / 1000) for time in times)
    set_option(translation, "denoising_step_list", "timesteps", times)


def translate_shift(values: Values, translation: TranslatedConfig) -> None:
    """Noise and conversion have one shift here; in the reference the scores' may be left at 1."""
    translation.options.setdefault("shift", 1.0)
    inner = values.get("model_kwargs") or {}
    assert isinstance(inner, dict), f"model_kwargs={inner}"
    for key, value in inner.items():
        if key == "timestep_shift" and value != translation.options["shift"]:
            translation.refused.append(
                f"model_kwargs.timestep_shift={value}: differs from the other; there is one shift"
            )
        elif key != "timestep_shift":
            translation.notes.append(f"model_kwargs.{key}: without effect, the model's folder says it")


def translate_guidance(values: Values, translation: TranslatedConfig) -> None:
    """Its cond + g (cond - uncond) is uncond + (g + 1)(cond - uncond)."""
    key = "real_guidance_scale" if "real_guidance_scale" in values else "guidance_scale"
    if key in values:
        set_option(translation, key, "guidance_scale", float(str(values[key])) + 1)


def translate_loss(values: Values, translation: TranslatedConfig) -> None:
    """Its `v` and `flow` are the same error."""
    kinds = {"x0": "x0", "flow": "flow", "v": "flow", "noise": "noise"}
    kind = str(values.get("denoising_loss_type", "x0"))
    if kind in kinds:
        set_option(translation, "denoising_loss_type", "critic_loss", kinds[kind])
    else:
        translation.refused.append(f"denoising_loss_type={kind}: choose one of {', '.join(kinds)}")


def translate_critic_optimizer(values: Values, translation: TranslatedConfig) -> None:
    """One pair of betas serves both roles here; its critic takes the student's rate where it has none."""
    for name in ("beta1", "beta2"):
        other = values.get(f"{name}_critic", values.get(name))
        if other != values.get(name):
            translation.refused.append(f"{name}_critic={other}: differs from {name}; both roles share one")
    if "lr_critic" not in values and "lr" in values:
        set_option(translation, "lr", "critic_lr", values["lr"])


def translate_defaults(values: Values, translation: TranslatedConfig) -> None:
    """What the reference does where its file is silent, and where its words mean something else."""
    translation.options.setdefault("ts_schedule", True)
    if "mixed_precision" in values:
        set_option(translation, "mixed_precision", "dtype", "bfloat16" if values["mixed_precision"] else "float32")
    if "gradient_checkpointing" in values:
        checkpointing = "selective" if values["gradient_checkpointing"] else "off"
        set_option(translation, "gradient_checkpointing", "activation_checkpointing", checkpointing)
    if values.get("seed") == 0:
        translation.notes.append("seed: 0 is a seed like any other here, in the reference a drawn one")
    if float(str(values.get("ema_weight", -1))) <= 0:
        set_option(translation, "ema_weight", "ema_decay", 0.0)


def translate_shape(values: Values, translation: TranslatedConfig) -> None:
    """`image_or_video_shape` is (B F C H W) in latents; pixels follow from it, or must agree with it."""
    listed = values.get("image_or_video_shape")
    if isinstance(listed, list) and len(listed) == 5:
        _, frames, _, height, width = listed
        sizes = {
            "num_frames": (frames - 1) * TIME_STRIDE + 1,
            "height": height * SPACE_STRIDE,
            "width": width * SPACE_STRIDE,
        }
        for name, size in sizes.items():
            if translation.options.setdefault(name, size) != size:
                translation.refused.append(
                    f"image_or_video_shape={listed}: {name} {size}, elsewhere {translation.options[name]}"
                )
    latent = (int(str(translation.options.get("num_frames", 121))) - 1) // TIME_STRIDE + 1
    stated_frames = values.get("num_training_frames", latent)
    if stated_frames != latent:
        translation.refused.append(f"num_training_frames={stated_frames}: the video has {latent} latent frames")


Rule = Callable[[Values, TranslatedConfig], None]
JOINT_RULES: dict[str, Rule] = {  # keys that are read beside others
    "denoising_step_list": translate_steps,
    "warp_denoising_step": translate_steps,
    "model_kwargs": translate_shift,
    "guidance_scale": translate_guidance,
    "real_guidance_scale": translate_guidance,
    "denoising_loss_type": translate_loss,
    "beta1_critic": translate_critic_optimizer,
    "beta2_critic": translate_critic_optimizer,
    "mixed_precision": translate_defaults,
    "gradient_checkpointing": translate_defaults,
    "image_or_video_shape": translate_shape,
    "num_training_frames": translate_shape,
}
