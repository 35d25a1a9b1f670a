"""Checks of what a run reads and writes: model, data sets, and the disk of the output."""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from common.files import read_json
from common.model_folder import MODEL_PARTS, WeightIndex, locate_model, locate_part
from common.planning.units import format_bytes
from shards.dataset import DataSet, open_data_set, prefetch_ordered
from shards.manifest import list_differences
from shards.mixture import parse_weight
from stage2_distill.diagnosis.finding import FAIL, OK, WARN, Finding
from stage2_distill.model.wan import build_meta_transformer
from stage2_distill.planning.memory import MemoryEstimate
from stage2_distill.weight_files.stored_weights import read_weight_table

PROBE_BYTES, BLOCK_BYTES = 256 << 20, 16 << 20  # written to measure a disk, and at once
LOW_RATE = 200e6  # bytes per second: a checkpoint of 70 GB takes six minutes
MAX_SHARDS = 256  # of a data set, of which a record is read
READ_THREADS = 8
CLOCK_TOLERANCE = 5.0  # seconds between this machine's clock and that of the disk's server
RELEASE_TIME = 1_735_689_600  # 2025-01-01: an earlier clock is wrong


def check_model(model: str) -> Iterator[Finding]:
    """The parts of a model: the transformer's tensors one by one, of the others the files."""
    if not Path(model).exists() and model.count("/") == 1 and not model.startswith((".", "/")):
        yield Finding("model", WARN, f"{model}: a hub name, not looked at", "the first command downloads it")
        return
    folder = locate_model(model, ("transformer",))
    expected = {name: tuple(p.shape) for name, p in build_meta_transformer(folder, torch.bfloat16).named_parameters()}
    stored = read_weight_table(locate_part(folder, "transformer"))
    wrong = [name for name, shape in expected.items() if name not in stored or tuple(stored[name].get_shape()) != shape]
    if wrong:
        text = f"{model}: the transformer lacks {len(wrong)} of {len(expected)} tensors, such as {min(wrong)}"
        yield Finding("model", FAIL, text, "copy the model again")
        return
    missing = [part for part in MODEL_PARTS if missing_files(folder, part)]
    text = f"{model}: transformer of {len(expected)} tensors, complete"
    if missing:
        cure = "distill needs none of these; encode and sample do"
        yield Finding("model", WARN, f"{text}; missing or incomplete: {', '.join(missing)}", cure)
    else:
        yield Finding("model", OK, f"{text}; {', '.join(MODEL_PARTS[:3])} are there")


def missing_files(folder: Path, part: str) -> bool:
    """Whether a part of a model, or a file that its index names, is missing."""
    try:
        locate_model(str(folder), (part,))
        path = locate_part(folder, part)
        indices = [read_json(index, WeightIndex) for index in path.glob("*.safetensors.index.json")]
    except ValueError:
        return True
    return any(not (path / name).is_file() for index in indices for name in index.weight_map.values())


def check_data_set(prefix: str, encoder: dict[str, object]) -> Iterator[Finding]:
    """Manifest, and the first record of each shard; `encoder` are fields of the manifest that the model implies."""
    data = open_data_set(parse_weight(prefix)[0])
    shards = data.manifest.shards
    chosen = range(0, len(shards), -(-len(shards) // MAX_SHARDS))
    began, read_bytes = time.perf_counter(), 0
    for size in prefetch_ordered(lambda n: first_record_size(data, n), chosen, depth=32, threads=READ_THREADS):
        read_bytes += size
    seconds = time.perf_counter() - began
    part = f"a record of {len(chosen)} of {len(shards)} shards" if len(chosen) < len(shards) else "each shard"
    text = f"{prefix}: {data.num_records} records, {part} read, {len(chosen) / seconds:.0f} records/s"
    differences = list_differences(encoder, data.manifest.encoding)
    if differences:
        yield Finding("shards", FAIL, f"{prefix}: {'; '.join(differences)}", "give the model that encoded them")
    else:
        yield Finding("shards", OK, text)


def first_record_size(data: DataSet, shard: int) -> int:
    """Bytes of the text of a shard's first record, which is read; 0 for a shard without records."""
    first = sum(info.records for info in data.manifest.shards[:shard])
    return data.read_record(first).text.nbytes if data.manifest.shards[shard].records else 0


def check_disk(out: str, memory: MemoryEstimate, keep_last: int) -> Iterator[Finding]:
    """Speed and free space of the disk that `out` is on, against checkpoints of this size; and its clock."""
    folder = next(path for path in (Path(out).absolute(), *Path(out).absolute().parents) if path.is_dir())
    probe = folder / f".doctor-{os.getpid()}"
    block = os.urandom(BLOCK_BYTES)  # zeros would be compressed by some file systems
    try:
        began = time.perf_counter()
        with probe.open("wb") as file:
            for _ in range(PROBE_BYTES // BLOCK_BYTES):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        rate = PROBE_BYTES / (time.perf_counter() - began)
        stamp = probe.stat().st_mtime
    except OSError as error:
        raise ValueError(f"out={folder}: {error.strerror}; a run cannot write there, give another folder") from error
    finally:
        probe.unlink(missing_ok=True)
    free, needed = shutil.disk_usage(folder).free, memory.checkpoint * (keep_last + 1)
    text = f"{folder}: writes {rate / 1e6:.0f} MB/s, {format_bytes(free)} free, a run needs {format_bytes(needed)}"
    if free < needed:
        yield Finding("disk", FAIL, text, "use a larger disk, a smaller --keep-last, or --lora-rank")
    elif rate < LOW_RATE and memory.checkpoint > LOW_RATE:
        minutes = memory.checkpoint / rate / 60
        yield Finding("disk", WARN, f"{text}; a checkpoint takes {minutes:.0f} min", "use a faster disk")
    else:
        yield Finding("disk", OK, text)
    yield from check_clock(time.time() - stamp)


def check_clock(deviation: float) -> Iterator[Finding]:
    """Whether the clock is plausible, and near that of the disk's server; `deviation` in seconds."""
    now = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    if time.time() < RELEASE_TIME:
        yield Finding("clock", FAIL, f"{now} is wrong: downloads will fail", "set the clock")
    elif abs(deviation) > CLOCK_TOLERANCE:
        yield Finding("clock", WARN, f"{now}, {deviation:+.0f} s from the disk's server", "synchronize both (NTP)")
    else:
        yield Finding("clock", OK, now)
