"""Pictures of a row, of any mode, orientation and size, become first frames."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from common.video import VideoSpec
from stage1_encode.generation.condition_encoder import read_row_picture
from stage1_encode.media.rows import Row
from tests import tiny_models

SPEC = VideoSpec(9, 64, 96, fps=12)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_pictures_of_any_mode_become_first_frames(tmp_path: Path, mode: str) -> None:
    pixels = tiny_models.picture(90, 33, seed=3)
    deep = Image.fromarray(pixels[..., 0].astype("uint16") * 257)
    name = "x.tif" if mode == "CMYK" else "x.png"
    (deep if mode == "I;16" else Image.fromarray(pixels).convert(mode)).save(tmp_path / name)
    result = read_row_picture(Row(0, 2, name, "a", None, ""), "a", tmp_path / "p.csv", SPEC)
    assert isinstance(result, Tensor), result
    assert result.shape == (64, 96, 3)
    assert 5 < result.float().std() < 120


@pytest.mark.parametrize(("orientation", "turn"), [(1, 0), (3, 180), (6, 90), (8, 270)])
def test_pictures_are_turned_upright(tmp_path: Path, orientation: int, turn: int) -> None:
    """EXIF says how the camera was held; the picture is stored turned against it."""
    upright = Image.fromarray(tiny_models.picture(120, 180, seed=3))
    upright.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright.rotate(turn, expand=True).save(tmp_path / "turned.png", exif=exif)
    rows = [Row(0, 2, name, "a", None, "") for name in ("turned.png", "upright.png")]
    result, expected = (read_row_picture(row, "a", tmp_path / "p.csv", SPEC) for row in rows)
    assert torch.equal(result, expected)


@pytest.mark.parametrize("size", [(1, 1), (3000, 20), (20, 3000)])
def test_pictures_of_any_size_become_first_frames(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size, (10, 200, 90)).save(tmp_path / "x.png")
    result = read_row_picture(Row(0, 2, "x.png", "a", None, ""), "a", tmp_path / "p.csv", SPEC)
    assert isinstance(result, Tensor), result
    assert (result == torch.tensor([10, 200, 90])).all()
