"""Fuzzing checkpoint folders and option values: ValueError or nothing."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from hypothesis import given
from hypothesis import strategies as st

from common.options import option_spec, read_yaml, resolve_config
from stage1_encode.config import DecodeConfig, EncodeConfig, VerifyConfig
from stage2_distill.checkpointing import format as checkpoints
from stage2_distill.checkpointing.writer import build_storage_writer
from stage2_distill.config import DistillConfig
from stage2_distill.evaluation.config import EvaluateConfig
from stage2_distill.model.lora import lora_settings
from stage2_distill.sampling.config import SampleConfig
from stage2_distill.turbo_config import translated_options
from tests.fuzz.strategies import JSON, TEXTS, fuzz_settings, mutated_bytes, mutated_json

OLD_FACTS = Path(__file__).parent.parent / "data/made_by_0_1/lora/step-000003/student.json"
TENSORS = {"student.a": torch.ones(3, 2), "ema.a": torch.ones(3, 2, dtype=torch.bfloat16)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one checkpoint, written as training writes it, and a choice of the best."""
    folder = tmp_path_factory.mktemp("fuzz") / "run"
    step = folder / "step-000003"
    dcp.save(TENSORS, storage_writer=build_storage_writer(step, TENSORS, 1), no_dist=True)
    shutil.copy(OLD_FACTS, step)
    index = {path.name: vars(checkpoints.FileFacts.read(path)) for path in step.iterdir()}
    checkpoints.write_json(step / "index.json", index)
    checkpoints.write_best(folder, "step-000003", distance=1.0, iteration=3)
    return folder


def try_run(folder: Path) -> None:
    """What resuming and sampling read of a run."""
    for step in checkpoints.list_checkpoints(folder):
        checkpoints.checkpoint_damage(step)
    with suppress(ValueError):
        checkpoint = checkpoints.resolve_checkpoint(folder)
        facts = checkpoints.read_facts(checkpoint)
        assert len(facts.sigmas) == len(facts.ladder)
        lora_settings(facts.config)
        checkpoints.stored_dtypes(checkpoint)
        checkpoints.load_checkpoint(checkpoint, {name: value.clone() for name, value in TENSORS.items()})


def test_the_run_is_sound(run: Path) -> None:
    step = checkpoints.resolve_checkpoint(run)
    assert checkpoints.checkpoint_damage(step) is None
    assert checkpoints.stored_dtypes(step) == {name: value.dtype for name, value in TENSORS.items()}
    loaded = {name: torch.zeros_like(value) for name, value in TENSORS.items()}
    checkpoints.load_checkpoint(step, loaded)
    assert all(value.eq(1).all() for value in loaded.values())


@fuzz_settings
@given(st.data())
def test_checkpoint_folder(run: Path, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = shutil.copytree(run, Path(temporary) / "run")
        path = data.draw(st.sampled_from(sorted(path for path in folder.rglob("*") if path.is_file())))
        old, changed = path.read_bytes(), mutated_bytes(path.read_bytes())
        if path.suffix != ".safetensors":
            changed |= mutated_json(json.loads(old)).map(lambda value: json.dumps(value).encode())
        else:
            end = 8 + int.from_bytes(old[:8], "little")
            header = mutated_json(json.loads(old[8:end])) | mutated_header(json.loads(old[8:end]))
            changed |= header.map(lambda value: with_header(json.dumps(value).encode(), old[end:]))
        path.unlink()
        if data.draw(st.integers(0, 9)):  # else it is missing
            path.write_bytes(data.draw(changed))
        try_run(folder)


@st.composite
def mutated_header(draw: st.DrawFn, header: dict[str, dict[str, str]]) -> dict[str, object]:
    """A header in which what torch's checkpoint stores about its parts is changed."""
    metadata = dict(header["__metadata__"])
    key = draw(st.sampled_from(sorted(metadata)))
    with suppress(ValueError):
        metadata[key] = json.dumps(draw(mutated_json(json.loads(metadata[key]))))
    return header | {"__metadata__": metadata}


def with_header(header: bytes, data: bytes) -> bytes:
    padded = header + b" " * (-len(header) % 8)
    return len(padded).to_bytes(8, "little") + padded + data


CONFIGS = [EncodeConfig, VerifyConfig, DecodeConfig, DistillConfig, SampleConfig, EvaluateConfig]
REQUIRED = {"data": "x.csv", "prompt": "a dog", "model": "m", "out": "o.mp4"}


def option_names(config: type) -> Iterator[str]:
    for item in fields(config):
        yield item.name
        if option_spec(item).old_name:
            yield option_spec(item).old_name


def required_options(config: type) -> dict[str, object]:
    """A value for each option without a default."""
    named = {item.name: REQUIRED.get(item.name, "x") for item in fields(config) if item.default is MISSING}
    return named | ({"prompt": "a dog"} if config is SampleConfig else {})


def choices(config: type) -> list[str]:
    return sorted({choice for item in fields(config) for choice in option_spec(item).choices})


@fuzz_settings
@given(st.data())
def test_option_values(data: st.DataObject) -> None:
    config = data.draw(st.sampled_from(CONFIGS))
    values = JSON | st.sampled_from(["", *choices(config)]) | st.integers(0, 100) | st.floats(0, 1)
    changed = data.draw(st.dictionaries(st.sampled_from(sorted(option_names(config))), values, min_size=1, max_size=3))
    with suppress(ValueError):
        resolve_config(config, required_options(config) | changed)
    if config is DistillConfig:
        with suppress(ValueError):
            translated_options(required_options(config) | changed)


@fuzz_settings
@given(st.data())
def test_option_files(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """The bytes of a YAML file: of any keys and values, or mutations of a valid one."""
    config = data.draw(st.sampled_from(CONFIGS))
    names, path = sorted(option_names(config)), tmp_path_factory.getbasetemp() / "fuzz.yaml"
    options = data.draw(st.dictionaries(st.sampled_from(names) | TEXTS, JSON, max_size=4))
    old = yaml.safe_dump(required_options(config) | options, allow_unicode=True).encode("utf-8", "surrogatepass")
    path.write_bytes(data.draw(st.just(old) | mutated_bytes(old)))
    with suppress(ValueError):
        resolve_config(config, required_options(config) | {"config": str(path)})
    with suppress(ValueError):
        read_yaml(str(path))
    if config is DistillConfig:
        with suppress(ValueError):
            translated_options({"config": str(path)})
