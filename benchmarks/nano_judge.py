"""Conditions of the nano world made on the device, and how near a student is to its teacher by every measure.

Nothing is read but the model folder: scenes are a function of a seed, so they are drawn, and their first frames
rendered and encoded, in seconds. The judge's seed is used for nothing else, and its combinations of shape, colour and
motion are none that the teacher was trained on. All measures are those of `evaluate` and of the analyser.
Shapes: N conditions, C channels, T latent frames, H W latent size, S noise seeds, K steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from statistics import fmean

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from benchmarks.graphed_run import ConditionPool, DrawTape, draws_from
from common.condition import Denoiser
from common.flow import shift
from examples.nano.analyse import score
from examples.nano.build import Texts
from examples.nano.captions import NEGATIVE_PROMPT, Asked, captions, parse
from examples.nano.gate import pixels
from examples.nano.render import first_frames, render, to_network
from examples.nano.vae import encode
from examples.nano.world import draw_scenes
from stage1_encode.models.vae import encode_frames, load_vae, make_frame_encoder
from stage2_distill.dmd.rollout import rollout, sample_euler
from stage2_distill.evaluation.feature_maps import latent_energies
from stage2_distill.evaluation.latent_metrics import FEATURE_MAPS, frechet_distance, reference_seeds, seed_diversity
from stage2_distill.evaluation.two_sample import PIXEL_PATCH, ClassifierSettings, two_sample_accuracy
from stage2_distill.model.wan import guided

TRAIN_SEED, JUDGE_SEED = 77, 910_301  # the second is used for nothing else
SCENES_AT_ONCE, ENCODED_AT_ONCE, DECODED_AT_ONCE = 1024, 256, 64
SHIFT = 5.0


@dataclass(frozen=True)
class Measures:
    """How a set compares with the teacher's at many steps, as means over noise seeds; None = not measured."""

    accuracy: float | None  # of a classifier that tells latents apart, 0.5 = it cannot
    pixel_accuracy: float | None  # of one that reads whitened pixels
    floors: float  # Frechet distance over the teacher's own between two seeds, in the map of random convolutions
    floors_tanh: float
    floors_spectral: float
    sharpness: float  # these and the rest: ratios to the teacher's
    temporal_variance: float
    contrast: float
    diversity: float | None
    colour: float | None
    shape: float | None
    motion: float | None
    valid: float | None


MEASURES = tuple(item.name for item in fields(Measures))


def make_pool(
    model: Path, count: int, *, seed: int, held: bool, device: torch.device
) -> tuple[ConditionPool, list[tuple[Asked, ...]]]:
    """`count` conditions of a generator seed, rounded as records are, and what their prompts ask for."""
    texts = Texts(model, device)
    encoder = make_frame_encoder(load_vae(model, dtype=torch.float32, device=device))
    frames, rows, prompts = [], [], list[str]()
    for start in range(0, count, SCENES_AT_ONCE):
        scenes = draw_scenes(seed, torch.arange(start, min(start + SCENES_AT_ONCE, count), device=device), held=held)
        words = captions(scenes)
        prompts += words
        frames.append(encode_frames(encoder, first_frames(scenes)).bfloat16())
        rows.append(texts(words).bfloat16())
    # cloned: what inference mode made cannot be saved for a backward pass
    pool = ConditionPool(torch.cat(frames).clone(), torch.cat(rows), texts([NEGATIVE_PROMPT])[0].bfloat16())
    return pool, [parse(prompt) for prompt in prompts]


@dataclass(frozen=True)
class JudgeSettings:
    """How much is sampled and measured."""

    seeds: tuple[int, ...] = (0, 1, 2)  # of the noise
    teacher_steps: int = 50
    classifier_steps: int = 200
    judged_clips: int = 1024  # conditions whose pixels are read, of the first seed
    pixel_test: bool = False  # also tell pixels apart, which takes longer than all else
    batch: int = 1024  # conditions sampled at once


@dataclass(frozen=True)
class Judge:
    """Held-out conditions, and the teacher that students are compared with on them."""

    pool: ConditionPool
    asked: Sequence[Sequence[Asked]]
    vae: AutoencoderKLWan
    teacher: Denoiser  # without guidance
    latent_shape: tuple[int, ...]
    settings: JudgeSettings
    most_steps: int  # of any student

    @property
    def device(self) -> torch.device:
        """Where everything lies."""
        return self.pool.text.device

    @cached_property
    def noise(self) -> dict[int, Tensor]:
        """Standard normal draws (K N C T H W) by seed, which all candidates share."""
        seeds = sorted({*self.settings.seeds, *reference_seeds(self.settings.seeds)})
        shape = self.most_steps, len(self.pool.text), *self.latent_shape
        generators = {seed: torch.Generator(self.device).manual_seed(seed) for seed in seeds}
        return {seed: torch.randn(shape, generator=g, device=self.device) for seed, g in generators.items()}

    @torch.no_grad()
    def sample_student(self, student: Denoiser, sigmas: Sequence[float], seed: int) -> Tensor:
        """Latents (N C T H W) of the student's rollout."""
        parts = []
        for start in range(0, len(self.pool.text), self.settings.batch):
            rows = slice(start, start + self.settings.batch)
            noise = self.noise[seed][:, rows]
            with draws_from(DrawTape(noise[1:], noise.new_zeros(0, 0))):
                condition, generators = self.pool.take(rows), [None] * noise.shape[1]
                parts.append(rollout(student, noise[0], condition, sigmas=sigmas, generators=generators))
        return torch.cat(parts)

    @torch.no_grad()
    def sample_teacher(self, scale: float, sigmas: Sequence[float], seed: int) -> Tensor:
        """Latents (N C T H W) of the teacher's Euler steps with guidance."""
        teacher = guided(self.teacher, negative_text=self.pool.negative, scale=scale)
        return torch.cat(
            [
                sample_euler(teacher, noise, self.pool.take(slice(start, start + len(noise))), sigmas=sigmas)
                for start, noise in zip(
                    range(0, len(self.pool.text), self.settings.batch),
                    self.noise[seed][0].split(self.settings.batch),
                    strict=True,
                )
            ]
        )

    def decode(self, latents: Tensor) -> Tensor:
        """The first clips' pixels (N T H W 3) uint8."""
        return pixels(self.vae, latents[: self.settings.judged_clips], DECODED_AT_ONCE)

    def answers(self, clips: Tensor) -> dict[str, float]:
        """The analyser's shares of right colours, shapes and motions and of valid clips."""
        return score(clips, self.asked[: len(clips)])

    def tell_apart(self, one: Tensor, other: Tensor, *, seed: int, **changes: object) -> float:
        """Accuracy of the two-sample test."""
        size = {"width": 96, "batch_size": 256} if self.device.type == "cuda" else {"width": 32, "batch_size": 64}
        classifier = ClassifierSettings(max_steps=self.settings.classifier_steps, **size, **changes)
        return two_sample_accuracy(one, other, seeds=(seed,), device=self.device, settings=classifier).mean

    def true_latents(self) -> Tensor:
        """Latents (N C T H W) of the clips that the conditions come from."""
        parts = []
        for start in range(0, len(self.pool.text), ENCODED_AT_ONCE):
            index = torch.arange(start, min(start + ENCODED_AT_ONCE, len(self.pool.text)), device=self.device)
            parts.append(encode(self.vae, to_network(render(draw_scenes(JUDGE_SEED, index, held=True)))))
        return torch.cat(parts)

    def features(self, latents: Tensor) -> list[Tensor]:
        """Features (N D) in each map, and mean energies (3) at the end."""
        parts = latents.split(self.settings.batch)
        maps = [torch.cat([one(part) for part in parts]) for one in FEATURE_MAPS]
        return [*maps, torch.cat([latent_energies(part) for part in parts]).mean(dim=0)]


class Reference:
    """The teacher's sets at one guidance scale, and what is compared with them."""

    def __init__(self, judge: Judge, scale: float) -> None:
        self.judge, self.scale = judge, scale
        steps, seeds = judge.settings.teacher_steps, judge.settings.seeds
        sigmas = [shift(1 - step / steps, SHIFT) for step in range(steps)]
        self.sets = {seed: judge.sample_teacher(scale, sigmas, seed) for seed in judge.noise}
        self.features = {seed: judge.features(latents) for seed, latents in self.sets.items()}
        self.partners = dict(zip(seeds, reference_seeds(seeds), strict=True))
        self.floors = [
            fmean(frechet_distance(self.features[a][index], self.features[b][index]) for a, b in self.partners.items())
            for index in range(len(FEATURE_MAPS))
        ]
        self.diversity = float(seed_diversity([self.sets[seed] for seed in seeds]).mean())
        self.answers = judge.answers(judge.decode(self.sets[seeds[0]]))
        self.other_clips = judge.decode(self.sets[self.partners[seeds[0]]])

    def measure(self, sets: dict[int, Tensor], *, brief: bool = False) -> Measures:
        """All measures of sets (N C T H W) by noise seed; `brief`: only distances and ratios of latents."""
        judge = self.judge
        own = {seed: judge.features(latents) for seed, latents in sets.items()}
        floors = [
            fmean(frechet_distance(own[seed][index], self.features[self.partners[seed]][index]) for seed in sets)
            / floor
            for index, floor in enumerate(self.floors)
        ]
        ratios = torch.stack([own[seed][-1] / self.features[seed][-1] for seed in sets]).mean(dim=0).tolist()
        if brief:
            return Measures(None, None, *floors, *ratios, None, None, None, None, None)
        (seed, latents), *_ = sets.items()
        clips, accuracy = judge.decode(latents), None
        if judge.settings.pixel_test:
            videos = [part.movedim(-1, 1) for part in (clips, self.other_clips)]
            accuracy = judge.tell_apart(*videos, seed=seed, patch=PIXEL_PATCH)
        answers = judge.answers(clips)
        shares = [answers[name] / max(self.answers[name], 1e-9) for name in ("colour", "shape", "motion", "valid")]
        diversity = float(seed_diversity(list(sets.values())).mean()) / self.diversity if len(sets) > 1 else None
        # not whitened: with whitened latents any sampler of few steps is told, however good (benchmarks/LOG.md)
        told = judge.tell_apart(latents, self.sets[self.partners[seed]], seed=seed, whiten=False)
        return Measures(told, accuracy, *floors, *ratios, diversity, *shares)
