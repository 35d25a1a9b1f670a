"""The manifest of a data set: what its shards are, what made them, and whether a model fits them."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor

from common.video import VideoSpec

SCHEMA = 1
MANIFEST, NEGATIVE = "manifest.json", "negative.safetensors"


@dataclass(frozen=True)
class Encoder:
    """What made the latents and embeddings; two data sets mix only where all fields agree."""

    vae: str  # fingerprint of the weights and configuration
    text_encoder: str
    tokenizer: str
    vae_dtype: str
    text_dtype: str
    text_dim: int  # D
    negative_prompt: str


@dataclass(frozen=True)
class Shard:
    """One finished tar."""

    name: str
    records: int
    rows: int  # CSV rows it stands for: records + failures
    sha256: str
    size: int  # bytes


@dataclass(frozen=True)
class Manifest:
    """All that stage two must know of a data set before it opens a tar."""

    schema: int
    spec: VideoSpec
    encoder: Encoder
    shards: tuple[Shard, ...]
    failures: int

    @property
    def records(self) -> int:
        """Number of records in all shards."""
        return sum(shard.records for shard in self.shards)


def write_file(path: Path, data: bytes) -> None:
    """Write a whole file or nothing: `.partial`, fsync, rename."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_manifest(folder: Path, manifest: Manifest, negative: Tensor) -> None:
    """Finish a data set: the negative prompt's embedding (L D), then the manifest, which is written last."""
    write_file(folder / NEGATIVE, save({"text": negative.contiguous()}))
    write_file(folder / MANIFEST, (json.dumps(asdict(manifest), indent=1, ensure_ascii=False) + "\n").encode())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished data set; ValueError where it is missing, unfinished, empty or of another schema."""
    path = folder / MANIFEST
    if not path.is_file():
        state = "is unfinished: run the same encode command again" if folder.is_dir() else "does not exist"
        raise ValueError(f"shards={folder}: {state} (no {MANIFEST})")
    try:
        fields = json.loads(path.read_bytes())
        if fields["schema"] != SCHEMA:
            raise ValueError(f"{path}: schema is {fields['schema']}, this version reads {SCHEMA}; encode again")
        shards = tuple(Shard(**shard) for shard in fields["shards"])
        manifest = Manifest(
            SCHEMA, VideoSpec(**fields["spec"]), Encoder(**fields["encoder"]), shards, fields["failures"]
        )
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a manifest ({error}); encode again") from error
    if manifest.records == 0:
        raise ValueError(f"shards={folder}: the data set is empty")
    return manifest


def read_negative(folder: Path) -> Tensor:
    """The negative prompt's embedding (L D) bf16; ValueError where it is missing."""
    path = folder / NEGATIVE
    if not path.is_file():
        raise ValueError(f"{path}: missing; it is made by encode and cannot be replaced by zeros")
    return load_file(path)["text"]


def differing(expected: dict[str, object], found: dict[str, object]) -> list[str]:
    """One line for each field in `expected` that `found` has otherwise."""
    return [
        f"{name}: {found.get(name)!r}, expected {want!r}" for name, want in expected.items() if found.get(name) != want
    ]


def check_manifest(folder: Path, manifest: Manifest, *, spec: VideoSpec, encoder: dict[str, object]) -> None:
    """Refuse shards of another size than `spec` or of other encoders than the known fields in `encoder`."""
    lines = differing(asdict(spec), asdict(manifest.spec)) + differing(encoder, asdict(manifest.encoder))
    if lines:
        raise ValueError(f"shards={folder}: made otherwise than this run expects: {'; '.join(lines)}")
