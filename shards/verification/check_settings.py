"""Checking `plan.json` and `encode.yaml`, with which `encode` continues and repairs a data set, against its manifest.

A data set may lack both, as readers need neither.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import yaml

from common.files import Count, parse_json
from common.video import FrameSize, VideoSpec
from shards.manifest import EncoderInfo, Manifest, list_differences
from shards.storage.open import Storage
from shards.verification.check_shard import DataProblem

PLAN_FILE, ENCODE_CONFIG_FILE = "plan.json", "encode.yaml"
SETTINGS_FILES = (PLAN_FILE, ENCODE_CONFIG_FILE)  # never deleted: the other files cannot be continued without them


@dataclass(frozen=True)
class StoredPlan:
    """The fields of `plan.json` that every version has written."""

    schema: Count
    spec: VideoSpec
    encoder: EncoderInfo
    shard_size: Count
    text_only: bool
    compile: bool
    batch_size: Count
    text_tokens: Count
    sizes: str = ""  # such as 704x1280,1280x704; "" = one size


def settings_problems(storage: Storage, manifest: Manifest) -> Iterator[DataProblem]:
    """What is wrong with the two files, if they exist."""
    expected = manifest_values(manifest)
    try:
        plan = parse_json(storage.read(PLAN_FILE, fresh=True), StoredPlan, "the plan")
        check_shard_size(plan, manifest)
        check_no_differences(settings_differences(manifest, plan.spec, plan.encoder, plan.sizes))
        expected = plan_values(plan)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        yield DataProblem(PLAN_FILE, "", f"{error}; verify --repair writes it again")
    try:
        check_options(bytes(storage.read(ENCODE_CONFIG_FILE, fresh=True)), expected)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        yield DataProblem(ENCODE_CONFIG_FILE, "", f"{error}; the same encode command writes it again")


def plan_values(plan: object) -> dict[str, object]:
    """The values of a plan by name, those of its nested records too."""
    values = {name: vars(value) if hasattr(value, "__dict__") else {name: value} for name, value in vars(plan).items()}
    return {name: value for part in values.values() for name, value in part.items()}


def check_shard_size(plan: StoredPlan, manifest: Manifest) -> None:
    """Raise ValueError if shards have other numbers of rows than the plan says; the last of a size may have fewer."""
    rows_by_size = defaultdict[object, list[int]](list)
    for shard in manifest.shards:
        rows_by_size[shard.video_size].append(shard.rows)
    for *full, last in rows_by_size.values():
        if any(rows != plan.shard_size for rows in full) or last > plan.shard_size:
            raise ValueError(
                f"says shard_size: {plan.shard_size}, but the shards have {', '.join(map(str, full[:3]))} rows"
            )


def settings_differences(manifest: Manifest, spec: VideoSpec, encoder: EncoderInfo, sizes: str) -> list[str]:
    """What the fields of a plan say otherwise than the manifest, a line each."""
    differences = list_differences(manifest_values(manifest), asdict(spec) | asdict(encoder))
    stated = {str(FrameSize(*shard.video_size)) for shard in manifest.shards if shard.video_size}
    is_contradicted = not stated <= set(sizes.split(","))
    return differences + [f"sizes: {sizes!r}, expected {','.join(sorted(stated))!r}"] * is_contradicted


def manifest_values(manifest: Manifest) -> dict[str, object]:
    """The values of spec and encoder by name, without height and width if the shards state theirs."""
    values = asdict(manifest.spec) | asdict(manifest.encoder)
    has_sizes = any(shard.video_size for shard in manifest.shards)
    return {name: value for name, value in values.items() if not has_sizes or name not in ("height", "width")}


def check_no_differences(differences: Sequence[str]) -> None:
    """Raise ValueError if there are differences."""
    if differences:
        raise ValueError(f"contradicts the data set: {'; '.join(differences)}")


def check_options(data: bytes, expected: Mapping[str, object]) -> None:
    """Raise ValueError if the bytes of `encode.yaml` are damaged, or hold another value of an option than expected."""
    try:
        options = yaml.safe_load(data.decode())
    except (ValueError, OverflowError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"is damaged: {' '.join(str(error).split())}") from error
    if not isinstance(options, dict) or not all(isinstance(options.get(name), str) for name in ("data", "model")):
        raise ValueError("is damaged: it must hold KEY: VALUE lines with data and model")
    stated = {name: value for name, value in expected.items() if name in options}
    check_no_differences(list_differences(stated, options))
