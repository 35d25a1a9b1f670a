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
    """Where a record comes from."""

    prompt: str
    path: str  # as written in the CSV; "" = text only
    line: int  # of the CSV, counted from 1
    frame: int = 0  # index of the frame taken from the file
    size: tuple[int, int] | None = None  # (height, width) of the upright source frame in pixels
    seed: int | None = None  # of the sampler, where the CSV gives one


@dataclass(frozen=True)
class Record:
    """One encoded clip."""

    key: str  # unique in the data set
    source: RecordSource
    first_frame: Tensor | None  # (C 1 H W) bf16; None = text only
    text: Tensor  # (L D) bf16, the prompt's true rows


@dataclass(frozen=True)
class Batch:
    """Records collated for the denoiser."""

    keys: tuple[str, ...]
    sources: tuple[RecordSource, ...]
    condition: Condition


def is_plain_name(key: str) -> bool:
    """Whether a key, which names files, stays in their folder."""
    return bool(key) and ".." not in key and not set(key) & set("/\\\0")


def to_members(record: Record) -> dict[str, bytes]:
    """Serialise a record as {member name: bytes}; equal records give equal bytes."""
    tensors = {"text": record.text}
    if record.first_frame is not None:
        tensors["first_frame"] = record.first_frame
    bf16_tensors = {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    metadata = json.dumps(vars(record.source), ensure_ascii=False, sort_keys=True)
    return {
        f"{record.key}.{TENSORS_SUFFIX}": save_tensors(bf16_tensors),
        f"{record.key}.{METADATA_SUFFIX}": metadata.encode(),
    }


def parse_safetensors(data: bytes | memoryview) -> dict[str, Tensor]:
    """The tensors of a safetensors file, without a copy where its memory is writable; ValueError where it is none.

    Layout: 8 bytes length of the header, JSON header, tensors (https://github.com/huggingface/safetensors).
    """
    view = data if isinstance(data, memoryview) and not data.readonly else memoryview(bytearray(data))
    start = 8 + int.from_bytes(view[:8], "little")
    loaded = {}
    for name, item in json.loads(bytes(view[8:start])).items():
        shape, (first, end), dtype = item["shape"], item["data_offsets"], SAFETENSORS_DTYPES[item["dtype"]]
        tensor_bytes = view[start + first : start + end]
        if math.prod(shape) * dtype.itemsize != len(tensor_bytes):
            raise ValueError(f"tensor {name} of {shape} has {len(tensor_bytes)} bytes")
        loaded[name] = torch.frombuffer(tensor_bytes, dtype=dtype).view(shape)
    return loaded


def from_members(key: str, tensors: bytes | memoryview, metadata: bytes | memoryview) -> Record:
    """Rebuild a record from the bytes of its two members; the tensors share the memory of a writable view."""
    if not is_plain_name(key):
        raise ValueError(f"key {key!r}: holds a path, where a plain name must be")
    loaded = parse_safetensors(tensors)
    source_fields = json.loads(bytes(metadata))
    source_fields["size"] = tuple(source_fields["size"]) if source_fields["size"] else None
    return Record(key, RecordSource(**source_fields), loaded.get("first_frame"), loaded["text"])


def pad_text(text: Tensor, length: int = TEXT_LENGTH) -> Tensor:
    """Append zero rows to text (L D), or cut it, to (length D).

    Under 512 at least one row is zero, since it stands for the rest; ValueError where the text is too long for that.
    """
    if text.shape[0] >= length < TEXT_LENGTH:
        raise ValueError(f"text_rows={length}: a prompt has {text.shape[0]} tokens; give at least {text.shape[0] + 1}")
    return torch.nn.functional.pad(text, (0, 0, 0, length - text.shape[0]))


def group_by_first_frame(records: Sequence[Record], size: int) -> list[list[int]]:
    """Places of records in batches of at most `size`, those with and those without a first frame apart."""
    has_frame = [record.first_frame is not None for record in records]
    groups = (
        [index for index, has_first_frame in enumerate(has_frame) if has_first_frame is wanted_kind]
        for wanted_kind in (True, False)
    )
    return [group[start : start + size] for group in groups for start in range(0, len(group), size)]


def collate_records(records: Sequence[Record], *, max_text_tokens: int = TEXT_LENGTH) -> Batch:
    """Stack records into a batch; beside records with a first frame, one without gets zeros and `given` False."""
    frames = [record.first_frame for record in records]
    example = next((frame for frame in frames if frame is not None), None)
    padded_frames = (
        [] if example is None else [torch.zeros_like(example) if frame is None else frame for frame in frames]
    )
    condition = Condition(
        first_frame=torch.stack(padded_frames) if padded_frames else None,
        text=torch.stack([pad_text(record.text, max_text_tokens) for record in records]),
        given=torch.tensor([frame is not None for frame in frames]) if padded_frames and None in frames else None,
    )
    return Batch(tuple(r.key for r in records), tuple(r.source for r in records), condition)
