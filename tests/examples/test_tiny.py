"""The nano model's tiny decoder learns from latents alone what the VAE shows, and --decoder takes its file."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from examples.nano import build, tiny
from stage1_encode.decoders.load_decoder import TinyDecoder, use_decoder
from stage1_encode.models.vae import load_vae

MODEL = Path(build.__file__).parent / "model"
CPU = torch.device("cpu")


def test_training_brings_it_nearer_to_the_vae() -> None:
    latents = tiny.make_latents(MODEL, 2, CPU, seed=3)
    assert latents.shape == (2, 48, 5, 4, 6)
    assert torch.equal(latents, tiny.make_latents(MODEL, 2, CPU, seed=3))
    shown = tiny.show_latents(MODEL, latents)
    vae = load_vae(MODEL, dtype=torch.float32, device=CPU)
    assert (vae.decoder.decode_batch(latents).float() - shown.clips.float()).abs().max() <= 1
    net = tiny.make_network(0)
    before = tiny.measure_psnr(net, shown)
    tiny.train_tiny(net, shown, seed=0, seconds=60, limit=25, batch=1, report=print)
    assert tiny.measure_psnr(net, shown) > before + 3
    assert sum(p.numel() for p in net.parameters()) * 2 < 500_000  # bytes of the file


def test_the_decoder_of_the_nano_model_shows_nearly_what_the_vae_shows() -> None:
    file = MODEL / tiny.FILE
    net = tiny.make_network(0)
    net.load_state_dict(load_file(file))
    shown = tiny.show_latents(MODEL, tiny.make_latents(MODEL, 4, CPU, seed=5))
    assert tiny.measure_psnr(net, shown) > 36
    assert file.stat().st_size < 500_000


def test_its_file_is_taken_by_decoder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "tiny.safetensors"
    options = {"--device": "cpu", "--clips": "1", "--batch": "1", "--limit": "1", "--others": "1", "--out": str(out)}
    monkeypatch.setattr(sys, "argv", ["tiny", *(part for pair in options.items() for part in pair)])
    written = []
    for _ in range(2):  # the second goes on with the file of the first
        tiny.main()
        assert "dB PSNR to the VAE's own decoder on 1 other clips" in capsys.readouterr().out
        written.append(load_file(out))
    first, second = (values["decoder.1.weight"].float() for values in written)
    assert 0 < (first - second).abs().max() < 0.1
    vae = use_decoder(load_vae(MODEL, dtype=torch.float32, device=CPU), str(out))
    assert isinstance(vae.decoder, TinyDecoder)
    assert vae.decoder.decode_batch(torch.zeros(1, 48, 2, 1, 2)).shape == (1, 5, 16, 32, 3)
