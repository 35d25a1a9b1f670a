"""Sheets of clips keep the colours that the clips have."""

from pathlib import Path

import numpy
import torch
from einops import rearrange
from PIL import Image

from common.video import VideoSpec
from examples.nano.render import render
from examples.nano.show import COLUMNS, GAP, LABEL_HEIGHT, animation, clearest_conditions, compared_clips, sheet
from examples.nano.world import RGB, draw_scenes
from shards.comparison import LATENTS_STORE, Candidate, Comparison, latent_set_name, write_comparison
from shards.latent_store import LatentGroup, create_group, write_latents


def test_small_objects_keep_their_colours(tmp_path: Path) -> None:
    clean = render(draw_scenes(9, torch.arange(24), held=None)).float()
    clips = (clean + 3 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 255).byte()
    sheet(clips, tmp_path / "sheet.png")
    drawn = numpy.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).astype(int)
    rows = rearrange(drawn, "(n h) (t w) c -> n t h w c", n=24, t=len(COLUMNS))[:, :, :64, 1:-1]
    wanted = clips[:, list(COLUMNS)].numpy().astype(int)
    for colour in RGB:
        inside = numpy.abs(clean[:, list(COLUMNS)].numpy() - colour).max(axis=-1) < 1
        assert inside.sum() > 1000
        assert numpy.abs(rows - wanted)[inside].mean() < 3, colour


def test_evaluation_is_drawn_candidate_by_candidate(tmp_path: Path) -> None:
    kinds = tuple(
        Candidate(name, name, 4, name) for name in ("teacher", "teacher-few", "undistilled", "student", "more")
    )
    write_comparison(tmp_path, Comparison(kinds, (3, 4), (4, 3), 2, 1.5))
    spec = VideoSpec(17, 64, 96, fps=12)
    for index, candidate in enumerate(kinds):
        group = LatentGroup(latent_set_name(candidate, 3), spec, ("a", "b"), ("p", "q"), (3, 3))
        create_group(tmp_path / LATENTS_STORE, group)
        write_latents(tmp_path / LATENTS_STORE, group.step, [0, 1], torch.full((2, *spec.latent_shape), float(index)))
    clips = compared_clips(tmp_path, 2)
    assert clips.shape == (8, 17, 64, 96, 3)
    assert torch.equal(clips[:4], clips[4:]), "both conditions hold the same latents"
    assert len({clip.float().mean().item() for clip in clips[:4]}) == 4


def test_moving_picture_has_a_labelled_column_per_candidate(tmp_path: Path) -> None:
    clips = torch.zeros(2, 3, 5, 8, 12, 3, dtype=torch.uint8)
    clips[:, 1] = 255
    clips[:, 0] = 20 * torch.arange(5, dtype=torch.uint8)[:, None, None, None]  # equal frames would become one
    clips[1, 2, 4] = 128  # the last frame of the last column in the second row
    animation(clips, ["a", "b", "c"], tmp_path / "moving.webp")
    with Image.open(tmp_path / "moving.webp") as picture:
        assert (picture.n_frames, picture.size) == (5, (3 * (24 + GAP), LABEL_HEIGHT + 2 * (16 + GAP)))
        picture.seek(4)
        last = numpy.asarray(picture.convert("RGB")).astype(int)
    centres = last[[LABEL_HEIGHT + 8, LABEL_HEIGHT + 28]][:, [12, 40, 68]].mean(axis=-1)
    assert numpy.abs(centres - [[80, 255, 0], [80, 255, 128]]).max() < 12


def test_conditions_are_chosen_by_what_distillation_gains(tmp_path: Path) -> None:
    kinds = tuple(Candidate(name, name, 4, name) for name in ("teacher", "teacher-few", "undistilled", "student"))
    write_comparison(tmp_path, Comparison(kinds, (3, 4), (4, 3), 3, 1.5))
    spec = VideoSpec(17, 64, 96, fps=12)
    values = {"teacher": (0, 0, 0), "undistilled": (3, 2, 3), "student": (2, 0, 3)}  # gains 1, 2 and 0
    for candidate in kinds:
        group = LatentGroup(latent_set_name(candidate, 3), spec, ("a", "b", "c"), ("p", "q", "r"), (3, 3, 3))
        latents = torch.tensor(values.get(candidate.name, (0, 0, 0))).float()[:, None, None, None, None]
        create_group(tmp_path / LATENTS_STORE, group)
        write_latents(tmp_path / LATENTS_STORE, group.step, [0, 1, 2], latents.expand(3, *spec.latent_shape))
    assert clearest_conditions(tmp_path, 2) == [1, 0]
