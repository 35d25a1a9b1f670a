"""The record: one clip's first-frame latent and prompt embedding, and its two members in a tar shard.

Shapes: B batch, C channels, H W latent size, L text rows of one prompt, D text width.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from common.condition import Condition
from common.files import Count, parse_json
from common.video import TEXT_LENGTH

TENSORS_SUFFIX, METADATA_SUFFIX = "safetensors", "json"  # member names are KEY.safetensors and KEY.json
ADDED_FIELDS = ("color", "crop")  # of KEY.json, which holds them only if they say something
SAFETENSORS_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class RecordSource:
    """Where a record comes from. The fields are the keys of KEY.json."""

    prompt: str
    path: str  # as written in the CSV; "" = text only
    line: Count  # of the CSV, counted from 1
    frame: Count = 0  # index of the frame taken from the file
    size: tuple[Count, Count] | None = None  # (height, width) of the upright source frame in pixels
    seed: int | None = None  # of the sampler, if the CSV has one
    color: str = ""  # what was done to the colors of the first frame; "" = nothing, and KEY.json does not hold it
    # (top, left, height, width) of what the first frame shows, in pixels of the source; stated with several sizes only
    crop: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class Record:
    """One encoded clip."""

    key: str  # unique in the data set
    source: RecordSource
    first_frame: Tensor | None  # (C 1 H W) bf16; None = text only
    text: Tensor  # (L D) bf16, without padding


@dataclass(frozen=True)
class StoredTensor:
    """One entry of a safetensors header."""

    dtype: Literal["BF16", "F16", "F32"]
    shape: tuple[Count, ...]
    data_offsets: tuple[Count, Count]  # begin and end, in bytes after the header


@dataclass(frozen=True)
class TensorsHeader:
    """The header of KEY.safetensors. Its fields are the names of the tensors; others are ignored."""

    text: StoredTensor
    first_frame: StoredTensor | None = None


def is_plain_name(key: str) -> bool:
    """Whether a key, which becomes a file name, cannot leave its folder."""
    return bool(key) and ".." not in key and not set(key) & set("/\\\0")


def to_members(record: Record) -> dict[str, bytes]:
    """Serialise a record as {member name: bytes}; equal records give equal bytes."""
    tensors = {"text": record.text} | ({} if record.first_frame is None else {"first_frame": record.first_frame})
    stored = {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    fields = {name: value for name, value in vars(record.source).items() if name not in ADDED_FIELDS or value}
    metadata = json.dumps(fields, ensure_ascii=False, sort_keys=True).encode()
    return {f"{record.key}.{TENSORS_SUFFIX}": save_tensors(stored), f"{record.key}.{METADATA_SUFFIX}": metadata}


def parse_tensors(data: bytes | memoryview) -> tuple[Tensor, Tensor | None]:
    """Text and first frame of KEY.safetensors; ValueError if it is not the safetensors file of a record.

    Layout: 8 bytes length of the header, JSON header, tensors (https://github.com/huggingface/safetensors).
    """
    # The library copies twice (0.1 ms per record); here the memory of a writable view becomes the tensors (0.01 ms).
    view = data if isinstance(data, memoryview) and not data.readonly else memoryview(bytearray(data))
    start = 8 + int.from_bytes(view[:8], "little")
    header = parse_json(view[8:start], TensorsHeader, "the header of the tensors")
    first_frame = None if header.first_frame is None else _view_tensor(view[start:], header.first_frame)
    return _view_tensor(view[start:], header.text), first_frame


def _view_tensor(data: memoryview, stored: StoredTensor) -> Tensor:
    (begin, end), dtype = stored.data_offsets, SAFETENSORS_DTYPES[stored.dtype]
    tensor_bytes = data[begin:end]
    if not 0 < math.prod(stored.shape) * dtype.itemsize == len(tensor_bytes) == end - begin:
        raise ValueError(f"a tensor of shape {stored.shape} has {len(tensor_bytes)} bytes")
    return torch.frombuffer(tensor_bytes, dtype=dtype).view(stored.shape)


def from_members(key: str, tensors: bytes | memoryview, metadata: bytes | memoryview) -> Record:
    """Rebuild a record from the bytes of its two members; the tensors share the memory of a writable view."""
    if not is_plain_name(key):
        raise ValueError(f"key {key!r}: holds a path; it must be a plain name")
    text, first_frame = parse_tensors(tensors)
    return Record(key, parse_json(metadata, RecordSource, f"{key}.{METADATA_SUFFIX}"), first_frame, text)


def schema_problems(record: Record, first_frame_shape: Sequence[int], text_dim: int) -> list[str]:
    """What a record of a data set of these shapes must not have, in words."""
    frame, text, shape = record.first_frame, record.text, tuple(first_frame_shape)
    reasons = []
    if frame is not None and (tuple(frame.shape) != shape or frame.dtype != torch.bfloat16):
        reasons.append(f"first_frame is {tuple(frame.shape)} {frame.dtype}, expected {shape} bfloat16")
    fits = text.ndim == 2 and 1 <= text.shape[0] <= TEXT_LENGTH and text.shape[1] == text_dim
    if not fits or text.dtype != torch.bfloat16:
        reasons.append(f"text is {tuple(text.shape)} {text.dtype}, expected (1..{TEXT_LENGTH}, {text_dim}) bfloat16")
    if not record.source.prompt.strip():
        reasons.append("the prompt is empty")
    return reasons


def pad_text(text: Tensor, length: int = TEXT_LENGTH) -> Tensor:
    """Append zero rows to text (L D), or cut it, to (length D); ValueError if `length` < 512 leaves no zero row."""
    rows = text.shape[0]  # one zero row represents all further ones in the attention
    if rows >= length < TEXT_LENGTH:
        raise ValueError(f"max_text_tokens={length}: a prompt has {rows} tokens; give at least {rows + 1}")
    return torch.nn.functional.pad(text, (0, 0, 0, length - rows))  # a negative pad cuts


def group_by_first_frame(records: Sequence[Record], size: int) -> list[list[int]]:
    """Indices of records in batches of at most `size`, those with a first frame first, the others apart."""
    with_frame = [index for index, record in enumerate(records) if record.first_frame is not None]
    without_frame = [index for index, record in enumerate(records) if record.first_frame is None]
    groups = (with_frame, without_frame)
    return [group[start : start + size] for group in groups for start in range(0, len(group), size)]


def collate_records(records: Sequence[Record], *, max_text_tokens: int = TEXT_LENGTH) -> Condition:
    """Stack records for the denoiser; in a mixed batch, records without a first frame get zeros and `given` False."""
    frames = [record.first_frame for record in records]
    example = next((frame for frame in frames if frame is not None), None)
    first_frame = given = None
    if example is not None:
        first_frame = torch.stack([torch.zeros_like(example) if frame is None else frame for frame in frames])
        given = torch.tensor([frame is not None for frame in frames])
    text = torch.stack([pad_text(record.text, max_text_tokens) for record in records])
    return Condition(first_frame, text, None if given is None or given.all() else given)  # None = all
