"""The manifest of a data set: its shards, the encoders that made them, and whether a model fits them.

Schema 1 has one size for all shards. Schema 2 differs in one thing: a shard may state a size of its own (`video_size`).
It is written only if the records have several sizes, so that older versions read all other data sets.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from common.files import Count, parse_json, read_file, write_file
from common.model_folder import same_fingerprint
from common.video import VideoSpec
from shards.storage.open import LocalStorage, Storage, read_verified_file

SCHEMA_VERSION, MANY_SIZES_VERSION = 1, 2
MODEL_FIELDS = ("vae", "text_encoder", "tokenizer")  # of EncoderInfo: fingerprints
MANIFEST_FILE, NEGATIVE_FILE = "manifest.json", "negative.safetensors"
ZERO_HASH = "0" * 64  # stands for the manifest's own hash while that hash is taken
SHARD_NAME_PATTERN = re.compile(r"shard-[0-9]{6,}\.tar")  # nothing else is opened or deleted as a tar
STATED_HASH_PATTERN = re.compile(rb'\{\s*"sha256": "([0-9a-f]{64})"')


@dataclass(frozen=True)
class EncoderInfo:
    """What made the latents and embeddings; data sets can be mixed only if all fields are equal."""

    vae: str  # fingerprint of the weights and configuration
    text_encoder: str
    tokenizer: str
    vae_dtype: str
    text_dtype: str
    text_dim: Count  # D
    negative_prompt: str


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One finished tar; ValueError if its name is not that of a shard."""

    name: str
    records: Count
    rows: Count  # CSV rows it covers: records + failures
    sha256: str
    size: Count  # bytes
    index_sha256: str = ""  # of the sidecar; empty within the sidecar itself
    video_size: tuple[Count, Count] | None = None  # (height, width); None = the manifest's, and no file holds the field

    def __post_init__(self) -> None:
        if not SHARD_NAME_PATTERN.fullmatch(self.name):  # such as ../../victim, which verify --repair would delete
            raise ValueError(f"names a shard {self.name!r}, which is not shard-NUMBER.tar")

    @property
    def stored_fields(self) -> dict[str, object]:
        """The fields as files hold them."""
        fields = asdict(self)
        return fields if self.video_size else {name: value for name, value in fields.items() if name != "video_size"}


@dataclass(frozen=True)
class ManifestSchema:
    """The field of the manifest that says how to read the others."""

    schema: int


@dataclass(frozen=True)
class Manifest:
    """All that stage two must know of a data set before it opens a tar."""

    schema: int
    spec: VideoSpec  # of shards without a size of their own
    encoder: EncoderInfo
    shards: tuple[ShardInfo, ...]
    failures: Count
    negative_sha256: str = ""  # of the file; filled in by write_manifest

    def __post_init__(self) -> None:
        if len(self.sizes) > 1 and self.schema < MANY_SIZES_VERSION:  # VideoSpec checks each size
            raise ValueError(f"has schema {self.schema} and records of several sizes")

    @property
    def sizes(self) -> tuple[VideoSpec, ...]:
        """The sizes of the records, each once, by height and then by width."""
        return list_sizes(self.spec, self.shards)

    def shard_spec(self, shard: ShardInfo) -> VideoSpec:
        """Size and frame rate of a shard's videos."""
        return sized_spec(self.spec, shard.video_size)

    @property
    def records(self) -> int:
        """Number of records in all shards."""
        return sum(shard.records for shard in self.shards)

    @property
    def content_digest(self) -> str:
        """Hex digest of all records and of the negative prompt's embedding: the same for every copy of a data set."""
        digest = hashlib.sha256(self.negative_sha256.encode())
        for shard in self.shards:
            digest.update(f" {shard.records} {shard.sha256}".encode())
        return digest.hexdigest()[:32]

    @property
    def encoding(self) -> dict[str, object]:
        """The fields of spec and encoder, by name."""
        return vars(self.spec) | vars(self.encoder)


def sized_spec(spec: VideoSpec, video_size: tuple[int, int] | None) -> VideoSpec:
    """A spec with another (height, width), if one is given; ValueError if it is not one of the VAE."""
    return spec if video_size is None else replace(spec, height=video_size[0], width=video_size[1])


def list_sizes(spec: VideoSpec, shards: Iterable[ShardInfo]) -> tuple[VideoSpec, ...]:
    """The sizes of shards with records, each once, by height and then by width; `spec` alone if there are none."""
    sizes = {shard.video_size for shard in shards if shard.records}  # few, of perhaps 200,000 shards
    specs = {sized_spec(spec, size) for size in sizes} or {spec}
    return tuple(sorted(specs, key=lambda one: (one.height, one.width)))


def make_manifest(spec: VideoSpec, encoder: EncoderInfo, shards: tuple[ShardInfo, ...], failures: int) -> Manifest:
    """The manifest of shards, of the lowest schema that can hold them; its spec is the first of `sizes`."""
    sizes = list_sizes(spec, shards)
    return Manifest(SCHEMA_VERSION if len(sizes) == 1 else MANY_SIZES_VERSION, sizes[0], encoder, shards, failures)


def write_manifest(folder: Path, manifest: Manifest, negative: Tensor) -> None:
    """Finish a data set: write the negative prompt's embedding (L D), then the manifest, which is always last."""
    embedding = save({"text": negative.contiguous()})
    signed = asdict(manifest) | {"negative_sha256": hashlib.sha256(embedding).hexdigest()}
    signed["shards"] = [shard.stored_fields for shard in manifest.shards]
    unsigned = json.dumps({"sha256": ZERO_HASH} | signed, indent=1, ensure_ascii=False) + "\n"
    digest = hashlib.sha256(unsigned.encode()).hexdigest()
    write_file(folder / NEGATIVE_FILE, embedding)  # before the manifest, whose presence means "finished"
    write_file(folder / MANIFEST_FILE, unsigned.replace(ZERO_HASH, digest, 1).encode())


def read_manifest(folder: Path) -> Manifest:
    """The manifest in a local folder; ValueError if it is missing, damaged, empty or of another schema."""
    if not (folder / MANIFEST_FILE).is_file():
        state = "is unfinished: run the same encode command again" if folder.is_dir() else "does not exist"
        raise ValueError(f"shards={folder}: {state} (no {MANIFEST_FILE})")
    return load_manifest(LocalStorage(str(folder)))


def hash_matches(data: memoryview) -> bool:
    """Whether a manifest's bytes have the hash that they state, taken with the stated one replaced by zeros."""
    stated = STATED_HASH_PATTERN.match(data)
    if stated is None:
        return False
    digest = hashlib.sha256(data[: stated.start(1)])
    digest.update(ZERO_HASH.encode())
    digest.update(data[stated.end(1) :])
    return stated.group(1).decode() == digest.hexdigest()


def load_manifest(storage: Storage) -> Manifest:
    """The manifest, never from a cache; ValueError if it is damaged, empty or of another schema."""
    path = f"{storage.location}/{MANIFEST_FILE}"
    data = storage.read(MANIFEST_FILE, fresh=True)
    if not hash_matches(data):  # perhaps the transfer was at fault
        data = storage.read(MANIFEST_FILE, fresh=True)
    if not hash_matches(data):
        raise ValueError(f"{path}: is damaged (its hash differs) or not a manifest; run the encode command again")
    schema = parse_json(data, ManifestSchema, path).schema  # first, as another schema may have other fields
    if schema not in (SCHEMA_VERSION, MANY_SIZES_VERSION):
        readable = f"{SCHEMA_VERSION} and {MANY_SIZES_VERSION}"
        remedy = f"this version reads only {readable}; use the version that made it, or encode again"
        raise ValueError(f"{path}: has schema {schema}, {remedy}")
    manifest = parse_json(data, Manifest, path)
    if manifest.records == 0:
        raise ValueError(f"shards={storage.location}: the data set is empty; failures.csv says why")
    return manifest


def load_negative_embedding(storage: Storage, manifest: Manifest) -> Tensor:
    """The negative prompt's embedding (L D) bf16; ValueError if its hash or shape is not the manifest's."""
    data, path = read_verified_file(storage, NEGATIVE_FILE, manifest.negative_sha256), storage.location
    negative = parse_embedding(bytes(data), f"{path}/{NEGATIVE_FILE}")
    if negative.ndim != 2 or negative.shape[1] != manifest.encoder.text_dim or not negative.isfinite().all():
        raise ValueError(f"{path}/{NEGATIVE_FILE}: is {tuple(negative.shape)}, or holds NaN or infinity")
    return negative


def parse_embedding(data: bytes, where: object) -> Tensor:
    """The tensor `text` of a safetensors file; ValueError that begins with `where` if there is none."""
    try:
        return load(data)["text"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{where}: is not an embedding ({error}); delete it and run encode again") from error


def read_negative_embedding(folder: Path) -> Tensor:
    """The negative prompt's embedding (L D) bf16 of a folder without a manifest; ValueError if it is missing."""
    path = folder / NEGATIVE_FILE
    try:
        return parse_embedding(read_file(path), path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error}); run encode again") from error


def same_value(name: str, one: object, other: object) -> bool:
    """Whether two values of a field, given as `vae` or `encoder.vae`, are equal or fingerprints of the same model."""
    is_fingerprint = name.rpartition(".")[2] in MODEL_FIELDS and other is not None
    return one == other or (is_fingerprint and same_fingerprint(one, other))


def list_differences(expected: Mapping[str, object], actual: Mapping[str, object]) -> list[str]:
    """One line for each field of `expected` whose value in `actual` is another or missing; see `same_value`."""
    differing = [name for name, value in expected.items() if not same_value(name, value, actual.get(name))]
    return [f"{name}: {actual.get(name)!r}, expected {expected[name]!r}" for name in differing]


def check_settings(folder: Path | str, manifest: Manifest, expected: Mapping[str, object]) -> None:
    """Raise ValueError if shards were encoded with another value of a setting than is expected."""
    differences = list_differences(expected, manifest.encoding)
    if differences:
        raise ValueError(
            f"shards={folder}: encoded with other settings than this run needs: {'; '.join(differences)}; give those"
        )
