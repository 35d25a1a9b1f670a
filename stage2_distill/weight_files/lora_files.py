"""LoRA files of four dialects, as what they add to each weight of the transformer.

    peft, diffusers    transformer.<diffusers' name>.lora_A.weight; alpha / rank from the file's or folder's settings
    ComfyUI            diffusion_model.<original name>.lora_down.weight, .alpha (none = rank), .diff, .diff_b
    kohya, musubi      lora_unet_<original name, underscores for dots>.lora_down.weight, .alpha
    LightX2V           as ComfyUI without alpha, and .diff_m for modulations

Every tensor must find its weight: whatever is left over is an error.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.files import check_no_pipe, open_file
from common.model_folder import collect_tensors, load_pickled
from stage2_distill.weight_files.key_names import flat_module_names, from_original, split_parameter, to_original
from stage2_distill.weight_files.model_kind import refuse_other_file
from stage2_distill.weight_files.stored_tensors import READ_REMEDY, StoredTensor, WeightDelta

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "base_model.model.", "transformer.", "model.")
FLAT_PREFIX = "lora_unet_"
# {ending of a key: which part of a delta it is}
ENDINGS = {
    ".lora_A.weight": "first", ".lora_A.default.weight": "first", ".lora_down.weight": "first",
    ".lora.down.weight": "first", "_lora.down.weight": "first", ".lora_A": "first",
    ".lora_B.weight": "second", ".lora_B.default.weight": "second", ".lora_up.weight": "second",
    ".lora.up.weight": "second", "_lora.up.weight": "second", ".lora_B": "second",
    ".alpha": "alpha", ".diff": "dense", ".diff_b": "bias", ".diff_m": "modulation",
}  # fmt: skip
SETTINGS_KEY, SETTINGS_FILE = "lora_adapter_metadata", "adapter_config.json"  # of diffusers and of peft
ADAPTER_FILE = "adapter_model.safetensors"  # of peft
LISTED_NAMES = 3  # in an error


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file and the weight with which it is added."""

    path: Path
    weight: float = 1.0


@dataclass
class LoraParts:
    """The tensors of one module in a file."""

    first: Tensor | None = None
    second: Tensor | None = None
    alpha: Tensor | None = None
    dense: Tensor | None = None
    bias: Tensor | None = None
    modulation: Tensor | None = None
    keys: list[str] = field(default_factory=list)


def parse_loras(texts: Sequence[str]) -> tuple[LoraFile, ...]:
    """Files as the option names them, FILE or FILE:WEIGHT; ValueError if one is missing."""
    files = tuple(split_weight(text) for text in texts)
    for text, one in zip(texts, files, strict=True):
        if not one.path.is_file() and not (one.path / SETTINGS_FILE).is_file():
            raise ValueError(f"base_lora={text}: no such file; name a .safetensors file, as FILE or FILE:WEIGHT")
    return files


def split_weight(text: str) -> LoraFile:
    """The file and the weight of FILE:WEIGHT, whether the file exists or not."""
    name, _, weight = text.rpartition(":")
    try:
        return LoraFile(Path(name), float(weight)) if name else LoraFile(Path(text))
    except ValueError:  # the colon belongs to the path
        return LoraFile(Path(text))


def digest_lora(path: Path) -> str:
    """Hex digest (32 digits) of every byte that is read of a LoRA file or of a folder of peft, whatever its name."""
    digest = hashlib.sha256()
    files = [path / SETTINGS_FILE, path / ADAPTER_FILE] if path.is_dir() else [path]
    for one in files:
        try:
            with open_file(one) as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise ValueError(f"base_lora={one}: cannot be read ({error.strerror}); {READ_REMEDY}") from error
    return digest.hexdigest()[:32]


def read_deltas(loras: Sequence[LoraFile], tensors: Mapping[str, StoredTensor]) -> dict[str, tuple[WeightDelta, ...]]:
    """What the files add together, by the names of `tensors`; ValueError names what does not fit them."""
    deltas: dict[str, tuple[WeightDelta, ...]] = {}
    for lora in loras:
        for name, delta in read_lora(lora, tensors):
            delta.full(tensors[name].get_shape())  # now, not in the middle of loading
            deltas[name] = (*deltas.get(name, ()), delta)
    return deltas


def read_lora(lora: LoraFile, tensors: Mapping[str, StoredTensor]) -> list[tuple[str, WeightDelta]]:
    """Each weight's name and what one file adds to it."""
    stored, settings = read_lora_file(lora.path)
    modules, unknown = group_parts(stored, tensors)
    if unknown:
        shown = ", ".join(sorted(unknown)[:LISTED_NAMES])
        raise ValueError(
            f"base_lora={lora.path}: {len(unknown)} of {len(stored)} tensors belong to no weight of the model, "
            f"such as {shown}; the file is for another model or of another kind"
        )
    return [pair for module, parts in modules.items() for pair in module_deltas(lora, module, parts, settings)]


def read_lora_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file or of a folder of peft, and the settings of its adapter."""
    settings: dict[str, Any] = {}
    if path.is_dir():
        settings = parse_settings(path, (path / SETTINGS_FILE).read_text(encoding="utf-8"))
        path = path / ADAPTER_FILE
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        refuse_other_file(path)
        content = load_pickled(path, "base_lora")
        return collect_tensors(content, f"base_lora={path}", "save the adapter's weights alone"), settings
    try:
        check_no_pipe("base_lora", path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        if path.is_file():
            refuse_other_file(path)  # says more if it can
        raise ValueError(f"base_lora={path}: cannot be read ({error}); {READ_REMEDY}") from error
    if SETTINGS_KEY in metadata:
        settings = parse_settings(path, metadata[SETTINGS_KEY])
    return tensors, settings


def parse_settings(path: Path, text: str) -> dict[str, Any]:
    """The settings of an adapter, without the prefix `transformer.` that diffusers adds to each."""
    try:
        loaded = json.loads(text)
        return {str(name).removeprefix("transformer."): value for name, value in loaded.items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"base_lora={path}: its settings cannot be read ({error}); {READ_REMEDY}") from error


def group_parts(
    stored: Mapping[str, Tensor], tensors: Mapping[str, StoredTensor]
) -> tuple[dict[str, LoraParts], list[str]]:
    """The tensors of a file by diffusers' name of their module, and the keys that belong to none."""
    modules: dict[str, LoraParts] = {}
    unknown = []
    known = {split_parameter(name)[0] for name in tensors}
    flat = flat_module_names([*map(to_original, known), *known])
    for key, tensor in stored.items():
        ending = next((one for one in ENDINGS if key.endswith(one)), None)
        module = None if ending is None else find_module(key.removesuffix(ending), known, flat, ENDINGS[ending])
        if ending is None or module is None:
            unknown.append(key)
            continue
        parts = modules.setdefault(module, LoraParts())
        parts.keys.append(key)
        vars(parts)[ENDINGS[ending]] = tensor
    return modules, unknown


def find_module(key: str, known: set[str], flat: Mapping[str, str], part: str) -> str | None:
    """diffusers' name of the module of a key without its ending; None if the model has none."""
    if key.startswith(FLAT_PREFIX):
        name = flat.get(key.removeprefix(FLAT_PREFIX))
    else:
        name = key.removeprefix(next((one for one in PREFIXES if key.startswith(one)), ""))
    if name is None:
        return None
    if part == "modulation":  # LightX2V names the block, or the head
        name = f"{name}.modulation"
    return name if name in known else next((one for one in [from_original(name)] if one in known), None)


def module_deltas(
    lora: LoraFile, module: str, parts: LoraParts, settings: Mapping[str, Any]
) -> list[tuple[str, WeightDelta]]:
    """What one module's tensors add: to its weight, and to its bias."""
    label = f"base_lora={lora.path}: {module}"
    is_table = module.endswith("scale_shift_table")  # a parameter of its own
    weight = module if is_table else f"{module}.weight"
    found = []
    if (parts.first is None) != (parts.second is None):
        raise ValueError(f"{label}: has no other factor; {READ_REMEDY}")
    if parts.first is not None and parts.second is not None:
        factor = lora.weight * product_scale(label, module, parts, settings)
        found.append((weight, WeightDelta(label, factor, parts.first, parts.second)))
    for dense in (parts.dense, parts.modulation):
        if dense is not None:
            found.append((weight, WeightDelta(label, lora.weight, dense=dense)))
    if parts.bias is not None:
        found.append((f"{module}.bias", WeightDelta(label, lora.weight, dense=parts.bias)))
    return found


def product_scale(label: str, module: str, parts: LoraParts, settings: Mapping[str, Any]) -> float:
    """Factor of a module's product: alpha / rank if alpha is given, else 1."""
    assert parts.first is not None
    rank = parts.first.shape[0]
    if parts.alpha is not None:
        return float(parts.alpha) / rank
    if parts.keys[0].startswith(FLAT_PREFIX):
        raise ValueError(f"{label}: has no alpha, which files of this kind need; {READ_REMEDY}")
    alpha = dict(settings.get("alpha_pattern") or {}).get(module, settings.get("lora_alpha"))
    if alpha is None:
        return 1.0
    root = rank**0.5 if settings.get("use_rslora") else rank
    return float(alpha) / root
