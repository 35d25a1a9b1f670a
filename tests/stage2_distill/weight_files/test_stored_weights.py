"""Every form of a transformer's weights is read exactly; wrong files are refused in a line that says what they are."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.model_folder import locate_model
from stage2_distill.model.wan import load_transformer
from stage2_distill.weight_files.key_names import from_original, to_original
from stage2_distill.weight_files.stored_weights import WEIGHTS_FILE, read_weight_table
from stage2_distill.weight_files.transformer_config import read_transformer_config
from tests.stage2_distill.training_helpers import ROOT

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def weights(model: Path) -> Weights:
    """The tiny model's weights under diffusers' names."""
    return load_file(model / "transformer" / WEIGHTS_FILE)


@pytest.fixture(scope="module")
def original(weights: Weights) -> Weights:
    """The same under the original names."""
    return {to_original(name): tensor for name, tensor in weights.items()}


def check(path: Path, expected: Weights, *, atol: float = 0) -> None:
    table = read_weight_table(path)
    assert table.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(table[name][...].float(), tensor, rtol=0, atol=atol), name
        part = table[name][0:1]
        assert torch.allclose(part.float(), tensor[0:1], rtol=0, atol=atol), name


def prefixed(tensors: Weights, prefix: str) -> Weights:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def wrapped(tensors: Weights) -> Weights:
    """As a training program saves a module with FSDP, activation checkpointing and torch.compile, wrapper first."""
    return {
        f"_fsdp_wrapped_module.model.{name.replace('blocks.', 'blocks._fsdp_wrapped_module.')}".replace(
            ".0.", "._checkpoint_wrapped_module.0._orig_mod.", 1
        ): tensor
        for name, tensor in tensors.items()
    }


def test_names_go_there_and_back(weights: Weights) -> None:
    assert all(from_original(to_original(name)) == name for name in weights)
    assert to_original("blocks.7.norm2.weight") == "blocks.7.norm3.weight"
    assert from_original("blocks.0.norm2.weight") is None, "the original norm2 has no weights"


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "net.", "model."])
def test_single_files_with_any_prefix(original: Weights, weights: Weights, tmp_path: Path, prefix: str) -> None:
    save_file(prefixed(original, prefix), tmp_path / "x.safetensors")
    check(tmp_path / "x.safetensors", weights)


@pytest.mark.parametrize("key", ["generator", "model", None])
def test_files_of_training_programs(original: Weights, weights: Weights, tmp_path: Path, key: str | None) -> None:
    folder = tmp_path / "checkpoint_model_000500"
    folder.mkdir()
    names = wrapped(original)
    others = {"critic": prefixed(original, "model."), "step": 500}
    torch.save(names if key is None else {key: names, **others}, folder / "model.pt")
    check(folder / "model.pt", weights)
    check(folder, weights)


def test_average_is_preferred(
    original: Weights, weights: Weights, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    average = {name: tensor + 1 for name, tensor in original.items()}
    torch.save({"generator": prefixed(original, "model."), "generator_ema": average}, tmp_path / "model.pt")
    with caplog.at_level("INFO"):
        check(tmp_path / "model.pt", {name: tensor + 1 for name, tensor in weights.items()})
    assert "using generator_ema" in caplog.text


def test_original_folder(original: Weights, weights: Weights, tmp_path: Path, model: Path) -> None:
    names = sorted(original)
    files = {f"diffusion_pytorch_model-0000{n}-of-00003.safetensors": names[n - 1 :: 3] for n in (1, 2, 3)}
    for file, part in files.items():
        save_file({name: original[name] for name in part}, tmp_path / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (tmp_path / f"{WEIGHTS_FILE}.index.json").write_text(json.dumps(index))
    settings = {"model_type": "ti2v", "num_heads": 2, "num_layers": 2, "dim": 24, "in_dim": 48}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    check(tmp_path, weights)
    assert locate_model(str(tmp_path), ("transformer",)) == tmp_path
    net = load_transformer(tmp_path, torch.float32)
    expected = json.loads((model / "transformer" / "config.json").read_text())
    for name in ("num_attention_heads", "attention_head_dim", "ffn_dim", "freq_dim", "text_dim", "num_layers"):
        assert net.config[name] == expected[name], name
    for name, value in net.named_parameters():
        assert torch.equal(value, weights[name]), name
    (tmp_path / "config.json").write_text(json.dumps(settings | {"model_type": "i2v"}))
    with pytest.raises(ValueError, match="is a Wan model of type i2v; this project needs Wan2.2-TI2V-5B"):
        read_transformer_config(tmp_path)


def scaled(original: Weights, style: str) -> tuple[Weights, dict[str, str]]:
    """Matrices in float8 with scales, in the dialect `style`."""
    stored, metadata = dict(original), {}
    for name in [name for name in original if name.endswith(".weight") and original[name].ndim == 2]:
        scale = original[name].abs().amax() / 400
        module = name.removesuffix(".weight")
        stored[name] = (original[name] / scale).to(torch.float8_e4m3fn)
        if style == "legacy":
            stored |= {f"{module}.scale_weight": scale.reshape(1), f"{module}.scale_input": torch.ones(1)}
        else:
            stored |= {f"{module}.weight_scale": scale, f"{module}.input_scale": torch.ones(())}
        if style == "marked":
            note = json.dumps({"format": "float8_e4m3fn"}).encode()
            stored[f"{module}.comfy_quant"] = torch.tensor(list(note), dtype=torch.uint8)
    if style == "legacy":
        stored["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    if style == "metadata":
        metadata["_quantization_metadata"] = json.dumps({"layers": {"blocks.0.ffn.0": {"format": "float8_e4m3fn"}}})
    return stored, metadata


@pytest.mark.parametrize("style", ["legacy", "marked", "metadata"])
def test_scaled_float8(original: Weights, weights: Weights, tmp_path: Path, style: str) -> None:
    stored, metadata = scaled(original, style)
    save_file(prefixed(stored, "model.diffusion_model."), tmp_path / "x.safetensors", metadata=metadata)
    table = read_weight_table(tmp_path / "x.safetensors")
    assert table.keys() == weights.keys()
    for name, tensor in weights.items():
        value, own = table[name][...], to_original(name)
        if stored[own].dtype != torch.float8_e4m3fn:
            assert torch.equal(value, tensor), name
            continue
        scale = original[own].abs().amax() / 400
        assert torch.equal(value, stored[own].float() * scale), name
        assert float((value - tensor).abs().max()) < 0.07 * float(tensor.abs().max()), name
        assert torch.equal(table[name][1:2], value[1:2]), name


def write_html(folder: Path, _: Weights) -> Path:
    (folder / "x.safetensors").write_text("<!doctype html><title>404</title>")
    return folder / "x.safetensors"


def saved(folder: Path, tensors: Weights, **metadata: str) -> Path:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "x.safetensors", metadata=metadata)
    return folder / "x.safetensors"


def pickled(folder: Path, content: object) -> Path:
    torch.save(content, folder / "x.pt")
    return folder / "x.pt"


def raw(folder: Path, data: bytes, name: str = "x.safetensors") -> Path:
    (folder / name).write_bytes(data)
    return folder / name


def resized(original: Weights, channels: int, width: int, **more: Tensor) -> Weights:
    return original | {"patch_embedding.weight": torch.zeros(width, channels, 1, 2, 2)} | more


def cut(folder: Path, original: Weights) -> Path:
    path = saved(folder, original)
    path.write_bytes(path.read_bytes()[:-999])
    return path


def cut_pickle(folder: Path, original: Weights) -> Path:
    path = pickled(folder, {"generator": original})
    path.write_bytes(path.read_bytes()[:-999])
    return path


def incomplete_folder(folder: Path, original: Weights) -> Path:
    index = {"weight_map": dict.fromkeys(original, "diffusion_pytorch_model-00001-of-00002.safetensors")}
    (folder / f"{WEIGHTS_FILE}.index.json").write_text(json.dumps(index))
    return folder


def two_files(folder: Path, original: Weights) -> Path:
    pickled(folder, original)
    saved(folder, original)
    return folder


def without(original: Weights, *names: str) -> Weights:
    return {name: tensor for name, tensor in original.items() if name not in names}


ONE = torch.ones(1)
# what is wrong with a file -> (how to make it, what the error says)
WRONG: dict[str, tuple[Callable[[Path, Weights], Path], str]] = {
    "GGUF": (lambda f, o: raw(f, b"GGUF\x03\x00\x00\x00" + bytes(99), "x.gguf"), "is a GGUF file"),
    "GGUF renamed": (lambda f, o: raw(f, b"GGUF\x03\x00\x00\x00" + bytes(99)), "is a GGUF file"),
    "web page": (write_html, "is a web page"),
    "LFS pointer": (lambda f, o: raw(f, b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer"),
    "empty": (lambda f, o: raw(f, b""), "is empty"),
    "JSON": (lambda f, o: raw(f, b'{"a": 1}', "x.json"), "is a JSON file"),
    "text": (lambda f, o: raw(f, b"hello world, no weights here", "x.txt"), "cannot be read as a file of torch.save"),
    "old pickle": (lambda f, o: raw(f, b"\x80\x02}q\x00.", "x.pt"), "before torch 1.6"),
    "cut": (cut, "cannot be read .*; download or copy it again"),
    "cut pickle": (cut_pickle, "cannot be read as a file of torch.save"),
    "objects": (lambda f, o: pickled(f, {"generator": Path("x")}), "objects other than tensors"),
    "no student": (lambda f, o: pickled(f, {"critic": o, "step": 5}), "but critic, step; save .* as generator_ema, "),
    "sparse": (lambda f, o: pickled(f, o | {"a": ONE.to_sparse()}), "but a; save .* alone or as generator_ema, "),
    "no numbers": (lambda f, o: pickled(f, o | {"a": ONE.to("meta")}), "but a; save .* alone or as generator_ema, "),
    "a tensor": (lambda f, o: pickled(f, ONE), "no dict of tensors, but a Tensor; save the generator"),
    "no tensors": (lambda f, o: pickled(f, {}), "no dict of tensors, but nothing; save"),
    "14B": (lambda f, o: saved(f, resized(o, 16, 5120)), "is a 14B text-to-video model"),
    "1.3B": (lambda f, o: saved(f, resized(o, 16, 1536)), "is Wan2.1-T2V-1.3B"),
    "I2V-A14B": (lambda f, o: saved(f, resized(o, 36, 5120)), "is Wan2.2-I2V-A14B"),
    "Wan2.1 I2V": (
        lambda f, o: saved(f, resized(o, 36, 5120, **{"img_emb.proj.0.weight": ONE})),
        r"is an image-to-video model of Wan2.1 \(I2V-14B\)",
    ),
    "VACE": (lambda f, o: saved(f, o | {"vace_blocks.0.before_proj.weight": ONE}), "is a Wan VACE model"),
    "VAE": (lambda f, o: saved(f, {"decoder.upsamples.0.x": ONE, "conv1.weight": ONE}), "is a VAE"),
    "T5": (lambda f, o: saved(f, {"token_embedding.weight": ONE}), "is a T5 text encoder"),
    "LoRA": (
        lambda f, o: saved(f, {"diffusion_model.blocks.0.ffn.0.lora_A.weight": ONE}), "is a LoRA file, not a model"
    ),
    "Flux": (lambda f, o: saved(f, {"double_blocks.0.img_attn.qkv.weight": ONE}), "is a Flux or Hunyuan model"),
    "foreign": (lambda f, o: saved(f, {"a": ONE, "b": ONE}), r"its 2 tensors are not those of a Wan transf.* \(a, b"),
    "optimizer": (
        lambda f, o: pickled(f, {"state": {}, "model": {"exp_avg.x": ONE}}), "holds the state of an optimizer"
    ),
    "float8 without scales": (
        lambda f, o: saved(f, {k: v.to(torch.float8_e4m3fn) for k, v in o.items()}), "is float8 without its scale"
    ),
    "scale without weight": (
        lambda f, o: saved(f, o | {"blocks.9.ffn.0.scale_weight": ONE}), "holds scales of 1 weights that it lacks"
    ),
    "int8": (lambda f, o: saved(f, {k: v.to(torch.int8) for k, v in o.items()}), "is stored as I8"),
    "nvfp4": (
        lambda f, o: saved(f, o, _quantization_metadata=json.dumps({"layers": {"a": {"format": "nvfp4"}}})),
        "is quantised as nvfp4",
    ),
    "broken note": (lambda f, o: saved(f, o, _quantization_metadata="{"), "notes on quantisation cannot be read"),
    "twice": (lambda f, o: pickled(f, o | {"_orig_mod.head.modulation": ONE}), "names 1 tensors twice"),
    "lost part": (incomplete_folder, "00001-of-00002.safetensors: is missing"),
    "two files": (two_files, r"holds 2 files of weights \(x.pt, x.safetensors\); name one"),
    "nothing": (lambda f, o: f, "holds no diffusion_pytorch_model"),
    "distributed": (lambda f, o: raw(f, b"x", "__0_0.distcp").parent, "checkpoint of torch.distributed"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_files_are_named(kind: str, original: Weights, tmp_path: Path) -> None:
    make, words = WRONG[kind]
    with pytest.raises(ValueError, match=words) as caught:
        read_weight_table(make(tmp_path, original))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


LEFT: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "left over": (lambda o: o | {"more.a": ONE, "more.b": ONE}, "holds 2 tensors .* such as more.a, more.b"),
    "missing": (
        lambda o: without(o, "head.head.bias", "blocks.1.modulation"),
        r"lacks 2 of \d+ weights, such as blocks.1.scale_shift_table \(blocks.1.modulation\), proj_out.bias",
    ),
    "mixed names": (lambda o: o | {"condition_embedder.time_proj.bias": ONE}, "tensors that the model does not have"),
    "wrong shape": (lambda o: o | {"head.head.bias": torch.ones(7)}, r"proj_out.bias has shape \[7\]"),
    "other norm": (lambda o: o | {"blocks.0.norm2.weight": ONE}, "such as blocks.0.norm2.weight"),
}


@pytest.mark.parametrize("kind", LEFT)
def test_left_over_and_missing_tensors(kind: str, model: Path, original: Weights, tmp_path: Path) -> None:
    change, words = LEFT[kind]
    shutil.copytree(model / "transformer", tmp_path / "transformer")
    tensors = {name: tensor.clone() for name, tensor in change(original).items()}
    save_file(tensors, tmp_path / "transformer" / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=words):
        load_transformer(tmp_path, torch.float32)


def test_memory_of_a_mapped_file(tmp_path: Path) -> None:
    """A .pt file's tensors stay on disk: the file itself is mapped."""
    big = {"patch_embedding.weight": torch.zeros(24, 48, 1, 2, 2), "condition_embedder.x": torch.zeros(1000, 1000)}
    torch.save({"generator": big}, tmp_path / "model.pt")
    table = read_weight_table(tmp_path / "model.pt")
    assert str(tmp_path / "model.pt") in Path("/proc/self/maps").read_text()
    assert table["condition_embedder.x"].get_shape() == [1000, 1000]


PROBE = """
import resource, sys
from pathlib import Path
import torch
from stage2_distill.model.wan import load_transformer
load_transformer(Path(sys.argv[1]), torch.float32)  # loads what is loaded once
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
net = load_transformer(Path(sys.argv[2]), torch.float32)
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


def test_host_memory_of_an_import(model: Path, tmp_path: Path) -> None:
    """A file of torch.save with student and average takes the memory of the network and of one of them at most."""
    net = WanTransformer3DModel(
        num_attention_heads=3, attention_head_dim=128, in_channels=48, out_channels=48, text_dim=16, ffn_dim=1536,
        num_layers=16, rope_max_seq_len=64,
    )  # fmt: skip
    tensors = {to_original(name): value.detach() for name, value in net.named_parameters()}
    size = sum(value.nbytes for value in tensors.values())
    assert size > 150e6
    torch.save({"generator": tensors, "generator_ema": {k: v + 1 for k, v in tensors.items()}}, tmp_path / "model.pt")
    save_file(tensors, tmp_path / "x.safetensors")
    for file, most in (("model.pt", 2.2), ("x.safetensors", 1.4)):
        command = [sys.executable, "-c", PROBE, str(model), str(tmp_path / file)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert int(done.stdout) < most * size, file
