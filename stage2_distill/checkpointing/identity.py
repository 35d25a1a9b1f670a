"""What a run is made of, and so when the same folder may be continued. Everything is compared by its content.

Data: the records of each data set (`Manifest.content_digest`), their order and their weights; their places may change.
Model: the fingerprint of the transformer; those of VAE and text encoder are the data set's. Its place may change, and
so may those of the LoRA files that are added to it, which are told by the digests of their bytes.
Recipe: the meaning of every option that is not in CHANGEABLE_OPTIONS; an option that the stored run lacks, because it
is newer, has its default. If other `iterations` would have changed learning rates that were used, a warning says so.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import get_type_hints

from common.files import refuse_foreign_files
from common.model_folder import same_fingerprint
from common.options import convert_value, read_yaml, rename_old_keys
from shards.mixture import draw_shares, parse_weight
from stage2_distill.checkpointing.format import (
    STUDENT_FILE,
    StudentFacts,
    file_damage,
    iteration_of,
    list_checkpoints,
    read_facts,
    read_index,
)
from stage2_distill.config import DistillConfig, parse_lengths
from stage2_distill.dmd.schedule import CRITIC, STUDENT, Schedule
from stage2_distill.monitoring.metrics_log import METRICS_FILE, complete_lines
from stage2_distill.weight_files.lora_files import split_weight

RUN_CONFIG_FILE = "distill.yaml"
CHANGEABLE_OPTIONS = {  # a run may be resumed with other values of these
    *("out", "iterations", "device", "batch_size", "model", "replicate"),
    # speed; of optimizer_form `resume.check_tensors` says whether it fits
    *("activation_checkpointing", "attention", "compile", "offload", "max_text_tokens", "optimizer_form"),
    *("wandb", "preview_every", "preview_count", "preview_data"),
    *("checkpoint_every", "async_checkpoint", "keep_last", "keep_every"),
}
Warn = Callable[[str], None]  # says one line
NEW_RUN = "begin another run in a new folder with --init-from"


def newest_facts(run: Path) -> tuple[Path, StudentFacts] | None:
    """The newest checkpoint of a run whose facts can be read, and those facts; None without one."""
    for checkpoint in reversed(list_checkpoints(run)):
        with suppress(ValueError):  # a damaged one, which is set aside later
            if file_damage(checkpoint / STUDENT_FILE, read_index(checkpoint)[STUDENT_FILE]) is None:
                return checkpoint, read_facts(checkpoint)
    return None


def stored_options(run: Path, newest: StudentFacts | None, *, warn: Warn) -> dict[str, object] | None:
    """The options of the run in a folder by their present names, without those that it lacks; None without a run.

    newest: facts of its newest checkpoint, whose options are used if there is one. A damaged distill.yaml is a warning.
    """
    path, written, problem = run / RUN_CONFIG_FILE, None, None
    try:
        written = read_yaml(str(path)) if path.exists() and path.stat().st_size else None
    except ValueError as error:
        problem = str(error)
    if newest is not None:
        if written is None:
            problem = problem or f"{path}: is missing or empty"
            warn(f"{problem}; the options in the checkpoint of iteration {newest.iteration} are used instead")
        return rename_old_keys(DistillConfig, newest.config)
    if problem is not None:
        raise ValueError(f"out={run}: holds a run whose options cannot be read ({problem}); use a new folder")
    return None if written is None else rename_old_keys(DistillConfig, written)


def check_run(
    run: Path, config: DistillConfig, facts: StudentFacts, schedule: Schedule, *, warn: Warn = lambda text: None
) -> bool:
    """Whether a folder holds a run of these options, data and model; False: no run, or one without any iteration.

    facts: what checkpoints of this command say. ValueError if it holds another run or other files.
    """
    newest = newest_facts(run)
    stored = stored_options(run, None if newest is None else newest[1], warn=warn)
    if stored is None:
        refuse_foreign_files(run, lambda name: name == f"{RUN_CONFIG_FILE}.partial")
        return False
    if newest is not None and config.init_from is None:  # a checkpoint needs no other weights to start from
        stored["init_from"] = None
    differences = recipe_differences(stored, config)
    if differences and (newest is not None or complete_lines(run / METRICS_FILE)):
        raise ValueError(
            f"out={run}: holds a run with other options: {'; '.join(differences)}; give its options, or {NEW_RUN} {run}"
        )
    if newest is not None:
        checkpoint, stored_facts = newest
        check_model(checkpoint, stored_facts, facts)
        check_loras(checkpoint, stored_facts, facts)
        check_data(checkpoint, stored_facts, facts)
        if (warning := rate_warning(checkpoint, stored_facts, schedule)) is not None:
            warn(warning)
    return not differences


def recipe_differences(stored: Mapping[str, object], config: DistillConfig) -> list[str]:
    """Options by which a configuration would make another run than the stored one, one phrase each."""
    hints, given = get_type_hints(DistillConfig), vars(config)
    # No default has changed so far. If one does, runs from before need the old one here.
    defaults = {item.name: item.default for item in fields(DistillConfig) if item.default is not MISSING}
    known = {name: convert_value(value, hints[name]) for name, value in stored.items() if name in hints}
    before = {name: known.get(name, defaults.get(name, value)) for name, value in given.items()}
    meaning, meaning_before = recipe_meaning(given), recipe_meaning(before)
    differences = [
        f"{name}: {plain(given[name])}, was {plain(before[name])}"
        for name, value in meaning.items()
        if value != meaning_before[name] and given[name] != before[name]
    ]
    newer = sorted(stored.keys() - hints.keys())
    return differences + [f"{name}: unknown to this version, was {stored[name]!r}" for name in newer]


def recipe_meaning(options: Mapping[str, object]) -> dict[str, object]:
    """What the options of a recipe decide: equal values mean the same computation."""
    meaning = {name: value for name, value in options.items() if name not in CHANGEABLE_OPTIONS}
    shards, source = options["shards"], options["init_from"]
    assert isinstance(shards, tuple), shards
    meaning["shards"] = draw_shares([parse_weight(text)[1] for text in shards])  # their records: `check_data`
    # the files: `check_loras`
    meaning["base_lora"] = [split_weight(text).weight for text in option_texts(options["base_lora"] or ())]
    meaning["lora_alpha"] = options["lora_alpha"] or options["lora_rank"]  # the default
    meaning["num_frames"] = parse_lengths(options["num_frames"])  # type: ignore[arg-type]
    meaning["init_from"] = None if source is None else Path(str(source)).resolve()
    return meaning


def plain(value: object) -> str:
    """An option's value as YAML and JSON show it."""
    return repr(list(value) if isinstance(value, tuple) else value)


def check_model(checkpoint: Path, stored: StudentFacts, facts: StudentFacts) -> None:
    """Raise ValueError if a checkpoint was made from another transformer."""
    if not same_fingerprint(stored.transformer, facts.transformer):
        raise ValueError(
            f"model={facts.base_model}: its transformer is not that of {checkpoint} (fingerprint {facts.transformer}, "
            f"was {stored.transformer}); use {stored.base_model}, or {NEW_RUN} {checkpoint.parent}"
        )


def check_loras(checkpoint: Path, stored: StudentFacts, facts: StudentFacts) -> None:
    """Raise ValueError if a checkpoint was made with other LoRA files on its base; earlier ones know their paths only.

    Their number and weights are the recipe's.
    """
    given, before = (
        [split_weight(text).path for text in option_texts(one.config.get("base_lora") or ())] for one in (facts, stored)
    )
    digests = stored.base_loras or [""] * len(before)
    for path, digest, path_before, digest_before in zip(given, facts.base_loras, before, digests, strict=True):
        if digest_before and digest != digest_before:
            raise ValueError(
                f"base_lora={path}: is not the file that {checkpoint} was made with (digest {digest}, was "
                f"{digest_before}, at {path_before}); give that one, or {NEW_RUN} {checkpoint.parent}"
            )
        if not digest_before and path.resolve() != path_before.resolve():
            raise ValueError(
                f"base_lora={path}: {checkpoint} does not say what was in {path_before}, so only that path is "
                f"accepted; give it, for example as a link, or {NEW_RUN} {checkpoint.parent}"
            )


def check_data(checkpoint: Path, stored: StudentFacts, facts: StudentFacts) -> None:
    """Raise ValueError if a checkpoint was trained on other records; checkpoints of 0.1 know their places only."""
    given, before = (option_texts(one.config.get("shards", ())) for one in (facts, stored))
    folders, folders_before = ([parse_weight(text)[0] for text in texts] for texts in (given, before))
    if not stored.data_sets:
        if [Path(one).resolve() for one in folders] == [Path(one).resolve() for one in folders_before]:
            return
        raise ValueError(
            f"shards={', '.join(given)}: {checkpoint} is of release 0.1, which stored only where its data set was: "
            f"{', '.join(before)}; give that path, for example as a link, or {NEW_RUN} {checkpoint.parent}"
        )
    if len(folders) != len(stored.data_sets):
        raise ValueError(
            f"shards={', '.join(given)}: {checkpoint} was trained on {len(stored.data_sets)} data sets "
            f"({', '.join(before)}); give the same ones, or {NEW_RUN} {checkpoint.parent}"
        )
    for folder, digest, digest_before in zip(folders, facts.data_sets, stored.data_sets, strict=True):
        if digest != digest_before:
            raise ValueError(
                f"shards={folder}: is not the data set that {checkpoint} was trained on (digest of its records "
                f"{digest}, was {digest_before}, at {', '.join(before)}); give that one, or {NEW_RUN} "
                f"{checkpoint.parent}"
            )


def option_texts(value: object) -> list[str]:
    """The strings of an option that JSON may have turned into a list."""
    return [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]


def rate_warning(checkpoint: Path, stored: StudentFacts, schedule: Schedule) -> str | None:
    """What to say if another number of iterations would have given completed ones other learning rates, else None."""
    iterations = int(str(stored.config.get("iterations", DistillConfig.iterations)))
    before, completed = replace(schedule, iterations=iterations), stored.iteration
    differing = (
        iteration
        for iteration in range(completed)
        for role in (STUDENT, CRITIC)
        if schedule.learning_rate(iteration, role) != before.learning_rate(iteration, role)
    )
    first = next(differing, None)
    if first is None or completed >= schedule.iterations:  # the latter: nothing is left to do
        return None
    earlier = [path.name for path in list_checkpoints(checkpoint.parent) if iteration_of(path) <= first]
    remedy = "no checkpoint from before them is kept"
    if earlier:
        remedy = (
            f"for the same numbers, stop, move the checkpoints after {earlier[-1]} elsewhere and repeat the command"
        )
    return (
        f"iterations={schedule.iterations}, was {iterations}: by lr_cooldown={schedule.lr_cooldown} the learning rates "
        f"of iterations {first} to {completed - 1} depend on it; they are done, so this run will differ from an "
        f"unbroken one; {remedy}"
    )
