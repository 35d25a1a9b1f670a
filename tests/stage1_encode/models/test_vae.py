"""The VAE's encoder for single frames against diffusers' own, and in lower precision."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLWan

from stage1_encode.models import vae
from tests import tiny_models


def test_the_frame_encoder_is_the_vae_at_a_third_of_the_work(model: Path) -> None:
    whole = AutoencoderKLWan.from_pretrained(model / "vae")
    own = vae.make_frame_encoder(vae.load_vae(model, dtype=torch.float32, device=torch.device("cpu")))
    pixels = torch.randint(0, 256, (3, 96, 160, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    with torch.no_grad():
        mode = whole.encode(pixels.permute(0, 3, 1, 2)[:, :, None] / 127.5 - 1).latent_dist.mode()
    torch.testing.assert_close(vae.encode_frames(own, pixels), (mode - own.mean) / own.std, rtol=1e-4, atol=1e-4)


def test_lower_precision_stays_within_one_percent(model: Path) -> None:
    pixels = torch.randint(0, 256, (4, 64, 96, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    exact, half = (
        vae.encode_frames(vae.make_frame_encoder(vae.load_vae(model, dtype=dtype, device=torch.device("cpu"))), pixels)
        for dtype in (torch.float32, torch.float16)
    )
    assert (half - exact).norm() / exact.norm() < 0.01


def test_a_vae_without_a_weight_is_refused(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    tiny_models.lose_weight(folder / "vae", "encoder.conv_in.weight")
    with pytest.raises(ValueError, match=r"^model=.*/vae: lacks weights \(encoder\.conv_in\.weight\); .*$"):
        vae.load_vae(folder, dtype=torch.float32, device=torch.device("cpu"))


def test_another_vae_or_a_broken_one_is_one_line_with_its_folder(model: Path, tmp_path: Path) -> None:
    AutoencoderKL().save_pretrained(tmp_path / "other" / "vae")
    folder = shutil.copytree(model, tmp_path / "model")
    (path,) = (folder / "vae").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1000])
    for place in (tmp_path / "other", folder):
        with pytest.raises(ValueError, match=rf"^model={place}/vae: cannot be read: \w[^\n]*; copy it again, [^\n]*$"):
            vae.load_vae(place, dtype=torch.float32, device=torch.device("cpu"))
