"""A model is found by folder or hub name, and is the same model as long as its weights and settings are."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from common import model_folder
from common.model_folder import collect_tensors, digest_files, fingerprint_folder, locate_model, same_fingerprint


def test_a_hub_name_that_is_not_found_names_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    def lookup(*given: object, **options: object) -> str:
        raise LocalEntryNotFoundError("Got: ConnectError\nAn error happened.")

    monkeypatch.setattr(model_folder, "snapshot_download", lookup)
    for name in ("nobody/nothing", "nobody/nothing@main"):
        message = rf"^model={name}: no such folder, and the hub .*\(Got: ConnectError\); check name and network$"
        with pytest.raises(ValueError, match=message):
            locate_model(name, ("vae",))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="^init_from=a b/c: no such folder, and the hub did not deliver it"):
        locate_model("a b/c", ("vae",), option="init_from")


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("owner/name", ("owner/name", None)),
        ("owner/name@v1.0", ("owner/name", "v1.0")),
        ("owner/name@refs/pr/3", ("owner/name", "refs/pr/3")),
        ("owner/name@0123abcd", ("owner/name", "0123abcd")),
    ],
)
def test_a_revision_of_the_hub(
    name: str, asked: tuple[str, str | None], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def download(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((repository, revision))
        assert allow_patterns == ["*.json", "vae/*", "Wan2.2_VAE.pth*"]  # of both layouts
        return str(model)

    monkeypatch.setattr(model_folder, "snapshot_download", download)
    assert locate_model(name, ("vae",)) == model
    assert calls == [asked]


def test_a_local_folder_with_an_at_sign_and_a_file(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, tmp_path / "models" / "wan@2")
    assert locate_model("models/wan@2", ("vae",)) == Path("models/wan@2")
    (tmp_path / "model.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match="model.pt: is a file; give a folder"):
        locate_model("model.pt", ("vae",))


def rewrite(path: Path, change: Callable[[dict], object]) -> None:
    settings = json.loads(path.read_text())
    change(settings)
    path.write_text(json.dumps(settings))


def split_weights(folder: Path) -> None:
    """The same tensors in two files, in another order, with an index."""
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    path.unlink()
    names = sorted(tensors, reverse=True)
    parts = [names[: len(names) // 2], names[len(names) // 2 :]]
    for number, part in enumerate(parts):
        save_file({name: tensors[name] for name in part}, folder / f"part-{number}.safetensors", {"who": "me"})
    (folder / "part.safetensors.index.json").write_text("{}")


def change_weight(folder: Path) -> None:
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    name = min(tensors)
    tensors[name] = tensors[name] + 1
    save_file(tensors, path)


def round_weights(folder: Path) -> None:
    (path,) = folder.glob("*.safetensors")
    save_file({name: value.to(torch.float16) for name, value in load_file(path).items()}, path)


CONFIG = "config.json"
HARMLESS = {
    "a version stamp": lambda f: rewrite(f / CONFIG, lambda s: s.update({"_diffusers_version": "9.9"})),
    "no version stamp": lambda f: rewrite(f / CONFIG, lambda s: s.pop("_diffusers_version")),
    "where it came from": lambda f: rewrite(f / CONFIG, lambda s: s.update({"_name_or_path": "/x"})),
    "the dtype of who saved it": lambda f: rewrite(f / CONFIG, lambda s: s.update({"torch_dtype": "float16"})),
    "transformers": lambda f: rewrite(f / CONFIG, lambda s: s.update({"transformers_version": "4", "dtype": None})),
    "an unset setting": lambda f: rewrite(f / CONFIG, lambda s: s.update({"image_dim_of_later": None})),
    "another order": lambda f: rewrite(
        f / CONFIG, lambda s: [s.update({k: s.pop(k)}) for k in sorted(s, reverse=True)]
    ),
    "other file names": split_weights,
}
DECIDING = {
    "a setting": lambda f: rewrite(f / CONFIG, lambda s: s.update({"eps": 0.5})),
    "a setting less": lambda f: rewrite(f / CONFIG, lambda s: s.pop("num_layers")),
    "another class": lambda f: rewrite(f / CONFIG, lambda s: s.update({"_class_name": "Other"})),
    "one weight": change_weight,
    "the dtype of the weights": round_weights,
    "cut weights": lambda f: [p.write_bytes(p.read_bytes()[:-1]) for p in f.glob("*.safetensors")],
    "no weights": lambda f: [p.unlink() for p in f.glob("*.safetensors")],
    "damaged settings": lambda f: (f / CONFIG).write_text('{"a": '),
}


@pytest.mark.parametrize("change", [*HARMLESS, *DECIDING])
def test_same_model(change: str, model: Path, tmp_path: Path) -> None:
    """What changes no number leaves a model the same, also for fingerprints of the last release."""
    folder = shutil.copytree(model / "transformer", tmp_path / "transformer")
    before = fingerprint_folder(folder)
    (HARMLESS | DECIDING)[change](folder)
    after = fingerprint_folder(folder)
    assert before != after
    assert same_fingerprint(before, after) is (change in HARMLESS)
    old = digest_files(folder)  # what release 0.1 stored
    assert same_fingerprint(old, after)
    assert not same_fingerprint(old, before)


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer", "transformer"])
def test_parts_saved_again(part: str, model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model / part, tmp_path / part)
    for path in folder.glob("*config.json"):
        rewrite(
            path, lambda s: s.update({"_diffusers_version": "9", "transformers_version": "9", "name_or_path": "/x"})
        )
    assert digest_files(folder) != digest_files(model / part)
    assert same_fingerprint(fingerprint_folder(folder), fingerprint_folder(model / part))


@pytest.mark.parametrize(
    "data",
    [b"", b"\x08", b"\xff" * 64, b"\x02" + bytes(7) + b"[]", b"\x80\x02K\x01.", b"\x0d" + bytes(7) + b'{"a": {"b":1}'],
)
def test_damaged_weights_have_a_fingerprint(data: bytes, tmp_path: Path) -> None:
    """Whoever loads them reports it."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    one = fingerprint_folder(tmp_path)
    path.write_bytes(data + b"1")
    assert not same_fingerprint(one, fingerprint_folder(tmp_path))


def test_tensors_of_a_file_are_all_that_it_holds() -> None:
    one = torch.ones(2)
    assert list(collect_tensors({"a": one, 5: one}, "FILE", "save it")) == ["a", "5"]
    wrong = {"a list": [one], "nothing": {}, "step, log": {"a": one, "step": 1, "log": ""}, "b": {"b": one.to("meta")}}
    for found, content in wrong.items():
        with pytest.raises(ValueError, match=f"^FILE: holds no dict of tensors, but {found}; save it$"):
            collect_tensors(content, "FILE", "save it")
