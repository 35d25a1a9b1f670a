"""Checking a whole data set: every byte of it has a hash, every row an end, every record the right shape."""

import csv
import io
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from common.progress import track_progress
from shards.dataset import prefetch_ordered
from shards.manifest import (
    MANIFEST_FILE,
    NEGATIVE_FILE,
    SHARD_NAME_PATTERN,
    Manifest,
    hash_matches,
    parse_manifest,
    parse_negative_embedding,
)
from shards.storage.open import LocalStorage, Storage, open_storage, read_verified_file
from shards.verification.check_shard import DataProblem, ShardReport, check_shard
from shards.verification.statistics import VerifyReport, count_sources, find_outliers, summarize_values
from shards.writer import index_file_name

FAILURES_FILE = "failures.csv"  # a copy for people; the sidecars hold the same
VERIFY_THREADS = 4


def verify_data_set(prefix: str | Path) -> VerifyReport:
    """Check every byte and every record of the data set in a folder or at an object-store prefix.

    Raises ValueError only where there is no data set at all.
    """
    storage = open_storage(str(prefix), cache_bytes=0)
    manifest, problems = _check_manifest_files(storage)
    if manifest is None:
        return VerifyReport(storage.location, None, tuple(problems), (), {}, {})
    check = partial(check_shard, storage, manifest)
    checked = prefetch_ordered(check, manifest.shards, depth=2 * VERIFY_THREADS, threads=VERIFY_THREADS)
    shard_reports = list(track_progress(checked, total=len(manifest.shards), label="verify"))
    problems += [problem for shard_report in shard_reports for problem in shard_report.problems]
    problems += [
        *_duplicate_keys(shard_reports),
        *_check_row_coverage(shard_reports),
        *_check_failures_file(storage, manifest, shard_reports),
        *_unlisted_shards(storage, manifest),
    ]
    return VerifyReport(
        storage.location,
        manifest,
        tuple(problems),
        find_outliers(shard_reports),
        summarize_values(shard_reports),
        count_sources(shard_reports),
    )


def broken_shard_names(report: VerifyReport) -> list[str]:
    """Names of the tars that encoding again would mend."""
    return sorted({problem.shard for problem in report.problems if problem.shard})


def delete_broken_files(report: VerifyReport) -> list[str]:
    """Delete what is broken in a local data set, so that the same encode command makes just that again."""
    folder = Path(report.location)
    if not folder.is_dir():
        raise ValueError(f"shards={report.location}: only a local folder is repaired; copy it, or encode it again")
    shards = broken_shard_names(report)
    to_delete = {name for shard in shards for name in (index_file_name(shard), shard)}
    to_delete |= {problem.file for problem in report.problems if not problem.shard}
    if to_delete:
        to_delete.add(MANIFEST_FILE)  # first, so that a data set with a manifest is always whole
    for name in sorted(to_delete, key=lambda name: (name != MANIFEST_FILE, name)):
        (folder / name).unlink(missing_ok=True)
    return sorted(to_delete)


def _check_manifest_files(storage: Storage) -> tuple[Manifest | None, list[DataProblem]]:
    try:
        data = storage.read(MANIFEST_FILE, fresh=True)
        manifest = parse_manifest(
            data if hash_matches(data) else storage.read(MANIFEST_FILE, fresh=True), storage.location
        )
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"shards={storage.location}: does not exist or is unfinished (no {MANIFEST_FILE})") from error
    except ValueError as error:
        return None, [DataProblem(MANIFEST_FILE, "", str(error))]
    try:
        negative = parse_negative_embedding(
            read_verified_file(storage, NEGATIVE_FILE, manifest.negative_sha256), storage.location
        )
    except (OSError, ValueError) as error:
        return manifest, [DataProblem(NEGATIVE_FILE, "text", str(error))]
    if negative.ndim != 2 or negative.shape[1] != manifest.encoder.text_dim or not negative.isfinite().all():
        return manifest, [DataProblem(NEGATIVE_FILE, "text", f"is {tuple(negative.shape)}, or holds NaN or infinity")]
    return manifest, []


def _duplicate_keys(shard_reports: Sequence[ShardReport]) -> Iterator[DataProblem]:
    first_shard: dict[str, str] = {}
    for shard_report in shard_reports:
        for key in shard_report.keys:
            if key in first_shard:
                yield DataProblem(
                    shard_report.shard.name, key, f"this key is also in {first_shard[key]}", shard_report.shard.name
                )
            first_shard[key] = shard_report.shard.name


def _check_row_coverage(shard_reports: Sequence[ShardReport]) -> Iterator[DataProblem]:
    """Every row of the CSV must be one record or one failure, in one shard."""
    last_line = 0
    for shard_report in shard_reports:
        lines = sorted(shard_report.lines)
        if shard_report.problems or not lines:
            continue
        if len(set(lines)) != shard_report.shard.rows or lines[0] <= last_line:
            reason = f"CSV lines {lines[0]} to {lines[-1]} are not {shard_report.shard.rows} rows, each once"
            yield DataProblem(index_file_name(shard_report.shard.name), "", reason, shard_report.shard.name)
        last_line = lines[-1]


def _check_failures_file(
    storage: Storage, manifest: Manifest, shard_reports: Sequence[ShardReport]
) -> Iterator[DataProblem]:
    expected = [failure for shard_report in shard_reports for failure in shard_report.failures]
    if any(shard_report.problems for shard_report in shard_reports):
        return
    if len(expected) != manifest.failures:
        yield DataProblem(MANIFEST_FILE, "", f"counts {manifest.failures} failures, the sidecars {len(expected)}")
    try:
        rows = list(csv.reader(io.StringIO(storage.read(FAILURES_FILE, fresh=True).decode(), newline="")))
    except FileNotFoundError:
        return
    except (UnicodeDecodeError, csv.Error) as error:
        yield DataProblem(FAILURES_FILE, "", f"is damaged ({error})")
        return
    if rows != [["line", "path", "reason"], *([str(line), path, reason] for line, path, reason in expected)]:
        yield DataProblem(FAILURES_FILE, "", "differs from what the sidecars say")


def _unlisted_shards(storage: Storage, manifest: Manifest) -> Iterator[DataProblem]:
    """Shards that the manifest does not know; an object store is not listed."""
    if isinstance(storage, LocalStorage):
        listed = {name for shard in manifest.shards for name in (shard.name, index_file_name(shard.name))}
        for path in sorted(Path(storage.location).glob("shard-*")):
            has_shard_name = path.suffix in (".tar", ".json") and SHARD_NAME_PATTERN.fullmatch(
                path.with_suffix(".tar").name
            )
            if has_shard_name and path.name not in listed:
                yield DataProblem(path.name, "", "is not in the manifest")
