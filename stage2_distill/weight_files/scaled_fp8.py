"""Float8 weights with scales, as ComfyUI and ModelOpt store them: the value is weight x scale.

Two generations of names: `X.scale_weight` with a tensor `scaled_fp8`, and `X.weight_scale` with `X.comfy_quant` or the
metadata `_quantization_metadata`, which name the number format. Scales of inputs are for float8 products only.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from stage2_distill.weight_files.stored_tensors import FileTensor, MappedTensor, ScaledTensor, StoredTensor

SCALE_SUFFIXES = (".scale_weight", ".weight_scale")
IGNORED_SUFFIXES = (".scale_input", ".input_scale", ".comfy_quant")
MARKER, METADATA_KEY = "scaled_fp8", "_quantization_metadata"
FORMATS = ("float8_e4m3fn", "float8_e5m2")
FLOAT8_DTYPES, PLAIN_DTYPES = ("F8_E4M3", "F8_E5M2"), ("F64", "F32", "F16", "BF16")
TORCH_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}  # fmt: skip
REMEDY = "give the bf16 or fp16 file"


def dtype_name(tensor: StoredTensor) -> str:
    """The dtype of a tensor of a file, as safetensors names it."""
    if isinstance(tensor, FileTensor):
        return tensor.dtype
    assert isinstance(tensor, MappedTensor), tensor
    name = str(tensor.tensor.dtype).removeprefix("torch.")
    return TORCH_NAMES.get(name, name)


def resolve_scales(
    path: Path, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]
) -> dict[str, StoredTensor]:
    """The weights without their scales and markers, float8 ones multiplied by their scale when they are read.

    ValueError for float8 without a scale, a scale without a weight, and formats that are not read here.
    """
    check_formats(path, tensors, metadata)
    scales = {f"{name.removesuffix(suffix)}.weight": tensor[...]
              for name, tensor in tensors.items() for suffix in SCALE_SUFFIXES if name.endswith(suffix)}  # fmt: skip
    marks = (*SCALE_SUFFIXES, *IGNORED_SUFFIXES)
    weights = {name: tensor for name, tensor in tensors.items() if name != MARKER and not name.endswith(marks)}
    if lost := sorted(scales.keys() - weights.keys()):
        raise ValueError(f"{path}: holds scales of {len(lost)} weights that it lacks, such as {lost[0]}; {REMEDY}")
    for name, tensor in weights.items():
        dtype = dtype_name(tensor)
        if dtype in FLOAT8_DTYPES and name not in scales:
            raise ValueError(f"{path}: {name} is float8 without its scale, so its values are unknown; {REMEDY}")
        if dtype not in (*FLOAT8_DTYPES, *PLAIN_DTYPES):
            raise ValueError(f"{path}: {name} is stored as {dtype}, which is not read here; {REMEDY}")
        if name in scales:
            weights[name] = scale_tensor(path, name, tensor, scales[name])
    return weights


def scale_tensor(path: Path, name: str, tensor: StoredTensor, scale: Tensor) -> ScaledTensor:
    """A weight with its scale, one number or one per output."""
    shape = tensor.get_shape()
    if scale.numel() == 1:
        return ScaledTensor(tensor, scale.reshape(()))
    if scale.numel() == shape[0]:
        return ScaledTensor(tensor, scale.reshape(shape[0], *[1] * (len(shape) - 1)))
    raise ValueError(f"{path}: {name} has {scale.numel()} scales for {shape}, which is not read here; {REMEDY}")


def check_formats(path: Path, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> None:
    """Raise ValueError if a layer is quantised in a format that is not read here."""
    notes = [bytes(tensor[...].tolist()) for name, tensor in tensors.items() if name.endswith(".comfy_quant")]
    try:
        found = [str(json.loads(note)["format"]) for note in notes]
        if METADATA_KEY in metadata:
            found += [str(layer["format"]) for layer in json.loads(metadata[METADATA_KEY])["layers"].values()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: its notes on quantisation cannot be read ({error}); {REMEDY}") from error
    unknown = sorted(set(found) - set(FORMATS))
    if unknown:
        raise ValueError(f"{path}: is quantised as {', '.join(unknown)}, which is not read here; {REMEDY}")
