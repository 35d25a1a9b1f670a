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

SCHEMA_VERSION = 1
MANIFEST_FILE, NEGATIVE_FILE = "manifest.json", "negative.safetensors"
ZERO_HASH = "0" * 64  # stands for the manifest's own hash while that hash is taken
SHARD_NAME_PATTERN = re.compile(r"shard-[0-9]{6,}\.tar")  # of a tar; nothing else is opened or deleted
STATED_HASH_PATTERN = re.compile(rb'\{\s*"sha256": "([0-9a-f]{64})"')


@dataclass(frozen=True)
class EncoderInfo:
    """What made the latents and embeddings; two data sets mix only where all fields agree."""

    vae: str  # fingerprint of the weights and configuration
    text_encoder: str
    tokenizer: str
    vae_dtype: str
    text_dtype: str
    text_dim: int  # D
    negative_prompt: str


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One finished tar."""

    name: str
    records: int
    rows: int  # CSV rows it stands for: records + failures
    sha256: str
    size: int  # bytes
    index_sha256: str = ""  # of the sidecar; empty within the sidecar itself


SHARD_FIELDS = ShardInfo.__annotations__.keys()


@dataclass(frozen=True)
class Manifest:
    """All that stage two must know of a data set before it opens a tar."""

    schema: int
    spec: VideoSpec
    encoder: EncoderInfo
    shards: tuple[ShardInfo, ...]
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
    unsigned = json.dumps({"sha256": ZERO_HASH} | signed, indent=1, ensure_ascii=False) + "\n"
    digest = hashlib.sha256(unsigned.encode()).hexdigest()
    write_file(folder / NEGATIVE_FILE, embedding)
    write_file(folder / MANIFEST_FILE, unsigned.replace(ZERO_HASH, digest, 1).encode())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished data set; ValueError where it is missing, unfinished, empty or of another schema."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        state = "is unfinished: run the same encode command again" if folder.is_dir() else "does not exist"
        raise ValueError(f"shards={folder}: {state} (no {MANIFEST_FILE})")
    return parse_manifest(path.read_bytes(), str(folder))


def _parse_shard_or_dict(fields: dict[str, Any]) -> object:
    """Make each shard while parsing, so that 200,000 of them never stand in memory as dicts; another schema's stay."""
    return ShardInfo(**fields) if fields.keys() == SHARD_FIELDS else fields


def hash_matches(data: bytes) -> bool:
    """Whether a manifest's bytes have the hash that they state, taken with the stated one zeroed."""
    stated = STATED_HASH_PATTERN.match(data)
    if stated is None:
        return False
    digest, view = hashlib.sha256(data[: stated.start(1)]), memoryview(data)
    digest.update(ZERO_HASH.encode())
    digest.update(view[stated.end(1) :])
    return stated.group(1).decode() == digest.hexdigest()


def parse_manifest(data: bytes, location: str) -> Manifest:
    """The manifest in the bytes of its file; ValueError naming `where` when it is damaged, empty or too new."""
    if not hash_matches(data):
        raise ValueError(
            f"{location}/{MANIFEST_FILE}: is damaged (its hash differs), or none: run the encode command again"
        )
    try:
        fields = json.loads(data, object_hook=_parse_shard_or_dict)
        if fields["schema"] != SCHEMA_VERSION:
            remedy = f"this version reads only {SCHEMA_VERSION}; use the version that made it, or encode again"
            raise ValueError(f"{location}/{MANIFEST_FILE}: has schema {fields['schema']}, {remedy}")
        manifest = Manifest(
            SCHEMA_VERSION,
            VideoSpec(**fields["spec"]),
            EncoderInfo(**fields["encoder"]),
            tuple(fields["shards"]),
            fields["failures"],
            fields["negative_sha256"],
        )
        invalid_names = [shard.name for shard in manifest.shards if not SHARD_NAME_PATTERN.fullmatch(shard.name)]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{location}/{MANIFEST_FILE}: not a manifest ({error}); encode again") from error
    if invalid_names:
        raise ValueError(
            f"{location}/{MANIFEST_FILE}: names a shard {invalid_names[0]!r}, which is no shard-NUMBER.tar; encode again"
        )
    if manifest.records == 0:
        raise ValueError(f"shards={location}: the data set is empty")
    return manifest


def read_negative_embedding(folder: Path) -> Tensor:
    """The negative prompt's embedding (L D) bf16; ValueError where it is missing."""
    path = folder / NEGATIVE_FILE
    if not path.is_file():
        raise ValueError(f"{path}: missing; it is made by encode and cannot be replaced by zeros")
    return parse_negative_embedding(path.read_bytes(), str(folder))


def parse_negative_embedding(data: bytes, location: str) -> Tensor:
    """The embedding (L D) in the bytes of its file; ValueError when they hold none."""
    try:
        return load(data)["text"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{location}/{NEGATIVE_FILE}: not an embedding ({error}); encode again") from error


def list_differences(expected: dict[str, object], actual: dict[str, object]) -> list[str]:
    """One line for each field in `expected` that `found` has otherwise."""
    return [
        f"{name}: {actual.get(name)!r}, expected {value!r}"
        for name, value in expected.items()
        if actual.get(name) != value
    ]


def encoding_differences(expected: Manifest, actual: Manifest) -> list[str]:
    """One line for each field of spec and encoder that two data sets do not share."""
    return list_differences(asdict(expected.spec), asdict(actual.spec)) + list_differences(
        asdict(expected.encoder), asdict(actual.encoder)
    )


def check_manifest(folder: Path | str, manifest: Manifest, *, spec: VideoSpec, encoder: dict[str, object]) -> None:
    """Refuse shards of another size than `spec` or of other encoders than the known fields in `encoder`."""
    differences = list_differences(asdict(spec), asdict(manifest.spec)) + list_differences(
        encoder, asdict(manifest.encoder)
    )
    if differences:
        raise ValueError(f"shards={folder}: made otherwise than this run expects: {'; '.join(differences)}")
