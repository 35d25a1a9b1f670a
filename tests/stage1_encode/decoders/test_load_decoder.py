"""--decoder: which file is what, both formats, and one line for a file that is none for this VAE."""

import logging
import math
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stage1_encode.config import DecodeConfig
from stage1_encode.decoders import load_decoder
from stage1_encode.decoders.decoder_files import open_decoder_file
from stage1_encode.decoders.load_decoder import TinyDecoder, check_decoder, encode_test_clip, use_decoder
from stage1_encode.decoders.tiny_network import TinyLayout
from stage1_encode.models.original_models import VAE_NAMES, translate_name
from stage1_encode.models.vae import FullDecoder, WanVae, load_vae
from tests.tiny_models import random_tiny_decoder

LAYOUT = TinyLayout(48, 12, (8, 4, 4, 4), is_wide=False)
NANO = Path(__file__).parents[3] / "examples" / "nano" / "model"
VAE_FILE = NANO / "vae" / "diffusion_pytorch_model.safetensors"
FLOAT32 = {"dtype": torch.float32, "device": torch.device("cpu")}


@pytest.fixture
def nano() -> WanVae:
    return load_vae(NANO, **FLOAT32)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, path)
    return path


def draw_latents(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def test_full_is_the_vaes_own(nano: WanVae) -> None:
    assert use_decoder(nano, "full") is nano
    assert nano.decoder is nano.full_decoder


def test_both_formats_give_the_same_tiny_decoder(
    nano: WanVae, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    tensors, z = random_tiny_decoder(LAYOUT), draw_latents(2, 48, 7, 1, 2)
    torch.save({"state_dict": tensors}, tmp_path / "taew2_2.pth")
    write_tensors(tmp_path / "taew2_2.safetensors", {name: tensor.half() for name, tensor in tensors.items()})
    vae = use_decoder(nano, str(tmp_path / "taew2_2.pth"))
    assert isinstance(vae.decoder, TinyDecoder)
    assert nano.model.decoder is None  # nothing of the larger one is kept
    assert re.search(r"decoder: .*taew2_2.pth \(tiny\), \d+\.\d dB PSNR to the VAE's own on a test clip", caplog.text)
    whole = vae.decoder.decode_batch(z)
    assert whole.shape == (2, 25, 16, 32, 3)
    assert whole.dtype == torch.uint8
    for video, expected in zip(z, whole, strict=True):
        chunks = list(vae.decoder.decode_stream(video))
        assert [len(chunk) for chunk in chunks] == [1, 8, 8, 4, 4]
        assert (torch.cat(chunks).float() - expected.float()).abs().max() <= 1  # a batch may be rounded otherwise
    other = use_decoder(replace(load_vae(NANO, **FLOAT32), chunk_frames=1), str(tmp_path / "taew2_2.safetensors"))
    assert (torch.cat(list(other.decoder.decode_stream(z[0]))).float() - whole[0].float()).abs().max() <= 2  # float16


def test_latents_are_those_for_which_a_file_was_trained(nano: WanVae, tmp_path: Path) -> None:
    """Files of one layout differ in this. A decoder whose pixels grow with the first latent's scale finds its own."""
    path = str(write_tensors(tmp_path / "any.safetensors", random_tiny_decoder(LAYOUT)))
    plain, scaled = load_decoder.list_decoders(nano, open_decoder_file(Path(path)))
    latents = encode_test_clip(nano)
    assert torch.equal(plain.prepare_latents(latents), latents.permute(0, 2, 1, 3, 4))
    expected = nano.full_decoder.denormalize(latents).permute(0, 2, 1, 3, 4)
    assert torch.equal(scaled.prepare_latents(latents), expected)
    for right in (plain, scaled):  # the VAE shows what one of the two shows
        model = replace(nano, other_decoder=None)
        model.full_decoder.__dict__["decode_batch"] = right.decode_batch
        chosen = use_decoder(model, path).decoder
        assert isinstance(chosen, TinyDecoder)
        assert torch.equal(chosen.mean, right.mean)
        nano = load_vae(NANO, **FLOAT32)


def test_test_clip_is_shown_by_the_vae(nano: WanVae) -> None:
    """Its latents are those of a video, normalized; the VAE's decoder gives the clip back."""
    clip, latents = load_decoder.make_test_clip(), encode_test_clip(nano)
    assert clip.shape == (3, 5, 64, 96)
    assert latents.shape == (1, 48, 2, 4, 6)
    assert 0.3 < latents.std() < 3
    expected = ((clip + 1) * 127.5).round().permute(1, 2, 3, 0)[None]
    assert load_decoder.pixel_psnr(nano.decoder.decode_batch(latents), expected) > 20
    assert load_decoder.pixel_psnr(torch.full((2, 2), 10), torch.full((2, 2), 20)) == pytest.approx(
        20 * math.log10(25.5)
    )


def original_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of Wan2.2_VAE.pth for the decoder's part of the nano VAE."""
    patterns = [
        (r"^post_quant_conv\.", "conv2."),
        (r"^decoder\.conv_in\.", "decoder.conv1."),
        (r"^decoder\.norm_out\.", "decoder.head.0."),
        (r"^decoder\.conv_out\.", "decoder.head.2."),
        (r"\.mid_block\.resnets\.0\.", ".middle.0."),
        (r"\.mid_block\.attentions\.0\.", ".middle.1."),
        (r"\.mid_block\.resnets\.1\.", ".middle.2."),
        (r"\.up_blocks\.(\d)\.upsampler\.(resample|time_conv)\.", r".upsamples.\1.upsamples.2.\2."),
        (r"\.up_blocks\.(\d)\.resnets\.(\d)\.", r".upsamples.\1.upsamples.\2."),
        (r"\.conv_shortcut\.", ".shortcut."),
        (r"(middle\.\d|upsamples\.\d)\.norm1\.", r"\1.residual.0."),
        (r"(middle\.\d|upsamples\.\d)\.conv1\.", r"\1.residual.2."),
        (r"(middle\.\d|upsamples\.\d)\.norm2\.", r"\1.residual.3."),
        (r"(middle\.\d|upsamples\.\d)\.conv2\.", r"\1.residual.6."),
    ]
    names = {name: translate_name(name, tuple(patterns)) for name in tensors}
    assert all(translate_name(other, VAE_NAMES) == name for name, other in names.items())
    return {names[name]: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("form", ["diffusers", "original"])
def test_a_decoder_of_the_full_shape(nano: WanVae, tmp_path: Path, form: str, caplog: pytest.LogCaptureFixture) -> None:
    """Its widths come from its tensors, and its checkpoint may hold an encoder and more: here that of nano itself."""
    caplog.set_level(logging.INFO)
    tensors = load_file(VAE_FILE)
    if form == "original":
        own = {name: tensor for name, tensor in tensors.items() if name.startswith(("decoder.", "post_quant_conv."))}
        tensors = original_names(own)
    else:
        tensors["dynamic_feature_projection_heads.0.weight"] = torch.zeros(2, 2)
    torch.save({"state_dict": {"gen_model": tensors}, "step": 5}, tmp_path / "light.pth")
    z = draw_latents(48, 3, 1, 2)
    expected = torch.cat(list(nano.decoder.decode_stream(z)))
    vae = use_decoder(nano, str(tmp_path / "light.pth"))
    assert isinstance(vae.decoder, FullDecoder)
    assert vae.decoder is not nano.full_decoder
    assert "(full shape), 100.0 dB PSNR" in caplog.text
    vae.release_diffusers_decoder()
    assert torch.equal(torch.cat(list(vae.decoder.decode_stream(z))), expected)


def test_a_narrower_decoder_of_the_full_shape(nano: WanVae, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = load_decoder.decoder_model(nano.model, width=8, blocks=2).to_empty(device="cpu")
    tensors = {name: 0.1 * torch.randn(value.shape) for name, value in model.state_dict().items()}
    vae = use_decoder(nano, str(write_tensors(tmp_path / "light.safetensors", tensors)))
    assert isinstance(vae.decoder, FullDecoder)
    assert vae.decoder.model.config.decoder_base_dim == 8
    assert vae.decoder.decode_batch(draw_latents(1, 48, 2, 1, 2)).shape == (1, 5, 16, 32, 3)


def change(**parts: Tensor | None) -> dict[str, Tensor]:
    changed = random_tiny_decoder(LAYOUT) | {name.replace("_", "."): value for name, value in parts.items()}
    return {name: value for name, value in changed.items() if value is not None}


OTHER = replace(LAYOUT, latent_channels=16, outputs=3)
WAN21 = {"decoder.conv1.weight": torch.zeros(96, 16, 3, 3, 3), "decoder.head.2.weight": torch.zeros(3, 24, 3, 3, 3)}
WRONG = {
    "taew2_1": (random_tiny_decoder(OTHER), r"is for the VAE of Wan2.1 or HunyuanVideo \(16 latent channels, not 48\)"),
    "lightvaew2_1": (WAN21, r"is for the VAE of Wan2.1 or HunyuanVideo \(16"),
    "taehv1_5": (random_tiny_decoder(replace(LAYOUT, latent_channels=32)), "VAE of HunyuanVideo 1.5"),
    "taeltx": (random_tiny_decoder(replace(LAYOUT, latent_channels=128, outputs=48)), "VAE of LTX-Video 2"),
    "unknown": (random_tiny_decoder(replace(LAYOUT, latent_channels=8)), r"VAE of another model \(8 latent"),
    "patch": (random_tiny_decoder(replace(LAYOUT, outputs=3)), "has 3 output channels, not 12"),
    "transformer": ({"blocks.0.ffn.0.weight": torch.zeros(2, 2)}, "is not a decoder that is known here"),
    "flat": ({"decoder.conv_in.weight": torch.zeros(8, 48)}, "is not a decoder that is known here"),
    "no channels": (
        {"decoder.conv_in.weight": torch.zeros(1, 48, 1, 1, 1), "decoder.conv_out.weight": torch.zeros(12, 1, 1, 1, 1)},
        "is not a decoder that is known here",
    ),
    "no groups": (
        random_tiny_decoder(replace(LAYOUT, is_wide=True)) | {"decoder.0.weight": torch.zeros(0, 48, 1, 1)},
        "is not a decoder that is known here",
    ),
    "no blocks": (
        {"decoder.conv_in.weight": torch.zeros(8, 48, 3, 3, 3), "decoder.conv_out.weight": torch.zeros(12, 2, 3, 3, 3)},
        "lacks weights: ",
    ),
    "lacks": (change(decoder_9_conv_2_bias=None), "lacks weights: 1, such as decoder.9.conv.2.bias"),
    "surplus": (change(decoder_23_weight=torch.zeros(1)), "does not have: 1, such as decoder.23.weight"),
    "shape": (change(decoder_4_conv_0_weight=torch.zeros(8, 8, 3, 3)), r"decoder.4.conv.0.weight has shape \[8, 8"),
    "nan": (change(decoder_22_bias=torch.full((12,), math.nan)), "decoder.22.bias holds values that are not finite"),
    "whole numbers": (change(decoder_22_bias=torch.zeros(12, dtype=torch.int8)), "stored as torch.int8"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_weights_give_one_line(nano: WanVae, tmp_path: Path, name: str) -> None:
    tensors, problem = WRONG[name]
    path = write_tensors(tmp_path / "x.safetensors", tensors)
    for check in (lambda: use_decoder(nano, str(path)), lambda: check_decoder(str(path), str(NANO))):
        with pytest.raises(ValueError, match=problem) as caught:
            check()
        assert str(caught.value).startswith(f"decoder={path}: ")
        assert "\n" not in str(caught.value)
    assert nano.model.decoder is not None


def test_wrong_files_give_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("no weights")
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"epoch": 3}, tmp_path / "numbers.pth")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    torch.save({"decoder": Path("a")}, tmp_path / "object.pth")
    torch.save({"decoder": torch.zeros(2, device="meta")}, tmp_path / "meta.pth")
    torch.save({"decoder": torch.ones(2).to_sparse()}, tmp_path / "sparse.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "meta.pth").read_bytes()[:-50])
    os.mkfifo(tmp_path / "pipe.pth")
    within_itself: dict[str, object] = {}
    within_itself["model"] = within_itself
    torch.save(within_itself, tmp_path / "endless.pth")
    problems = {
        "endless.pth": "holds no dict of tensors",
        "meta.pth": "holds no dict of tensors", "sparse.pth": "holds no dict of tensors",
        "cut.pth": "no whole archive", "a" * 300: "cannot be read .*too long",
        "missing.pth": "no such file", ".": "is a folder; give full, or", "pipe.pth": "is a pipe or a device; copy",
        "text.safetensors": "cannot be read",
        "text.pth": "cannot be read", "numbers.pth": "holds no dict of tensors", "list.pth": "holds no dict of tensors",
        "object.pth": "could run code",
    }  # fmt: skip
    for name, problem in problems.items():
        with pytest.raises(ValueError, match=problem) as caught:
            check_decoder(str(tmp_path / name), str(NANO))
        assert str(caught.value).startswith(f"decoder={tmp_path / name}: ")
    check_decoder("full", "no model")
    with pytest.raises(ValueError, match=r"decoder='': is no path"):
        DecodeConfig(latents="a", model="b", out="c", decoder="")
