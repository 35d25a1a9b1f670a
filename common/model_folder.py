"""Locating a model by its folder or hub name, and fingerprints that tell models apart without loading them."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeGuard
from zipfile import is_zipfile

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor
from torch._weights_only_unpickler import UnpicklingError  # of the module pickle, which nothing here may import

from common.files import open_file, read_file, read_json

MODEL_REMEDY = "copy it again, or give a folder like Wan-AI/Wan2.2-TI2V-5B-Diffusers"
MODEL_PARTS = ("vae", "text_encoder", "tokenizer", "transformer")
# The same parts in the folder of Wan-AI/Wan2.2-TI2V-5B; the transformer's files lie in the folder itself.
ORIGINAL_PARTS = {
    "vae": "Wan2.2_VAE.pth",
    "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth",
    "tokenizer": "google/umt5-xxl",
    "transformer": "",
}
ORIGINAL_CONFIG_KEY = "num_heads"  # in the original transformer's config.json only
BLOCK_BYTES, MAX_BLOCKS = 4096, 256  # of a weight file, up to this many evenly spaced blocks are hashed
TENSOR_BLOCKS = 4  # the same for one tensor
# Settings that say who wrote a file, and change nothing that is computed; so do all that begin with "_" but one.
STAMPS = {"architectures", "backend", "dtype", "is_local", "name_or_path", "torch_dtype", "transformers_version"}
CLASS_KEY = "_class_name"
DERIVED_FILES = ("*.index.json", "generation_config.json")  # where tensors are, and how a language model writes


@dataclass(frozen=True)
class WeightIndex:
    """The index of weights that are spread over several files; ValueError if a file is not beside the index."""

    weight_map: dict[str, str]  # names of the files by names of the weights

    def __post_init__(self) -> None:
        for name in set(self.weight_map.values()):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"the file {name!r} is not a .safetensors file beside it")


def check_weight_files(folder: Path, *, option: str = "model") -> None:
    """Raise ValueError if a model folder refers its libraries to weights elsewhere: by an index or an adapter."""
    if (folder / "adapter_config.json").exists():  # transformers would load the base that it names, from the hub too
        raise ValueError(f"{option}={folder}: holds an adapter (adapter_config.json), not a model; {MODEL_REMEDY}")
    for path in folder.glob("*.safetensors.index.json"):
        try:
            read_json(path, WeightIndex)
        except ValueError as error:
            raise ValueError(f"{option}={error}; {MODEL_REMEDY}") from error


@contextmanager
def report_load_errors(folder: Path, *, option: str = "model") -> Iterator[None]:
    """Turn the errors of a library that reads `folder` into a ValueError of one line that names the folder.

    The body must call nothing but the library.
    """
    try:
        yield
    except Exception as error:  # noqa: BLE001  # tokenizers raises no other class for a damaged file
        reason = re.split(r"\. |\n", str(error))[0]  # diffusers appends advice on ignoring the error
        raise ValueError(f"{option}={folder}: cannot be read: {reason}; {MODEL_REMEDY}") from error


def locate_model(model: str, parts: Sequence[str], *, option: str = "model") -> Path:
    """Local folder of `model`: one in the layout of Wan-AI/Wan2.2-TI2V-5B-Diffusers or of the original, or a hub name.

    A file of weights stands for a model if only the transformer is needed. Only the `parts` of a hub name, NAME or
    NAME@REVISION, are downloaded. ValueError, which begins with the name of the `option`, for the first part that is
    missing. `locate_part` has the path of each part.
    """
    folder = Path(model)
    name, _, revision = model.partition("@")
    if not folder.exists() and name.count("/") == 1 and not model.startswith((".", "/", "~")):
        files = ["*.json", *(f"{part}/*" for part in parts)]
        files += [f"{ORIGINAL_PARTS[part] or 'diffusion_pytorch_model'}*" for part in parts]
        try:
            folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=files))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"{option}={model}: no such folder, and the hub did not deliver it ({reason}); check name and network"
            ) from error
    if folder.is_file() and set(parts) <= {"transformer"}:
        return folder
    if folder.is_file():
        raise ValueError(f"{option}={model}: is a file; give a folder, which also holds {', '.join(parts)}")
    if not folder.is_dir():
        raise ValueError(f"{option}={model}: no such folder, and not a hub name of the form OWNER/NAME; check the path")
    check_parts(folder, parts, model=model, option=option)
    return folder


def check_parts(folder: Path, parts: Sequence[str], *, model: str, option: str) -> None:
    """Raise ValueError, which begins with the option and its value, for a part that a folder lacks in both layouts."""
    for part in parts:
        if original_part(folder, part) is not None:
            continue
        config = f"{part}/tokenizer_config.json" if part == "tokenizer" else f"{part}/config.json"
        if not (folder / config).is_file():
            raise ValueError(f"{option}={model}: {config} is missing; a model folder holds {', '.join(MODEL_PARTS)}")
        if part != "tokenizer" and not list((folder / part).glob("*.safetensors")):
            raise ValueError(f"{option}={model}: {part}/ holds no .safetensors weights; copy them too")
        check_weight_files(folder / part, option=option)


def original_part(folder: Path, part: str) -> Path | None:
    """Path of a part in a model folder of the original layout; None if it is not there."""
    path = folder / ORIGINAL_PARTS[part]
    if (folder / part).is_dir() or not path.exists():
        return None
    if part != "transformer":
        return path
    try:
        settings = json.loads(read_file(folder / "config.json"))
    except (OSError, ValueError, RecursionError):
        return None
    has_weights = any(folder.glob("diffusion_pytorch_model*.safetensors"))
    return path if isinstance(settings, dict) and ORIGINAL_CONFIG_KEY in settings and has_weights else None


def locate_part(folder: Path, part: str) -> Path:
    """Path of a part in a located model: a folder of the diffusers layout, or a file or folder of the original one."""
    if folder.is_file():
        return folder
    return original_part(folder, part) or folder / part


def load_pickled(path: Path, option: str = "") -> object:
    """Content of a file of torch.save, whose tensors stay on disk until they are used; nothing in it is executed.

    ValueError, which names the `option` that gave the file, if it is damaged, in the format before torch 1.6, or holds
    more than tensors and plain values.
    """
    subject = f"{option}={path}" if option else f"{path}"
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        reason = "holds objects other than tensors, which could run code, or is damaged"
        raise ValueError(f"{subject}: {reason}; save its state_dict alone") from error
    except (RuntimeError, OSError, EOFError, KeyError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        if isinstance(error, RuntimeError) and not is_zipfile(path):  # torch itself then speaks of `mmap` or `miniz`
            reason = "it is no whole archive, as torch writes them since 1.6"
        raise ValueError(f"{subject}: cannot be read as a file of torch.save ({reason}); copy it again") from error


def collect_tensors(content: object, subject: str, remedy: str) -> dict[str, Tensor]:
    """The tensors by name in the content of a file of torch.save; ValueError if it holds none, or anything else.

    subject: begins the message. remedy: ends it.
    """
    values = content if isinstance(content, dict) else {}
    others = [str(name) for name, value in values.items() if not holds_numbers(value)]
    if others or not values:
        found = ", ".join(others[:3]) or ("nothing" if isinstance(content, dict) else f"a {type(content).__name__}")
        raise ValueError(f"{subject}: holds no dict of tensors, but {found}; {remedy}")
    return {str(name): value for name, value in values.items()}


def holds_numbers(value: object) -> TypeGuard[Tensor]:
    """Whether a value of a file of torch.save is a tensor with numbers on the CPU, neither sparse nor of no content."""
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def fingerprint_part(path: Path) -> str:
    """Fingerprint of one part of a model, a folder or a file, see `fingerprint_folder`."""
    if path.is_dir():
        return fingerprint_folder(path)
    content = hashlib.sha256("\n".join(sorted(tensor_digests(path))).encode()).hexdigest()[:32]
    return f"{digest_files(path)}-{content}"


def fingerprint_folder(folder: Path) -> str:
    """Fingerprint of one part of a model, `FILES-CONTENT`: the digests of its files and of what they mean.

    Compare fingerprints with `same_fingerprint`; those of release 0.1 are FILES alone.
    """
    return f"{digest_files(folder)}-{digest_content(folder)}"


def same_fingerprint(one: object, other: object) -> bool:
    """Whether two fingerprints belong to the same model: to the same files, or to files with the same content."""
    return not set(str(one).split("-")).isdisjoint(str(other).split("-"))


def digest_files(folder: Path) -> str:
    """Hex digest (32 digits) of names, sizes and bytes of a folder's files, or of one file; large ones are sampled."""
    digest = hashlib.sha256()
    files = [*folder.glob("*.json"), *folder.glob("*.model"), *folder.glob("*.safetensors")]
    for path in [folder] if folder.is_file() else sorted(files):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        with open_file(path) as file:
            # Fine-tuning changes every block, so 1 MB of a weight file tells it apart from any other.
            for block in sample_blocks(file, 0, size, MAX_BLOCKS):
                digest.update(block)
    return digest.hexdigest()[:32]


def digest_content(folder: Path) -> str:
    """Hex digest (32 digits) of a part's settings and tensors, however they are written and spread over files."""
    entries = [f"{path.name}:{hashlib.sha256(read_file(path)).hexdigest()}" for path in folder.glob("*.model")]
    for path in folder.glob("*.json"):
        if not any(path.match(pattern) for pattern in DERIVED_FILES):
            entries.append(f"{path.name}:{canonical_settings(read_file(path))}")
    for path in folder.glob("*.safetensors"):
        entries += tensor_digests(path)
    return hashlib.sha256("\n".join(sorted(entries)).encode()).hexdigest()[:32]


def canonical_settings(data: bytes) -> str:
    """The settings of a JSON file without stamps and unset ones, in one spelling; a damaged file as it is."""
    try:
        settings = json.loads(data)
    except (ValueError, RecursionError):
        return repr(data)
    if isinstance(settings, dict):
        settings = {
            key: value
            for key, value in settings.items()
            if value is not None and key not in STAMPS and (key == CLASS_KEY or not key.startswith("_"))
        }
    return json.dumps(settings, sort_keys=True)


def tensor_digests(path: Path) -> Iterator[str]:
    """One line per tensor of a safetensors file: name, dtype, shape and a digest of sampled bytes."""
    with open_file(path) as file:
        try:
            tensors = read_tensor_table(file, path.stat().st_size)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):  # whoever loads it says so
            tensors = [(f"{path.name} damaged", 0, path.stat().st_size)]
        for label, begin, end in tensors:
            digest = hashlib.sha256()
            for block in sample_blocks(file, begin, end, TENSOR_BLOCKS):
                digest.update(block)
            yield f"{label} {digest.hexdigest()}"


def read_tensor_table(file: BinaryIO, size: int) -> list[tuple[str, int, int]]:
    """Name with dtype and shape, first byte and end of each tensor of a safetensors file of `size` bytes."""
    data_start = 8 + int.from_bytes(file.read(8), "little")
    if data_start > size:
        raise ValueError("the header is longer than the file")
    header = json.loads(file.read(data_start - 8))
    header.pop("__metadata__", None)
    table = []
    for name, item in header.items():
        begin, end = (data_start + int(offset) for offset in item["data_offsets"])
        if not data_start <= begin <= end <= size:
            raise ValueError(f"{name} lies outside the file")
        table.append((f"{name} {item['dtype']} {item['shape']}", begin, end))
    return table


def sample_blocks(file: BinaryIO, begin: int, end: int, count: int) -> Iterator[bytes]:
    """The bytes begin..end-1 of a file, or `count` evenly spaced blocks of them if they are more."""
    if end - begin <= BLOCK_BYTES * count:
        file.seek(begin)
        yield file.read(end - begin)
        return
    for block in range(count):
        file.seek(begin + block * (end - begin - BLOCK_BYTES) // (count - 1))
        yield file.read(BLOCK_BYTES)
