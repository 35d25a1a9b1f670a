"""The manifest of a data set: what its shards are, what made them, and whether a model fits them."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from common.files import write_file
from common.video import VideoSpec

SCHEMA = 1
MANIFEST, NEGATIVE = "manifest.json", "negative.safetensors"
UNSIGNED = "0" * 64  # stands for the manifest's own hash while that hash is taken
SHARD_NAME = re.compile(r"shard-[0-9]{6,}\.tar")  # of a tar; nothing else is opened or deleted
SIGNED = re.compile(rb'\{\s*"sha256": "([0-9a-f]{64})"')


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


@dataclass(frozen=True, slots=True)
class Shard:
    """One finished tar."""

    name: str
    records: int
    rows: int  # CSV rows it stands for: records + failures
    sha256: str
    size: int  # bytes
    index_sha256: str = ""  # of the sidecar; empty within the sidecar itself


SHARD_FIELDS = Shard.__annotations__.keys()


@dataclass(frozen=True)
class Manifest:
    """All that stage two must know of a data set before it opens a tar."""

    schema: int
    spec: VideoSpec
    encoder: Encoder
    shards: tuple[Shard, ...]
    failures: int
    negative_sha256: str = ""  # of the file; filled in by write_manifest

    @property
    def records(self) -> int:
        """Number of records in all shards."""
        return sum(shard.records for shard in self.shards)


def write_manifest(folder: Path, manifest: Manifest, negative: Tensor) -> None:
    """Finish a data set: the negative prompt's embedding (L D), then the manifest, which is written last."""
    embedding = save({"text": negative.contiguous()})
    signed = asdict(manifest) | {"negative_sha256": hashlib.sha256(embedding).hexdigest()}
    unsigned = json.dumps({"sha256": UNSIGNED} | signed, indent=1, ensure_ascii=False) + "\n"
    digest = hashlib.sha256(unsigned.encode()).hexdigest()
    write_file(folder / NEGATIVE, embedding)
    write_file(folder / MANIFEST, unsigned.replace(UNSIGNED, digest, 1).encode())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished data set; ValueError where it is missing, unfinished, empty or of another schema."""
    path = folder / MANIFEST
    if not path.is_file():
        state = "is unfinished: run the same encode command again" if folder.is_dir() else "does not exist"
        raise ValueError(f"shards={folder}: {state} (no {MANIFEST})")
    return parse_manifest(path.read_bytes(), str(folder))


def _shard_or_dict(fields: dict[str, Any]) -> object:
    """Make each shard while parsing, so that 200,000 of them never stand in memory as dicts; another schema's stay."""
    return Shard(**fields) if fields.keys() == SHARD_FIELDS else fields


def intact(data: bytes) -> bool:
    """Whether a manifest's bytes have the hash that they state, taken with the stated one zeroed."""
    stated = SIGNED.match(data)
    if stated is None:
        return False
    digest, view = hashlib.sha256(data[: stated.start(1)]), memoryview(data)
    digest.update(UNSIGNED.encode())
    digest.update(view[stated.end(1) :])
    return stated.group(1).decode() == digest.hexdigest()


def parse_manifest(data: bytes, where: str) -> Manifest:
    """The manifest in the bytes of its file; ValueError naming `where` when it is damaged, empty or too new."""
    if not intact(data):
        raise ValueError(f"{where}/{MANIFEST}: is damaged (its hash differs), or none: run the encode command again")
    try:
        fields = json.loads(data, object_hook=_shard_or_dict)
        if fields["schema"] != SCHEMA:
            way = f"this version reads only {SCHEMA}; use the version that made it, or encode again"
            raise ValueError(f"{where}/{MANIFEST}: has schema {fields['schema']}, {way}")
        manifest = Manifest(
            SCHEMA,
            VideoSpec(**fields["spec"]),
            Encoder(**fields["encoder"]),
            tuple(fields["shards"]),
            fields["failures"],
            fields["negative_sha256"],
        )
        foreign = [shard.name for shard in manifest.shards if not SHARD_NAME.fullmatch(shard.name)]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}/{MANIFEST}: not a manifest ({error}); encode again") from error
    if foreign:
        raise ValueError(
            f"{where}/{MANIFEST}: names a shard {foreign[0]!r}, which is no shard-NUMBER.tar; encode again"
        )
    if manifest.records == 0:
        raise ValueError(f"shards={where}: the data set is empty")
    return manifest


def read_negative(folder: Path) -> Tensor:
    """The negative prompt's embedding (L D) bf16; ValueError where it is missing."""
    path = folder / NEGATIVE
    if not path.is_file():
        raise ValueError(f"{path}: missing; it is made by encode and cannot be replaced by zeros")
    return parse_negative(path.read_bytes(), str(folder))


def parse_negative(data: bytes, where: str) -> Tensor:
    """The embedding (L D) in the bytes of its file; ValueError when they hold none."""
    try:
        return load(data)["text"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{where}/{NEGATIVE}: not an embedding ({error}); encode again") from error


def differing(expected: dict[str, object], found: dict[str, object]) -> list[str]:
    """One line for each field in `expected` that `found` has otherwise."""
    return [
        f"{name}: {found.get(name)!r}, expected {want!r}" for name, want in expected.items() if found.get(name) != want
    ]


def different_makers(expected: Manifest, found: Manifest) -> list[str]:
    """One line for each field of spec and encoder that two data sets do not share."""
    return differing(asdict(expected.spec), asdict(found.spec)) + differing(
        asdict(expected.encoder), asdict(found.encoder)
    )


def check_manifest(folder: Path | str, manifest: Manifest, *, spec: VideoSpec, encoder: dict[str, object]) -> None:
    """Refuse shards of another size than `spec` or of other encoders than the known fields in `encoder`."""
    lines = differing(asdict(spec), asdict(manifest.spec)) + differing(encoder, asdict(manifest.encoder))
    if lines:
        raise ValueError(f"shards={folder}: made otherwise than this run expects: {'; '.join(lines)}")
