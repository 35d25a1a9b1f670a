"""The folder of a data set while it is encoded: its plan, its lock, and which of its shards are finished.

`plan.json` names everything that changes a record, so that a later run continues a data set only with equal settings.
A run holds the slots of `encode.lock` that stand for its shards, so that several runs may share the folder.
"""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from common.files import (
    FolderLock,
    open_file,
    parse_json,
    read_file,
    read_json,
    refuse_foreign_files,
    report_write_errors,
    write_file,
)
from common.model_folder import fingerprint_part, locate_part
from common.options import write_config
from common.video import FrameSize, VideoSpec
from shards.manifest import (
    MANIFEST_FILE,
    MANY_SIZES_VERSION,
    NEGATIVE_FILE,
    SCHEMA_VERSION,
    EncoderInfo,
    Manifest,
    list_differences,
    make_manifest,
    read_manifest,
    read_negative_embedding,
    write_manifest,
)
from shards.record import METADATA_SUFFIX, RecordSource
from shards.verification.check_settings import ENCODE_CONFIG_FILE, PLAN_FILE, check_options, plan_values
from shards.writer import RowFailure, ShardIndex, index_file_name, read_index, shard_file_name
from stage1_encode.config import EncodeConfig
from stage1_encode.media.rows import Row, rows_digest
from stage1_encode.models.loading import read_text_width
from stage1_encode.models.text_encoder import clean_prompt
from stage1_encode.video_sizes.header_survey import PROGRESS_FILE, SURVEY_FILE
from stage1_encode.video_sizes.row_sizes import assign_sizes, group_rows
from stage1_encode.video_sizes.size_list import format_frame_sizes

FAILURES_FILE, LOCK_FILE = "failures.csv", "encode.lock"
FIXED_FILES = (
    *(PLAN_FILE, ENCODE_CONFIG_FILE, FAILURES_FILE, LOCK_FILE, MANIFEST_FILE, NEGATIVE_FILE),
    *(SURVEY_FILE, PROGRESS_FILE),
)
DATA_SET_FILES = re.compile(rf"({'|'.join(FIXED_FILES)}|shard-\d{{6,}}\.(tar|json))(\.partial)?|{LOCK_FILE}(\.\d+)+")
SIZE_FIELDS = ("sizes", "max_upscale")  # of a plan
MAX_SHOWN_LINES = 10  # of changed rows in an error
PLAN_SLOT, MANIFEST_SLOT, FIRST_SHARD_SLOT = 0, 1, 2  # of the lock file


@dataclass(frozen=True)
class EncodingPlan:
    """Everything that changes a record, apart from the rows."""

    schema: int
    spec: VideoSpec
    encoder: EncoderInfo
    shard_size: int
    text_only: bool
    compile: bool  # compiled kernels and other batches round differently
    batch_size: int
    text_tokens: int
    hdr: str = "tonemap"  # fields with a default came later: a plan without them was made with the default
    untagged_hd: str = "bt601"
    sizes: str = ""  # as the option names them; "" = one size, and plan.json holds neither of these two fields
    max_upscale: float = 2.0


@dataclass(frozen=True)
class ShardSurvey:
    """The shards that a CSV asks for. A process holds the rows and sidecars of its own shards only."""

    row_counts: dict[int, int]  # of every shard, by shard number, ascending
    finished: dict[int, ShardIndex]  # by shard number, without members
    unfinished: dict[int, list[Row]]  # by shard number
    size_counts: Counter[FrameSize] = field(default_factory=Counter)  # rows of all shards, if there are several sizes


def make_encoding_plan(config: EncodeConfig, model: Path) -> EncodingPlan:
    """The plan of a configuration and a local model folder."""
    encoder = EncoderInfo(
        vae=fingerprint_part(locate_part(model, "vae")),
        text_encoder=fingerprint_part(locate_part(model, "text_encoder")),
        tokenizer=fingerprint_part(locate_part(model, "tokenizer")),
        vae_dtype=config.vae_dtype,
        text_dtype=config.text_dtype,
        text_dim=read_text_width(model),
        negative_prompt=config.negative_prompt,
    )
    return EncodingPlan(  # the field names are those of plan.json and must stay
        MANY_SIZES_VERSION if config.frame_sizes else SCHEMA_VERSION,  # older versions must not continue it
        config.spec,
        encoder,
        config.shard_size,
        config.text_only,
        config.compile,
        config.batch_size,
        config.text_batch_tokens,
        config.hdr,
        config.untagged_hd,
        format_frame_sizes(config.frame_sizes),
        config.max_upscale,
    )


def check_data_set_folder(folder: Path) -> None:
    """Raise ValueError if the folder is a file or holds anything but a data set."""
    refuse_foreign_files(folder, lambda name: DATA_SET_FILES.fullmatch(name) is not None)


def check_plan(folder: Path, plan: EncodingPlan) -> EncodingPlan:
    """The plan of the data set that was begun in the folder, or else `plan`; ValueError naming their differences.

    They may differ in the fingerprints of a model that was saved again: the data set keeps its own.
    """
    path = folder / PLAN_FILE
    if not path.is_file():
        if (folder / shard_file_name(0)).exists():  # its settings are unknown
            raise ValueError(f"out={folder}: holds shards and no {PLAN_FILE}; give a new folder")
        return plan
    written = read_json(path, EncodingPlan)
    differences = list_differences(_flatten_fields(asdict(plan)), _flatten_fields(asdict(written)))
    if differences:
        raise ValueError(f"out={folder}: was begun with other settings: {'; '.join(differences)}; give a new folder")
    return written  # so that the manifest has the fingerprints of the plan


def write_plan(folder: Path, plan: EncodingPlan) -> None:
    """Write the plan of a data set."""
    fields = {name: value for name, value in asdict(plan).items() if plan.sizes or name not in SIZE_FIELDS}
    write_file(folder / PLAN_FILE, (json.dumps(fields, indent=1, ensure_ascii=False) + "\n").encode())


def describe_changes(folder: Path, rows: Sequence[Row], index: ShardIndex) -> str:
    """Which rows of a shard differ from those that it was encoded from, in words."""
    missing = index.shard.rows - len(rows)
    try:
        sources = read_sources(folder, index)
        changed = [row.line for row in rows[: index.shard.rows] if not _same_row(row, sources, index)]
    except (OSError, ValueError):  # the shard is damaged
        changed = []
    if changed:
        shown = ", ".join(map(str, changed[:MAX_SHOWN_LINES]))
        others = f" and {len(changed) - MAX_SHOWN_LINES} more" if len(changed) > MAX_SHOWN_LINES else ""
        return f"line{'s' if len(changed) > 1 else ''} {shown}{others} changed"
    if missing > 0:
        return f"rows after line {rows[-1].line} were removed ({missing})"
    return f"lines {rows[0].line} to {rows[-1].line} changed"


def read_sources(folder: Path, index: ShardIndex) -> dict[str, RecordSource]:
    """What the records of a shard say of their rows, by key; OSError or ValueError if its files are damaged."""
    complete = read_index(folder, index.shard.name)
    sources = {}
    with open_file(folder / index.shard.name) as file:
        for member in complete.members[1::2] if complete else ():
            file.seek(member.offset)
            key = member.name.removesuffix(f".{METADATA_SUFFIX}")
            sources[key] = parse_json(file.read(member.size), RecordSource, member.name)
    return sources


def _same_row(row: Row, sources: Mapping[str, RecordSource], index: ShardIndex) -> bool:
    """Whether a row is that of its record, or of a failure, whose prompt is not stored."""
    source = sources.get(row.key)
    if source is not None:
        prompt = clean_prompt(row.prompt)
        return (row.line, row.path, prompt, row.seed) == (source.line, source.path, source.prompt, source.seed)
    return any((row.line, row.path) == (failure.line, failure.path) for failure in index.failures)


def _flatten_fields(fields: dict[str, object]) -> dict[str, object]:
    """The fields with the names of nested ones joined, as `encoder.vae`."""
    flattened: dict[str, object] = {}
    for name, value in fields.items():
        nested = {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
        flattened |= nested
    return flattened


def read_finished_index(folder: Path, number: int, min_rows: int = 0) -> ShardIndex | None:
    """The sidecar of a finished shard, without its members; None if the shard is missing, damaged or too short."""
    name = shard_file_name(number)
    try:
        index = read_index(folder, name)
    except ValueError:  # the sidecar is damaged
        return None
    if index is None or index.shard.rows < min_rows or (folder / name).stat().st_size != index.shard.size:
        return None
    return replace(index, members=())  # a large data set has millions of members


@dataclass(frozen=True)
class DataSetFolder:
    """A data set that this process encodes, with its lock file open."""

    path: Path
    config: EncodeConfig
    plan: EncodingPlan
    lock: FolderLock

    def survey_rows(
        self, rows: Iterable[Row], *, assigned: range = range(0), broken_files: Collection[str] = ()
    ) -> ShardSurvey:
        """Give the rows their sizes, if there are several, and `survey_shards`; see there and `assign_sizes`."""
        sized = assign_sizes(self.config, rows, is_begun=(self.path / PLAN_FILE).is_file())
        shards = group_rows(sized, self.config.shard_size)
        if not self.config.frame_sizes:
            return self.survey_shards(shards, assigned=assigned, broken_files=broken_files)
        with self.lock.hold_briefly(PLAN_SLOT):  # one process reads the shapes of the files
            return self.survey_shards(shards, assigned=assigned, broken_files=broken_files)

    def survey_shards(
        self,
        shards: Iterable[tuple[int, list[Row]]],
        *,
        assigned: range = range(0),
        broken_files: Collection[str] = (),
    ) -> ShardSurvey:
        """Lock the assigned shards, then compare all sidecars but the broken ones with the rows of the CSV's shards.

        shards: (number, rows) of each shard.

        Raises ValueError if another process holds a shard, or if rows were changed or removed since they were encoded.
        """
        survey, row_counts = ShardSurvey({}, {}, {}), dict[int, int]()
        for number, rows in shards:
            if number in assigned:
                self.lock.hold(FIRST_SHARD_SLOT + number)
            is_broken = index_file_name(shard_file_name(number)) in broken_files
            index = None if is_broken else read_finished_index(self.path, number)
            if index is not None:
                self._check_rows_unchanged(rows, index)
            row_counts[number] = len(rows)
            if size := rows[0].video_size:
                survey.size_counts[size] += len(rows)
            if number not in assigned:  # its rows are not kept: a large CSV does not fit into every rank's memory
                continue
            if index is None or index.shard.rows < len(rows) or (self.config.retry_failures and index.failures):
                survey.unfinished[number] = rows
            else:
                survey.finished[number] = index
        survey.row_counts.update(sorted(row_counts.items()))
        # a shard beyond the last one would stay in the folder without being in the manifest
        if (self.path / shard_file_name(len(survey.row_counts))).exists():
            raise ValueError(
                f"data={self.config.data}: has fewer rows than {self.path} was made from; give a new folder"
            )
        return survey

    def _check_rows_unchanged(self, rows: list[Row], index: ShardIndex) -> None:
        if rows_digest(rows[: index.shard.rows]) != index.rows_sha256:
            raise ValueError(
                f"data={self.config.data}: {describe_changes(self.path, rows, index)} since {self.path} was begun; "
                "rows may only be added at the end: undo the change or give a new folder"
            )

    def restore_options(self) -> None:
        """Write the options of a data set again if their file is lost, damaged or contradicts the plan."""
        path = self.path / ENCODE_CONFIG_FILE
        try:
            check_options(read_file(path), plan_values(self.plan))
        except (OSError, ValueError):
            if (self.path / PLAN_FILE).is_file():
                with report_write_errors(self.path):
                    self._write_options()

    def _write_options(self) -> None:
        options = replace(self.config.with_absolute_paths, retry_failures=False)  # `repair` retries nothing
        write_config(self.path / ENCODE_CONFIG_FILE, options)

    def commit_plan(self, survey: ShardSurvey) -> None:
        """Write the plan and the options of a new data set, and mark the data set as incomplete."""
        with self.lock.hold_briefly(PLAN_SLOT), report_write_errors(self.path):
            check_plan(self.path, self.plan)  # another job may have begun the data set meanwhile
            if not (self.path / PLAN_FILE).is_file():
                self._write_options()
                write_plan(self.path, self.plan)
            (self.path / MANIFEST_FILE).unlink(missing_ok=True)
            if self.config.retry_failures:  # a shard without a sidecar is unfinished, also if this run is killed
                for number in survey.unfinished:
                    (self.path / index_file_name(shard_file_name(number))).unlink(missing_ok=True)

    def finish(self, row_counts: Mapping[int, int], known: dict[int, ShardIndex]) -> tuple[dict[int, ShardIndex], bool]:
        """Write `failures.csv` and the manifest if all shards and the negative prompt's embedding are finished.

        Returns the sidecars of the finished shards by number, and whether the data set is complete. Those that are not
        `known` belong to other processes, which may have replaced them since the survey, and are read here.
        """
        with self.lock.hold_briefly(MANIFEST_SLOT), report_write_errors(self.path):
            read = {
                number: known.get(number) or read_finished_index(self.path, number, rows)
                for number, rows in row_counts.items()
            }
            indices = {number: index for number, index in read.items() if index}
            if len(indices) < len(row_counts) or not (self.path / NEGATIVE_FILE).is_file():
                return indices, False
            failures = [failure for index in indices.values() for failure in index.failures]
            shards = tuple(index.shard for index in indices.values())
            manifest = make_manifest(self.plan.spec, self.plan.encoder, shards, len(failures))
            if not _is_manifest_written(self.path, manifest):  # an unchanged data set keeps its files and their times
                write_file(self.path / FAILURES_FILE, _failures_csv(failures))
                write_manifest(self.path, manifest, read_negative_embedding(self.path))
        return indices, True


def _is_manifest_written(folder: Path, manifest: Manifest) -> bool:
    try:
        written = read_manifest(folder)
    except ValueError:
        return False
    # the hash of the embedding is added only when the manifest is written
    return replace(written, negative_sha256="") == manifest and (folder / FAILURES_FILE).is_file()


def _failures_csv(failures: list[RowFailure]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["line", "path", "reason"])
    writer.writerows([failure.line, failure.path, failure.reason] for failure in failures)
    return text.getvalue().encode()
