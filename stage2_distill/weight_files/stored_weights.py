"""One reader of transformer weights in any form: diffusers or original folder, .safetensors, or .pt of torch.save.

All forms become {diffusers' name: tensor that is read when it is indexed}. A file's own names may carry prefixes and
wrappers, and float8 tensors their scales.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.files import read_json
from common.model_folder import WeightIndex, collect_tensors, load_pickled, locate_model, locate_part
from stage2_distill.weight_files.key_names import from_original, to_original
from stage2_distill.weight_files.lora_files import LoraFile, read_deltas
from stage2_distill.weight_files.model_kind import refuse_other_file, refuse_other_model
from stage2_distill.weight_files.safetensors_writer import DIFFUSERS_FILE
from stage2_distill.weight_files.scaled_fp8 import resolve_scales
from stage2_distill.weight_files.stored_tensors import (
    READ_REMEDY,
    EditedTensor,
    FileTensor,
    MappedTensor,
    StoredTensor,
)

WEIGHTS_FILE = f"{DIFFUSERS_FILE}.safetensors"
PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
WEIGHT_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)
# Keys of a training program's file that hold the student, the preferred one first.
STUDENT_KEYS = ("generator_ema", "generator", "model", "state_dict", "module")
WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module")  # segments, anywhere in a name
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.model.", "net.", "model.")
LISTED_NAMES = 3  # in an error

StoredTensors = Mapping[str, StoredTensor]  # by diffusers' names


def read_weight_table(path: Path, loras: Sequence[LoraFile] = ()) -> dict[str, StoredTensor]:
    """The tensors of a folder or file of weights under diffusers' names, with LoRA files added; nothing is read yet.

    Other names than those of the network are for `check_names`. ValueError if the file cannot be read, or is another
    model or another kind of file.
    """
    raw, metadata = read_raw_table(path)
    tensors = resolve_scales(path, clean_names(path, raw), metadata)
    shapes = {name: tuple(tensor.get_shape()) for name, tensor in tensors.items()}
    refuse_other_model(path, shapes)
    if not any(name.startswith("condition_embedder.") for name in tensors):  # not diffusers' own names
        if unknown := sorted(name for name in tensors if from_original(name) is None):
            raise ValueError(unknown_names(path, unknown))  # diffusers may use such a name for another tensor
        tensors = {str(from_original(name)): tensor for name, tensor in tensors.items()}
    for name, deltas in read_deltas(loras, tensors).items():
        tensors[name] = EditedTensor(tensors[name], deltas)
    return tensors


def locate_weights(source: str, *, option: str) -> Path:
    """File or folder of the transformer's weights in `source`: a file, a folder in any layout, or a hub name."""
    path = Path(source)
    if path.is_file() or (path.is_dir() and not (path / "transformer").is_dir()):
        return path
    return locate_part(locate_model(source, ("transformer",), option=option), "transformer")


def check_names(path: Path, tensors: Mapping[str, object], expected: Mapping[str, object]) -> None:
    """Raise ValueError that counts and names what a file holds beyond the model, or lacks of it."""
    unknown, missing = sorted(tensors.keys() - expected.keys()), sorted(expected.keys() - tensors.keys())
    if unknown:
        raise ValueError(unknown_names(path, unknown))
    if missing:
        shown = ", ".join(f"{name} ({to_original(name)})" for name in missing[:LISTED_NAMES])
        raise ValueError(f"{path}: lacks {len(missing)} of {len(expected)} weights, such as {shown}")


def unknown_names(path: Path, names: Sequence[str]) -> str:
    """The error for tensors that a file holds beyond the model."""
    return f"{path}: holds {len(names)} tensors that the model does not have, such as {', '.join(names[:LISTED_NAMES])}"


def weight_files(folder: Path) -> list[Path]:
    """The files of weights in a folder; ValueError if it has none, or several that are not parts of one."""
    index = folder / f"{WEIGHTS_FILE}.index.json"
    if index.is_file():
        return [folder / name for name in sorted(set(read_json(index, WeightIndex).weight_map.values()))]
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    if list(folder.glob("*.distcp")):
        raise ValueError(f"{folder}: is a checkpoint of torch.distributed; convert it first (dcp_to_torch_save)")
    found = sorted(path for path in folder.glob("*") if path.suffix in WEIGHT_SUFFIXES)
    if len(found) == 1:  # such as checkpoint_model_000500/model.pt
        return found
    if found:
        shown = ", ".join(path.name for path in found[:LISTED_NAMES])
        raise ValueError(f"{folder}: holds {len(found)} files of weights ({shown}); name one of them")
    raise ValueError(f"{folder}: holds no {WEIGHTS_FILE} (nor its .index.json); name the file of weights")


def read_raw_table(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a file or of a folder's files under their own names, and the files' metadata."""
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    for file in weight_files(path) if path.is_dir() else [path]:
        if not file.is_file():
            raise ValueError(f"{file}: is missing; {READ_REMEDY}")
        if file.suffix != ".safetensors":
            tensors |= {name: MappedTensor(tensor) for name, tensor in read_pickled_table(file).items()}
            continue
        try:
            with safe_open(file, framework="pt") as opened:
                metadata |= opened.metadata() or {}
                for name in opened.keys():  # noqa: SIM118  # the file is not iterable itself
                    part = opened.get_slice(name)
                    tensors[name] = FileTensor(file, name, tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as error:
            refuse_other_file(file)  # says more if it can
            raise ValueError(f"{file}: cannot be read ({error}); {READ_REMEDY}") from error
    return tensors, metadata


def read_pickled_table(path: Path) -> dict[str, Tensor]:
    """The student's tensors in a file of torch.save: those of the average if there are some, which is logged."""
    refuse_other_file(path)
    content = load_pickled(path)
    if isinstance(content, dict):
        key = next((key for key in STUDENT_KEYS if isinstance(content.get(key), dict)), None)
        if key is not None:
            logging.info("%s: using %s", path, key)
            content = content[key]
    return collect_tensors(content, f"{path}", f"save the generator's weights, alone or as {', '.join(STUDENT_KEYS)}")


def clean_names(path: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Names without wrapper segments, then without the one prefix that all share; ValueError if two become equal."""
    bare = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in tensors}
    prefix = next((one for one in PREFIXES if all(name.startswith(one) for name in bare.values())), "")
    cleaned = {bare[name].removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if len(cleaned) < len(tensors):
        raise ValueError(f"{path}: names {len(tensors) - len(cleaned)} tensors twice, with and without a wrapper")
    return cleaned
