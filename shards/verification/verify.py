"""Checking a whole data set: every byte of it has a hash, every row an end, every record the right shape."""

import csv
import io
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from common.progress import track_progress
from shards.dataset import prefetch
from shards.manifest import MANIFEST, NEGATIVE, SHARD_NAME, Manifest, intact, parse_manifest, parse_negative
from shards.storage.open import Folder, Place, open_place, read_whole
from shards.verification.check_shard import Findings, Problem, examine
from shards.verification.statistics import Report, outliers, sources, spreads
from shards.writer import index_name

FAILURES = "failures.csv"  # a copy for people; the sidecars hold the same
THREADS = 4


def verify(prefix: str | Path) -> Report:
    """Check every byte and every record of the data set in a folder or at an object-store prefix.

    Raises ValueError only where there is no data set at all.
    """
    place = open_place(str(prefix), cache_bytes=0)
    manifest, problems = _verify_opening(place)
    if manifest is None:
        return Report(place.where, None, tuple(problems), (), {}, {})
    check = partial(examine, place, manifest)
    checked = prefetch(check, manifest.shards, depth=2 * THREADS, threads=THREADS)
    found = list(track_progress(checked, total=len(manifest.shards), label="verify"))
    problems += [problem for findings in found for problem in findings.problems]
    problems += [*_duplicate_keys(found), *_rows(found), *_failures(place, manifest, found), *_strays(place, manifest)]
    return Report(place.where, manifest, tuple(problems), outliers(found), spreads(found), sources(found))


def broken_shards(report: Report) -> list[str]:
    """Names of the tars that encoding again would mend."""
    return sorted({problem.shard for problem in report.problems if problem.shard})


def discard_broken(report: Report) -> list[str]:
    """Delete what is broken in a local data set, so that the same encode command makes just that again."""
    folder = Path(report.where)
    if not folder.is_dir():
        raise ValueError(f"shards={report.where}: only a local folder is repaired; copy it, or encode it again")
    shards = broken_shards(report)
    doomed = {name for shard in shards for name in (index_name(shard), shard)}
    doomed |= {problem.file for problem in report.problems if not problem.shard}
    if doomed:
        doomed.add(MANIFEST)  # first, so that a data set with a manifest is always whole
    for name in sorted(doomed, key=lambda name: (name != MANIFEST, name)):
        (folder / name).unlink(missing_ok=True)
    return sorted(doomed)


def _verify_opening(place: Place) -> tuple[Manifest | None, list[Problem]]:
    try:
        data = place.read(MANIFEST, fresh=True)
        manifest = parse_manifest(data if intact(data) else place.read(MANIFEST, fresh=True), place.where)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"shards={place.where}: does not exist or is unfinished (no {MANIFEST})") from error
    except ValueError as error:
        return None, [Problem(MANIFEST, "", str(error))]
    try:
        negative = parse_negative(read_whole(place, NEGATIVE, manifest.negative_sha256), place.where)
    except (OSError, ValueError) as error:
        return manifest, [Problem(NEGATIVE, "text", str(error))]
    if negative.ndim != 2 or negative.shape[1] != manifest.encoder.text_dim or not negative.isfinite().all():
        return manifest, [Problem(NEGATIVE, "text", f"is {tuple(negative.shape)}, or holds NaN or infinity")]
    return manifest, []


def _duplicate_keys(found: Sequence[Findings]) -> Iterator[Problem]:
    seen: dict[str, str] = {}
    for findings in found:
        for key in findings.keys:
            if key in seen:
                yield Problem(findings.shard.name, key, f"this key is also in {seen[key]}", findings.shard.name)
            seen[key] = findings.shard.name


def _rows(found: Sequence[Findings]) -> Iterator[Problem]:
    """Every row of the CSV must be one record or one failure, in one shard."""
    last = 0
    for findings in found:
        lines = sorted(findings.lines)
        if findings.problems or not lines:
            continue
        if len(set(lines)) != findings.shard.rows or lines[0] <= last:
            reason = f"CSV lines {lines[0]} to {lines[-1]} are not {findings.shard.rows} rows, each once"
            yield Problem(index_name(findings.shard.name), "", reason, findings.shard.name)
        last = lines[-1]


def _failures(place: Place, manifest: Manifest, found: Sequence[Findings]) -> Iterator[Problem]:
    known = [failure for findings in found for failure in findings.failures]
    if any(findings.problems for findings in found):
        return
    if len(known) != manifest.failures:
        yield Problem(MANIFEST, "", f"counts {manifest.failures} failures, the sidecars {len(known)}")
    try:
        rows = list(csv.reader(io.StringIO(place.read(FAILURES, fresh=True).decode(), newline="")))
    except FileNotFoundError:
        return
    except (UnicodeDecodeError, csv.Error) as error:
        yield Problem(FAILURES, "", f"is damaged ({error})")
        return
    if rows != [["line", "path", "reason"], *([str(line), path, reason] for line, path, reason in known)]:
        yield Problem(FAILURES, "", "differs from what the sidecars say")


def _strays(place: Place, manifest: Manifest) -> Iterator[Problem]:
    """Shards that the manifest does not know; an object store is not listed."""
    if isinstance(place, Folder):
        known = {name for shard in manifest.shards for name in (shard.name, index_name(shard.name))}
        for path in sorted(Path(place.where).glob("shard-*")):
            ours = path.suffix in (".tar", ".json") and SHARD_NAME.fullmatch(path.with_suffix(".tar").name)
            if ours and path.name not in known:
                yield Problem(path.name, "", "is not in the manifest")
