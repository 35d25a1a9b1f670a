"""What a run is made of is compared by its content: data, model and recipe."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from shards.dataset import open_data_set
from shards.mixture import open_data_sets
from stage2_distill.checkpointing.format import read_facts
from stage2_distill.checkpointing.identity import rate_warning, recipe_differences
from stage2_distill.config import DistillConfig
from stage2_distill.dmd.schedule import Schedule
from stage2_distill.sampling.student_source import trained_loras
from tests.stage2_distill.export.students import adapter_weights
from tests.stage2_distill.training_helpers import assert_same, make_config, make_shards, run_here, tensors
from tests.stage2_distill.weight_files.test_lora_files import peft
from tests.tiny_models import make_model

FAST = {"iterations": 2, "checkpoint_every": 2, "global_batch": 2, "keep_last": 9}


@pytest.fixture(scope="module")
def shards(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards") / "data", model)


@pytest.fixture(scope="module")
def other_shards(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards") / "data", model, records=16)


@pytest.fixture(scope="module")
def begun(model: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two iterations."""
    return run_here(make_config(shards, model, tmp_path_factory.mktemp("begun") / "run", **FAST)).parent


@pytest.fixture(scope="module")
def unbroken(model: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "run"
    return run_here(make_config(shards, model, out, **FAST | {"iterations": 3}))


def go_on(begun: Path, tmp_path: Path, shards: object, model: object, **changes: object) -> Path:
    """One iteration more of a copy of the run."""
    run = shutil.copytree(begun, tmp_path / "run")
    return run_here(make_config(shards, model, run, **FAST | {"iterations": 3} | changes))


def moved(shards: Path, tmp_path: Path) -> Path:
    return shutil.copytree(shards, tmp_path / "elsewhere")


def linked(shards: Path, tmp_path: Path) -> Path:
    (tmp_path / "link").symlink_to(shards)
    return tmp_path / "link"


def relative(shards: Path, tmp_path: Path) -> Path:
    return Path(os.path.relpath(shards))


@pytest.mark.parametrize(
    "place", [moved, linked, relative, lambda shards, _: f"{shards}/", lambda shards, _: f"{shards}:2"]
)
def test_the_same_records_elsewhere(
    place: Callable[[Path, Path], Path], begun: Path, unbroken: Path, shards: Path, model: Path, tmp_path: Path
) -> None:
    assert_same(go_on(begun, tmp_path, place(shards, tmp_path), model), unbroken)


def test_other_records_at_the_same_place(begun: Path, other_shards: Path, model: Path, tmp_path: Path) -> None:
    digests = [open_data_set(path).digests[0] for path in (other_shards, begun.parent / "none") if path.exists()]
    stored = read_facts(begun / "step-000002").data_sets[0]
    words = (
        rf"shards=.*: is not the data set that .*step-000002 was trained on .*{digests[0]}, was {stored}.*--init-from"
    )
    with pytest.raises(ValueError, match=words):
        go_on(begun, tmp_path, other_shards, model)
    assert yaml.safe_load((tmp_path / "run" / "distill.yaml").read_text())["iterations"] == 2, "nothing was written"


def test_mixtures(shards: Path, other_shards: Path, model: Path, tmp_path: Path) -> None:
    """Order, number and shares of the data sets decide the stream; their places and a common factor do not."""
    first, second = str(shards), str(other_shards)
    config = replace(make_config(shards, model, tmp_path / "run", **FAST), shards=(first, f"{second}:0.5"))
    run_here(config)
    config = replace(config, iterations=3)
    assert len(open_data_sets([first, second]).digests) == 2
    for texts, words in (
        ((f"{second}:0.5", first), r"shards: \["),
        ((second, f"{first}:0.5"), "is not the data set"),
        ((first, second), r"shards: \['.*'\], was \['.*:0.5'\]"),
        ((first,), "shards: "),
    ):
        with pytest.raises(ValueError, match=words):
            run_here(replace(config, shards=texts))
    run_here(replace(config, shards=(f"{moved(shards, tmp_path)}:2", f"{second}:1")))


def edit_facts(checkpoint: Path, **changes: object) -> None:
    """Rewrite student.json as another version would have written it, with its entry in index.json."""
    from stage2_distill.checkpointing.format import FileFacts

    path, index = checkpoint / "student.json", checkpoint / "index.json"
    facts = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in facts.items() if value is not None}))
    index.write_text(json.dumps(json.loads(index.read_text()) | {path.name: vars(FileFacts.read(path))}))


def test_checkpoints_of_the_last_release_know_the_place_only(
    begun: Path, unbroken: Path, shards: Path, model: Path, tmp_path: Path
) -> None:
    old = shutil.copytree(begun, tmp_path / "old")
    edit_facts(old / "step-000002", data_sets=None)
    elsewhere = moved(shards, tmp_path)
    with pytest.raises(ValueError, match=f"shards={elsewhere}: .* is of release 0.1, .* {shards}; give that path"):
        go_on(old, tmp_path, elsewhere, model)
    shutil.rmtree(tmp_path / "run")
    assert_same(go_on(old, tmp_path, linked(shards, tmp_path), model), unbroken)


def test_another_model(begun: Path, unbroken: Path, shards: Path, model: Path, tmp_path: Path) -> None:
    """Other weights are refused by name with both fingerprints; a model that was only saved again is the same."""
    other = shutil.copytree(model, tmp_path / "other")
    shutil.rmtree(other / "transformer")
    shutil.copytree(make_model(tmp_path / "made", seed=1) / "transformer", other / "transformer")
    with pytest.raises(ValueError, match=rf"model={other}: its transformer is not that of .* was .*use {model}"):
        go_on(begun, tmp_path, shards, other)
    shutil.rmtree(tmp_path / "run")
    again = shutil.copytree(model, tmp_path / "again")
    for part in ("vae", "text_encoder", "transformer"):
        path = again / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"_diffusers_version": "9", "_name_or_path": "x"}))
    assert_same(go_on(begun, tmp_path, shards, again), unbroken)


def test_options_that_a_run_lacks_have_their_default(
    begun: Path, unbroken: Path, shards: Path, model: Path, tmp_path: Path
) -> None:
    """A run made before an option existed, also without checkpoint; another value than the default is named."""
    old = shutil.copytree(begun, tmp_path / "old")
    options = yaml.safe_load((old / "distill.yaml").read_text())
    kept = {name: value for name, value in options.items() if name not in ("lr_cooldown", "first_frame_jitter")}
    (old / "distill.yaml").write_text(yaml.safe_dump(kept))
    edit_facts(old / "step-000002", config=kept)
    assert_same(go_on(old, tmp_path, shards, model), unbroken)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(ValueError, match=r"first_frame_jitter: 0.5, was 0.0; give its options, or .*--init-from"):
        go_on(old, tmp_path, shards, model, first_frame_jitter=0.5)
    shutil.rmtree(tmp_path / "run")
    shutil.rmtree(old / "step-000002")
    assert_same(go_on(old, tmp_path, shards, model), unbroken)


@pytest.mark.parametrize("content", [None, b"", b"seed: 5\nnum_fra", b"\xff\xfe", b"seed: {", b"[1]"])
def test_a_damaged_options_file_is_named(
    content: bytes | None, begun: Path, unbroken: Path, shards: Path, model: Path, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """The checkpoint's options are used instead; without one, a file that cannot be read is an error."""
    old = shutil.copytree(begun, tmp_path / "old")
    (old / "distill.yaml").unlink()
    if content is not None:
        (old / "distill.yaml").write_bytes(content)
    assert_same(go_on(old, tmp_path, shards, model), unbroken)
    assert "distill.yaml: " in caplog.text
    assert "the options in the checkpoint of iteration 2 are used instead" in caplog.text
    if content:
        shutil.rmtree(tmp_path / "run")
        shutil.rmtree(old / "step-000002")
        with pytest.raises(ValueError, match=f"out={tmp_path / 'run'}: holds a run whose options cannot be read"):
            go_on(old, tmp_path, shards, model)


def test_lora_files_of_the_base(shards: Path, model: Path, tmp_path: Path) -> None:
    """Told by their bytes: one that was moved is accepted, another one at the same path is refused."""
    file, other = tmp_path / "style.safetensors", tmp_path / "elsewhere" / "renamed.safetensors"
    other.parent.mkdir()
    save_file(peft(adapter_weights(model, 5, 2))[0], file)
    shutil.copy(file, other)

    def train(out: Path, path: Path, **changes: object) -> Path:
        lora = {"base_lora": (f"{path}:0.5",), "lora_rank": 2}
        return run_here(make_config(shards, model, out, **FAST | lora | changes))

    begun = train(tmp_path / "run", file).parent
    old = shutil.copytree(begun, tmp_path / "old")
    edit_facts(old / "step-000002", base_loras=None)  # as it was before there were digests
    longer = train(shutil.copytree(begun, tmp_path / "longer"), other, iterations=3)
    with pytest.raises(ValueError, match=rf"base_lora={other}: .*old/step-000002 does not say .*{file}"):
        train(old, other, iterations=3)
    assert_same(train(old, file, iterations=3), longer)
    save_file(peft(adapter_weights(model, 6, 2))[0], other)
    changed = rf"base_lora={other}: is not the file that .*step-000003 was made with \(digest .*, was .*, at {other}\)"
    with pytest.raises(ValueError, match=changed):
        train(longer.parent, other, iterations=4)
    with pytest.raises(ValueError, match=r"base_lora: \['.*:0.25'\], was \['.*:0.5'\]"):
        train(longer.parent, other, iterations=4, base_lora=(f"{file}:0.25",))
    with pytest.raises(ValueError, match=rf"base_lora={other}: has changed since the distillation"):
        trained_loras(read_facts(longer))


def options(**changes: object) -> DistillConfig:
    return DistillConfig(**({"shards": ("d",), "model": "m", "out": "o"} | changes))


@pytest.mark.parametrize(
    ("before", "now", "difference"),
    [
        ({}, {}, None),
        ({"out": "p", "model": "n", "iterations": 7, "keep_last": 1}, {}, None),
        ({"lora_rank": 4}, {"lora_rank": 4, "lora_alpha": 4.0}, None),
        ({"lora_rank": 4, "lora_alpha": 8}, {"lora_rank": 4}, "lora_alpha: None, was 8.0"),
        ({"lora_rank": 4}, {}, "lora_rank: 0, was 4"),
        ({"student_lr": "5e-7"}, {}, None),
        ({"ladder": [1000, 750, 500, 250]}, {}, None),
        ({"timesteps": [1000, 500]}, {}, "timesteps: [1000.0, 750.0, 500.0, 250.0], was [1000.0, 500.0]"),
        ({"init_from": "a/../b"}, {"init_from": "b"}, None),
        ({"init_from": "a"}, {"init_from": "b"}, "init_from: 'b', was 'a'"),
        ({"seed": None}, {}, "seed: 0, was None"),
        ({"seed": 2, "shift": 3.0}, {}, "seed: 0, was 2; shift: 5.0, was 3.0"),
        ({"of_a_later_version": 3}, {}, "of_a_later_version: unknown to this version, was 3"),
        ({"shards": "d"}, {}, None),
        ({"shards": ["d:0.5"]}, {}, None),
        ({"shards": ["a", "b:0.25"]}, {"shards": ("x:4", "y:1")}, None),
    ],
)
def test_recipe(before: dict[str, object], now: dict[str, object], difference: str | None) -> None:
    from common.options import rename_old_keys

    stored = rename_old_keys(DistillConfig, {"shards": ["d"], "model": "m", "out": "o"} | before)
    found = sorted(recipe_differences(stored, options(**now)), key=lambda text: text)
    assert "; ".join(found) == (difference or "")


def test_weights_that_a_run_started_from_are_needed_once(
    begun: Path, shards: Path, model: Path, tmp_path: Path
) -> None:
    run_here(make_config(shards, model, tmp_path / "run", init_from=str(begun), **FAST))
    config = make_config(shards, model, tmp_path / "run", **FAST | {"iterations": 3})
    with pytest.raises(ValueError, match="init_from: '.*', was"):
        run_here(replace(config, init_from=str(model)))
    run_here(config)


def test_iterations_after_a_cooldown(
    shards: Path, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Said, with the way to the numbers of an unbroken run, which is exact."""
    caplog.set_level(logging.INFO)
    cool = FAST | {"lr_cooldown": 2, "checkpoint_every": 1}
    run_here(make_config(shards, model, tmp_path / "run", **cool | {"iterations": 3}))
    assert "iterations=" not in caplog.text
    straight = run_here(make_config(shards, model, tmp_path / "straight", **cool | {"iterations": 5}))
    copied = shutil.copytree(tmp_path / "run", tmp_path / "copied")
    other = run_here(make_config(shards, model, tmp_path / "run", **cool | {"iterations": 5}))
    assert "iterations=5, was 3: by lr_cooldown=2 the learning rates of iterations 2 to 2 depend on it" in caplog.text
    assert "move the checkpoints after step-000002 elsewhere and repeat the command" in caplog.text
    name = "critic.proj_out.weight"
    assert not torch.equal(tensors(other)[name], tensors(straight)[name])
    shutil.move(copied / "step-000003", tmp_path / "moved")
    caplog.clear()
    assert_same(run_here(make_config(shards, model, copied, **cool | {"iterations": 5})), straight)
    assert "lr_cooldown" not in caplog.text
    assert f"resuming {copied} from step-000002, on {shards}: 2 of 5 iterations" in caplog.text


@pytest.mark.parametrize(
    ("completed", "before", "now", "first"),
    [(4, 4, 6, 2), (2, 2, 6, 0), (3, 9, 4, 2), (8, 9, 12, 7), (2, 9, 4, None),
     (9, 9, 4, None), (1, 4, 6, None), (6, 9, 12, None), (7, 9, 12, None)],
)  # fmt: skip
def test_iterations_whose_rates_would_be_others(
    completed: int, before: int, now: int, first: int | None, begun: Path
) -> None:
    """A cooldown of three: fewer iterations than planned change rates too, unless nothing is left to do."""
    facts = read_facts(begun / "step-000002")
    stored = replace(facts, iteration=completed, config=facts.config | {"iterations": before})
    schedule = Schedule.of(options(iterations=now, lr_cooldown=3), world=1)
    warning = rate_warning(begun / "step-000002", stored, schedule)
    if first is None:
        assert warning is None
    else:
        assert f"iterations={now}, was {before}" in warning
        assert f"of iterations {first} to {completed - 1} depend" in warning
        assert ("move the checkpoints after step-000002" if first >= 2 else "no checkpoint from before") in warning
