"""Translates configurations of quanhaol/Wan2.2-TI2V-5B-Turbo and guandeh17/Self-Forcing.

Every key is translated, noted as without effect, or refused with the reason; none is ignored silently.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from common.options import read_yaml
from common.video import SPACE_STRIDE, TIME_STRIDE

Values = Mapping[str, object]
MODEL, SHIFT, CAUSAL = "Wan2.2-TI2V-5B", "timestep_shift", "it is for causal students"
# No option of ours has these names: a file with one of them is the reference's.
TURBO_ONLY_KEYS = {"denoising_step_list", "real_name", "dfake_gen_update_ratio", "distribution_loss"}
REFERENCE_DEFAULTS = {"timestep_shift": 1.0, "ts_schedule": True, "denoising_loss_type": "x0", "ema_weight": 0.0}
RENAMED_KEYS = {
    **{key: key for key in ("beta1", "beta2", "weight_decay", "ts_schedule", "ts_schedule_max", "batch_size", "seed")},
    **{"num_frames": "num_frames", "h": "height", "w": "width", "timestep_shift": "shift"},
    **{"lr": "student_lr", "lr_critic": "critic_lr", "dfake_gen_update_ratio": "student_update_interval"},
    **{"ema_start_step": "ema_start", "total_batch_size": "global_batch", "log_iters": "checkpoint_every"},
}
RENAMED_VALUES: dict[str, tuple[str, dict[object, str]]] = {  # its `v` and `flow` are the same error
    "denoising_loss_type": ("critic_loss", {"x0": "x0", "flow": "flow", "v": "flow", "noise": "noise"}),
    "mixed_precision": ("dtype", {True: "bfloat16", False: "float32"}),
    "gradient_checkpointing": ("activation_checkpointing", {True: "selective", False: "off"}),
}
ALLOWED_VALUES: dict[str, tuple[tuple[object, ...], str]] = {  # values that mean what we do, and why no others
    "real_name": ((MODEL,), "only Wan2.2-TI2V models are distilled"),
    "fake_name": ((MODEL,), "the critic starts from the teacher's weights"),
    "generator_name": ((MODEL,), "the student starts from the teacher's weights"),
    "generator_type": (("bidirectional",), "causal students are not supported"),
    "distribution_loss": (("dmd",), "only Distribution Matching Distillation is supported"),
    "trainer": (("score_distillation", "score_distillation_wan22"), "only score distillation is supported"),
    "num_train_timestep": ((1000,), "times run from 0 to 1000"),
    "fake_guidance_scale": ((0,), "the critic has no guidance"),
    "min_score_timestep": ((0,), "score times start at 0; --score-low bounds sigma"),
    "i2v": ((False,), "it is for Wan2.1; here every record with a first frame uses it"),
    "independent_first_frame": ((False,), CAUSAL),
    "last_step_only": ((False,), "the rollout ends at each timestep in turn; --timesteps 1000 has one step only"),
    "context_noise": ((0,), CAUSAL),
    "generator_ckpt": ((None, ""), "give it as --init-from FILE"),
}
IGNORED_KEYS: dict[str, tuple[str, ...]] = {  # reason: keys
    "FSDP2 shards every transformer block": ("generator_fsdp_wrap_strategy", "real_score_fsdp_wrap_strategy",
                                             "fake_score_fsdp_wrap_strategy", "sharding_strategy"),
    "no such encoder is loaded": ("text_encoder_fsdp_wrap_strategy", "image_encoder_fsdp_wrap_strategy",
                                  "text_encoder_cpu_offload"),
    "encode embeds it into the data set (--negative-prompt)": ("negative_prompt",),
    "encode the videos and give --shards": ("load_raw_video", "data_path", "data_type"),
    CAUSAL: ("num_frame_per_block", "same_step_across_blocks"),
    "it is for sampling": ("causal", "ckpt_step", "prompt_name", "prompt_path", "eval_first_n", "num_samples",
                           "height", "width"),
    "W&B reads it from its environment": ("wandb_host", "wandb_entity", "wandb_project"),
    "W&B reads it from its environment; a key does not belong in a file": ("wandb_key",),
    "a run resumes by itself, and collects no garbage at intervals": ("initial_step", "gc_interval"),
    "it is for another loss": ("discriminator_lr_multiplier", "sid_alpha"),
    "give --out": ("logdir", "config_name"),
}  # fmt: skip
WITHOUT_EFFECT = {key: reason for reason, keys in IGNORED_KEYS.items() for key in keys}
JOINT_KEYS = {  # depend on other keys: `Translation.add_joint_keys`
    *("denoising_step_list", "warp_denoising_step", "model_kwargs", "guidance_scale", "real_guidance_scale"),
    *("beta1_critic", "beta2_critic", "ema_weight", "image_or_video_shape", "num_training_frames"),
}


@dataclass
class Translation:
    """What became of each key."""

    values: Values
    options: dict[str, object] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def set(self, key: str, name: str, value: object) -> None:
        """Set an option and note it."""
        self.options[name] = value
        self.notes.append(f"{key} -> {name}={value}")

    def number(self, key: str) -> float:
        """The value of a key as a number."""
        return float(str(self.values[key]))

    def add_key(self, key: str, value: object) -> None:
        """Translate a key that stands alone."""
        if key in RENAMED_KEYS:
            self.set(key, RENAMED_KEYS[key], value)
        elif key in RENAMED_VALUES:
            name, names = RENAMED_VALUES[key]
            if value in list(names):  # a list: the value may not be hashable
                self.set(key, name, names[value])
            else:
                self.refused.append(f"{key}={value}: choose one of {', '.join(map(str, names))}")
        elif key in ALLOWED_VALUES:
            allowed, reason = ALLOWED_VALUES[key]
            outcome = self.notes if value in allowed else self.refused
            outcome.append(f"{key}: same here" if value in allowed else f"{key}={value}: {reason}")
        elif key in WITHOUT_EFFECT:
            self.notes.append(f"{key}: without effect, {WITHOUT_EFFECT[key]}")
        elif key not in JOINT_KEYS:
            self.refused.append(f"{key}={value}: not a key of ours or of the reference project")

    def add_joint_keys(self) -> None:
        """Translate the keys that depend on others."""
        values = self.values
        self.add_steps()
        inner = values.get("model_kwargs") or {}
        assert isinstance(inner, dict), f"model_kwargs={inner}"
        if inner.get(SHIFT, values[SHIFT]) != values[SHIFT]:
            self.refused.append(f"model_kwargs={inner}: has another timestep_shift; there is one shift")
        self.notes += [f"model_kwargs.{key}: without effect, the model folder has it" for key in inner if key != SHIFT]
        for key in ("guidance_scale", "real_guidance_scale"):
            if key in values:  # cond + g (cond - uncond) = uncond + (g + 1) (cond - uncond)
                self.set(key, "guidance_scale", self.number(key) + 1)
        for name in ("beta1", "beta2"):
            if values.get(f"{name}_critic", values.get(name)) != values.get(name):
                self.refused.append(f"{name}_critic={values[f'{name}_critic']}: differs from {name}; roles share one")
        if "lr" in values and "lr_critic" not in values:
            self.set("lr", "critic_lr", values["lr"])
        self.set("ema_weight", "ema_decay", max(0.0, self.number("ema_weight")))
        if values.get("seed") == 0:
            self.notes.append("seed: 0 is a seed like any other; in the reference it stands for a random one")
        self.check_shape()

    def add_steps(self) -> None:
        """Its timesteps are ours if they are warped; otherwise they include the shift. A final 0 is no step."""
        listed = self.values.get("denoising_step_list")
        if not isinstance(listed, list) or not all(isinstance(item, int | float) for item in listed):
            self.refused.append(f"denoising_step_list={listed}: needs a list of numbers")
            return
        times, shift = tuple(float(item) for item in listed if item), self.number("timestep_shift")
        if not self.values.get("warp_denoising_step", False):  # undo t' = 1000 s u / (1 + (s - 1) u), u = t / 1000
            times = tuple(time / (shift - (shift - 1) * time / 1000) for time in times)
        self.set("denoising_step_list", "timesteps", times)

    def check_shape(self) -> None:
        """`image_or_video_shape` (B F C H W) in latents gives the size in pixels, or must agree with it."""
        listed = self.values.get("image_or_video_shape")
        if isinstance(listed, list) and len(listed) == 5:
            _, frames, _, height, width = listed
            sizes = {"num_frames": (frames - 1) * TIME_STRIDE + 1}
            sizes |= {"height": height * SPACE_STRIDE, "width": width * SPACE_STRIDE}
            for name, size in sizes.items():
                if self.options.setdefault(name, size) != size:
                    self.refused.append(f"image_or_video_shape={listed}: {name} {size}, not {self.options[name]}")
        latent = (int(str(self.options.get("num_frames", 121))) - 1) // TIME_STRIDE + 1  # 121 is our default
        if self.values.get("num_training_frames", latent) != latent:
            self.refused.append(
                f"num_training_frames={self.values['num_training_frames']}: the video has {latent} latent frames"
            )


def translated_options(options: Values) -> tuple[dict[str, object], list[str]]:
    """Options as `resolve_config` takes them, with a reference file of `config` translated, and notes on its keys.

    Raises ValueError that names every key that cannot be followed.
    """
    path = options.get("config")
    values = read_yaml(str(path)) if path else {}
    if not TURBO_ONLY_KEYS & set(values):
        return dict(options), []
    translation = translate_config(values)
    if translation.refused:
        raise ValueError(f"config={path}: {'; '.join(translation.refused)}")
    # None and () are options that the command line does not set
    set_options = {key: value for key, value in options.items() if value is not None and value != ()}
    return translation.options | set_options | {"config": None}, [f"{path}: {note}" for note in translation.notes]


def translate_config(values: Values) -> Translation:
    """Translate every key of a reference file; what it leaves out has the reference's default."""
    translation = Translation(REFERENCE_DEFAULTS | dict(values))
    for key, value in translation.values.items():
        translation.add_key(key, value)
    translation.add_joint_keys()
    return translation
