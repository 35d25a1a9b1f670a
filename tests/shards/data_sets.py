"""Small data sets of random tensors, written as stage one writes them."""

from collections.abc import Sequence
from pathlib import Path

import torch

from common.seed import make_generator
from common.video import VideoSpec
from shards.manifest import EncoderInfo, Manifest, make_manifest, sized_spec, write_manifest
from shards.record import Record, RecordSource
from shards.writer import RowFailure, ShardIndex, shard_file_name, write_shard

SPEC = VideoSpec(num_frames=5, height=32, width=64, fps=8)
TEXT_DIM = 8
ENCODER = EncoderInfo("vae", "text", "tokenizer", "float32", "float32", TEXT_DIM, "ugly")
FAILURE = RowFailure(2, "broken.mp4", "no frame")


def make_record(number: int, *, spec: VideoSpec = SPEC, name: str = "clip") -> Record:
    """Record `number`: its tensors are a pure function of the number."""
    generator = make_generator(0, number, 0, name)
    frame = torch.randn(spec.first_frame_shape, generator=generator).bfloat16()
    text = torch.randn((3 + number % 5, TEXT_DIM), generator=generator).bfloat16()
    source = RecordSource(f"prompt {number} é", f"{name}-{number}.mp4", number + 3, size=(72, 128))
    return Record(f"{name}-{number:06d}", source, frame, text)


def make_shards(folder: Path, counts: Sequence[int], *, spec: VideoSpec = SPEC, name: str = "clip") -> list[ShardIndex]:
    """Shards of these numbers of records; one row of the first shard failed."""
    folder.mkdir(parents=True, exist_ok=True)
    indices, first = [], 0
    for number, count in enumerate(counts):
        records = [make_record(index, spec=spec, name=name) for index in range(first, first + count)]
        failures = [FAILURE] if number == 0 else []
        indices.append(write_shard(folder, shard_file_name(number), records, failures=failures, rows_sha256="0" * 64))
        first += count
    return indices


def make_data_set(
    folder: Path, counts: Sequence[int], *, spec: VideoSpec = SPEC, encoder: EncoderInfo = ENCODER, name: str = "clip"
) -> Path:
    """A finished data set."""
    shards = tuple(index.shard for index in make_shards(folder, counts, spec=spec, name=name))
    negative = torch.randn((4, TEXT_DIM), generator=make_generator(0, 0, 0, "negative")).bfloat16()
    write_manifest(folder, Manifest(1, spec, encoder, shards, 1), negative)
    return folder


def make_many_size_set(folder: Path, shards: Sequence[tuple[tuple[int, int], int]], *, name: str = "clip") -> Path:
    """A finished data set of shards given as ((height, width), number of records)."""
    folder.mkdir(parents=True)
    infos, first = [], 0
    for number, (size, count) in enumerate(shards):
        spec = sized_spec(SPEC, size)
        records = [make_record(index, spec=spec, name=name) for index in range(first, first + count)]
        options = {"failures": [], "rows_sha256": "0" * 64, "video_size": size}
        infos.append(write_shard(folder, shard_file_name(number), records, **options).shard)
        first += count
    negative = torch.randn((4, TEXT_DIM), generator=make_generator(0, 0, 0, "negative")).bfloat16()
    write_manifest(folder, make_manifest(SPEC, ENCODER, tuple(infos), 0), negative)
    return folder
