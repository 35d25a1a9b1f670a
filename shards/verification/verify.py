"""Checking a whole data set: the hash of every file, the coverage of every CSV row, the shapes of every record."""

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from common.progress import track_progress
from shards.dataset import prefetch_ordered
from shards.manifest import MANIFEST_FILE, SHARD_NAME_PATTERN, Manifest, load_manifest
from shards.storage.open import LocalStorage, Storage, open_storage
from shards.verification.check_settings import SETTINGS_FILES, settings_problems
from shards.verification.check_shard import DataProblem, ShardReport, check_shard, negative_problems
from shards.verification.statistics import VerifyReport, collect_values, find_outliers, summarize_values
from shards.writer import index_file_name

FAILURES_FILE = "failures.csv"  # a copy for people of the failures in the sidecars
VERIFY_THREADS = 4


def verify_data_set(prefix: str | Path) -> VerifyReport:
    """Check every byte and record of a data set in a folder or at a prefix; ValueError only if there is none."""
    storage = open_storage(str(prefix), cache_bytes=0)  # what is stored, not what was cached
    try:
        manifest = load_manifest(storage)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"shards={storage.location}: does not exist or is unfinished (no {MANIFEST_FILE})") from error
    except ConnectionError as error:
        raise ValueError(f"shards={error}") from error
    except ValueError as error:
        return VerifyReport(storage.location, None, (DataProblem(MANIFEST_FILE, "", str(error)),))
    check = partial(check_shard, storage, manifest)
    checked = prefetch_ordered(check, manifest.shards, depth=2 * VERIFY_THREADS, threads=VERIFY_THREADS)
    reports = list(track_progress(checked, total=len(manifest.shards), label="verify"))
    problems = (
        *negative_problems(storage, manifest),
        *(problem for report in reports for problem in report.problems),
        *_duplicate_keys(reports),
        *_row_problems(reports),
        *_failure_problems(storage, manifest, reports),
        *_unlisted_shards(storage, manifest),
        *settings_problems(storage, manifest),
    )
    values = collect_values(reports)
    outliers, summaries = find_outliers(reports, values), summarize_values(values)
    sources, notes = (
        dict(sum(counts, Counter[str]()).most_common())
        for counts in ((report.sources for report in reports), (report.notes for report in reports))
    )
    return VerifyReport(storage.location, manifest, problems, outliers, summaries, sources, notes)


def broken_shard_names(report: VerifyReport) -> list[str]:
    """Names of the tars that encoding again repairs."""
    return sorted({problem.shard for problem in report.problems if problem.shard})


def delete_broken_files(report: VerifyReport) -> list[str]:
    """Delete what is broken in a local data set, so that the same encode command makes only that again."""
    folder = Path(report.location)
    if not folder.is_dir():
        raise ValueError(f"shards={report.location}: only a local folder is repaired; copy it, or encode it again")
    to_delete = {problem.file for problem in report.problems if not problem.shard}
    for shard in broken_shard_names(report):
        to_delete |= {index_file_name(shard), shard}
    to_delete -= set(SETTINGS_FILES)
    if to_delete:
        to_delete.add(MANIFEST_FILE)
    # The manifest goes first: a data set with a manifest is always complete, even if this is interrupted.
    for name in sorted(to_delete, key=lambda name: name != MANIFEST_FILE):
        (folder / name).unlink(missing_ok=True)
    return sorted(to_delete)


def _duplicate_keys(reports: Sequence[ShardReport]) -> Iterator[DataProblem]:
    first_shard: dict[str, str] = {}
    for report in reports:
        for key in report.keys:
            if key in first_shard:
                yield DataProblem(report.shard.name, key, f"this key is also in {first_shard[key]}", report.shard.name)
            first_shard[key] = report.shard.name


def _row_problems(reports: Sequence[ShardReport]) -> Iterator[DataProblem]:
    """Every row of the CSV must be one record or one failure, in the order of the shards of its size."""
    last_lines: dict[tuple[int, int] | None, int] = {}
    for report in reports:
        lines, shard = sorted(report.lines), report.shard
        if report.problems or not lines:  # a damaged shard lacks the lines of its unreadable records
            continue
        if len(set(lines)) != shard.rows or lines[0] <= last_lines.get(shard.video_size, 0):
            reason = f"CSV lines {lines[0]} to {lines[-1]} are not {shard.rows} rows, each once"
            yield DataProblem(index_file_name(shard.name), "", reason, shard.name)
        last_lines[shard.video_size] = lines[-1]


def _failure_problems(storage: Storage, manifest: Manifest, reports: Sequence[ShardReport]) -> Iterator[DataProblem]:
    if any(report.problems for report in reports):
        return
    failures = [failure for report in reports for failure in report.failures]
    if len(failures) != manifest.failures:
        yield DataProblem(MANIFEST_FILE, "", f"counts {manifest.failures} failures, the sidecars {len(failures)}")
    try:
        text = str(storage.read(FAILURES_FILE, fresh=True), "utf-8")
        rows = list(csv.reader(io.StringIO(text, newline="")))
    except FileNotFoundError:  # a copy for people may be deleted
        return
    except (ValueError, csv.Error) as error:
        rows = [[str(error)]]
    if rows != [["line", "path", "reason"], *([str(item.line), item.path, item.reason] for item in failures)]:
        yield DataProblem(FAILURES_FILE, "", "is not the list of the failures in the sidecars")


def _unlisted_shards(storage: Storage, manifest: Manifest) -> Iterator[DataProblem]:
    """Shards that the manifest does not list. An object store cannot be searched for them."""
    if isinstance(storage, LocalStorage):
        listed = {shard.name for shard in manifest.shards}
        for path in sorted(Path(storage.location).glob("shard-*")):
            tar = path.with_suffix(".tar").name
            if path.suffix in (".tar", ".json") and SHARD_NAME_PATTERN.fullmatch(tar) and tar not in listed:
                yield DataProblem(path.name, "", "is not in the manifest")
