"""The record: one clip's first-frame latent and prompt embedding, and its two members in a tar shard.

Shapes: B batch, C channels, H W latent size, L text rows of one prompt, D text width.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from common.condition import Condition
from common.video import TEXT_LENGTH

TENSORS_SUFFIX, METADATA_SUFFIX = "safetensors", "json"  # member names are KEY.safetensors and KEY.json
SAFETENSORS_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class RecordSource:
    """Where a record comes from. The fields are the keys of KEY.json."""

    prompt: str
    path: str  # as written in the CSV; "" = text only
    line: int  # of the CSV, counted from 1
    frame: int = 0  # index of the frame taken from the file
    size: tuple[int, int] | None = None  # (height, width) of the upright source frame in pixels
    seed: int | None = None  # of the sampler, if the CSV has one
    color: str = ""  # what was done to the colors of the first frame; "" = nothing, and KEY.json does not hold it


@dataclass(frozen=True)
class Record:
    """One encoded clip."""

    key: str  # unique in the data set
    source: RecordSource
    first_frame: Tensor | None  # (C 1 H W) bf16; None = text only
    text: Tensor  # (L D) bf16, without padding


def is_plain_name(key: str) -> bool:
    """Whether a key, which becomes a file name, cannot leave its folder."""
    return bool(key) and ".." not in key and not set(key) & set("/\\\0")


def to_members(record: Record) -> dict[str, bytes]:
    """Serialise a record as {member name: bytes}; equal records give equal bytes."""
    tensors = {"text": record.text} | ({} if record.first_frame is None else {"first_frame": record.first_frame})
    stored = {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    fields = {name: value for name, value in vars(record.source).items() if name != "color" or value}
    metadata = json.dumps(fields, ensure_ascii=False, sort_keys=True).encode()
    return {f"{record.key}.{TENSORS_SUFFIX}": save_tensors(stored), f"{record.key}.{METADATA_SUFFIX}": metadata}


def parse_safetensors(data: bytes | memoryview) -> dict[str, Tensor]:
    """The tensors of a safetensors file; ValueError or KeyError if it is not one.

    Layout: 8 bytes length of the header, JSON header, tensors (https://github.com/huggingface/safetensors).
    """
    # The library copies twice (0.1 ms per record); here the memory of a writable view becomes the tensors (0.01 ms).
    view = data if isinstance(data, memoryview) and not data.readonly else memoryview(bytearray(data))
    start = 8 + int.from_bytes(view[:8], "little")
    tensors = {}
    for name, entry in json.loads(bytes(view[8:start])).items():
        shape, (first, end), dtype = entry["shape"], entry["data_offsets"], SAFETENSORS_DTYPES[entry["dtype"]]
        tensor_bytes = view[start + first : start + end]
        if math.prod(shape) * dtype.itemsize != len(tensor_bytes):
            raise ValueError(f"tensor {name} of {shape} has {len(tensor_bytes)} bytes")
        tensors[name] = torch.frombuffer(tensor_bytes, dtype=dtype).view(shape)
    return tensors


def from_members(key: str, tensors: bytes | memoryview, metadata: bytes | memoryview) -> Record:
    """Rebuild a record from the bytes of its two members; the tensors share the memory of a writable view."""
    if not is_plain_name(key):
        raise ValueError(f"key {key!r}: holds a path; it must be a plain name")
    loaded = parse_safetensors(tensors)
    source = json.loads(bytes(metadata))
    source["size"] = tuple(source["size"]) if source["size"] else None  # JSON has no tuples
    return Record(key, RecordSource(**source), loaded.get("first_frame"), loaded["text"])


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
