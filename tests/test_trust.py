"""A model folder from anywhere runs no code: what the loaders are told, and what they make of hostile folders."""

import ast
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from common.model_folder import locate_model
from stage1_encode.models.text_encoder import load_text_encoder
from stage1_encode.models.vae import load_vae
from stage1_encode.video_metrics.clip_score import load_clip
from stage2_distill.model.wan import load_transformer
from tests.test_house import sources

FLOAT32 = {"dtype": torch.float32, "device": torch.device("cpu")}
# Calls that can run what a file says; the only ones left read Python and TorchScript files that the user names.
RUNNING_CALLS = {
    "torch.load", "torch.jit.load", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load", "numpy.load",
    "marshal.loads", "eval", "exec", "spec.loader.exec_module",
}  # fmt: skip
ALLOWED_CALLS = {
    ("stage1_encode/video_metrics/custom_judge.py", "spec.loader.exec_module"),
    ("stage1_encode/video_metrics/i3d_features.py", "torch.jit.load"),
}
TENSORS_ONLY = {"map_location": "cpu", "weights_only": True, "mmap": True}  # with which torch.load runs nothing
# Loader of weights -> what it must be told. diffusers' classes run no code of a folder and take no trust_remote_code.
LOADERS = {
    "AutoencoderKLWan": {"use_safetensors": True},
    "UMT5EncoderModel": {"use_safetensors": True, "trust_remote_code": False, "attn_implementation": "sdpa"},
    "CLIPModel": {"use_safetensors": True, "trust_remote_code": False, "attn_implementation": "sdpa"},
    "AutoTokenizer": {"trust_remote_code": False},
}


def all_calls() -> Iterator[tuple[str, str, dict[str, object]]]:
    """Path, name and constant keywords of every call in the source."""
    for path, text in sources().items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call):
                named = {word.arg: word.value for word in node.keywords if word.arg}
                constants = {name: value.value for name, value in named.items() if isinstance(value, ast.Constant)}
                yield path, ast.unparse(node.func), constants


def test_every_loader_is_told_to_run_nothing() -> None:
    found = set()
    for path, name, keywords in all_calls():
        owner, _, method = name.rpartition(".")
        if method == "from_pretrained":
            assert LOADERS[owner].items() <= keywords.items(), f"{path}: {name}"
            found.add(owner)
    assert found == LOADERS.keys()


def test_nothing_else_runs_what_a_file_says() -> None:
    found = {(path, name) for path, name, keywords in all_calls() if name in RUNNING_CALLS and keywords != TENSORS_ONLY}
    assert found == ALLOWED_CALLS


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model, tmp_path / "model")


class Payload:
    """A pickle of this creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def hostile_code(folder: Path, marker: Path) -> str:
    """Python that leaves a mark; the name of its class."""
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    return "evil.Evil"


def test_a_tokenizer_with_code_is_one_line_and_asks_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    tokenizer, marker = folder / "tokenizer", tmp_path / "ran"
    name = hostile_code(tokenizer, marker)
    edit(tokenizer / "tokenizer_config.json", auto_map={"AutoTokenizer": [name, None]}, tokenizer_class="Evil")
    with pytest.raises(ValueError, match=rf"^model={tokenizer}: cannot be read: [^\n]*$"):
        load_text_encoder(folder, **FLOAT32)
    assert not marker.exists()


@pytest.mark.parametrize("part", ["text_encoder", "vae", "transformer"])
def test_code_that_a_config_names_is_ignored(folder: Path, tmp_path: Path, part: str) -> None:
    marker = tmp_path / "ran"
    name = hostile_code(folder / part, marker)
    names = dict.fromkeys(("AutoConfig", "AutoModel", "UMT5EncoderModel", "AutoencoderKLWan"), name)
    edit(folder / part / "config.json", auto_map=names, attn_implementation="evil/kernel", custom_pipeline=name)
    edit(folder / part / "config.json", _attn_implementation="evil/kernel")
    load_text_encoder(folder, **FLOAT32)
    load_vae(folder, **FLOAT32)
    load_transformer(folder, torch.float32)
    assert not marker.exists()


LOAD_PART: dict[str, Callable[[Path], object]] = {
    "text_encoder": lambda folder: load_text_encoder(folder, **FLOAT32),
    "vae": lambda folder: load_vae(folder, **FLOAT32),
    "transformer": lambda folder: load_transformer(folder, torch.float32),
}


def weights_of(part: Path) -> Path:
    return sorted(part.glob("*.safetensors"))[0]


@pytest.mark.parametrize("part", LOAD_PART)
def test_a_pickle_under_a_safetensors_name_is_one_line(folder: Path, tmp_path: Path, part: str) -> None:
    marker = tmp_path / "ran"
    torch.save({"x": Payload(marker)}, weights_of(folder / part))
    with pytest.raises(ValueError, match=rf"^[^\n]*{part}[^\n]*cannot be read[^\n]*$"):
        LOAD_PART[part](folder)
    assert not marker.exists()


@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_a_pickle_beside_other_weights_is_not_loaded(folder: Path, tmp_path: Path, part: str) -> None:
    marker = tmp_path / "ran"
    weights_of(folder / part).rename(folder / part / "other.safetensors")
    for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin"):
        torch.save({"x": Payload(marker)}, folder / part / name)
    with pytest.raises(ValueError, match=rf"^model=[^\n]*{part}: cannot be read: [^\n]*$"):
        LOAD_PART[part](folder)
    assert not marker.exists()


def index_of(part: Path) -> Path:
    name = "model" if part.name == "text_encoder" else "diffusion_pytorch_model"
    return part / f"{name}.safetensors.index.json"


@pytest.mark.parametrize("part", LOAD_PART)
@pytest.mark.parametrize(
    "weight_map",
    [
        {"w": "../out.safetensors"},
        {"w": "/tmp/out.safetensors"},
        {"w": "sub/out.safetensors"},
        {"w": ".."},
        {"w": "pytorch_model.bin"},
        {"w": 1},
        ["out.safetensors"],
        None,
    ],
)
def test_an_index_that_leaves_its_folder_is_one_line(folder: Path, part: str, weight_map: object) -> None:
    index = index_of(folder / part)
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(ValueError, match=rf"^model={index}: is damaged or from another program [^\n]*$"):
        locate_model(str(folder), (part,))


def test_an_adapter_in_place_of_a_model_is_refused(folder: Path) -> None:
    """transformers would load the base that it names, from the hub too."""
    (folder / "text_encoder/adapter_config.json").write_text('{"base_model_name_or_path": "evil/model"}')
    with pytest.raises(ValueError, match="holds an adapter"):
        locate_model(str(folder), ("text_encoder",))


CONFIGS = ["", "[]", "{}", "[" * 100_000, '{"_class_name": "Evil"}', '{"num_layers": "x", "z_dim": "y", "d_model": []}']


@pytest.mark.parametrize("part", LOAD_PART)
@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_of_another_form_is_one_line(folder: Path, part: str, config: str) -> None:
    (folder / part / "config.json").write_text(config)
    with pytest.raises(ValueError, match=rf"^[^\n]*{folder}[^\n]*$"):
        LOAD_PART[part](folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": null, "added_tokens": []}', "[" * 100_000])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_of_another_form_is_one_line_or_does_not_matter(folder: Path, name: str, content: str) -> None:
    (folder / "tokenizer" / name).write_text(content)
    try:
        load_text_encoder(folder, **FLOAT32)
    except ValueError as error:
        assert str(error).startswith(f"model={folder}/tokenizer: ") and "\n" not in str(error)


@pytest.mark.parametrize("preprocessor", ["[", "[]", '{"image_mean": "x"}', '{"image_mean": [1]}'])
def test_a_clip_folder_of_another_form_is_one_line(tmp_path: Path, preprocessor: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=rf"^clip_model={tmp_path}: cannot be read: [^\n]*$"):
        load_clip(str(tmp_path), torch.device("cpu"))
    (tmp_path / "preprocessor_config.json").write_text(preprocessor)
    with pytest.raises(ValueError, match=rf"^[^\n]*{tmp_path}/preprocessor_config.json: is damaged[^\n]*$"):
        load_clip(str(tmp_path), torch.device("cpu"))
