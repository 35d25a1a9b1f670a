"""`encode --from`: the records of FastVideo's and LightX2V's files are those of the same clips encoded here."""

import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from click.testing import CliRunner

from cli import cli
from shards.manifest import read_manifest, read_negative_embedding
from shards.mixture import open_data_sets
from shards.verification.verify import verify_data_set
from shards.writer import ShardIndex
from stage1_encode import executors
from stage1_encode.config import EncodeConfig
from stage1_encode.encode import encode
from stage1_encode.models import vae
from tests import tiny_models
from tests.stage1_encode.imported_latents.foreign_files import (
    NEGATIVE,
    ForeignClip,
    configure,
    embed,
    encode_clips,
    parquet_rows,
    save_condition,
    write_cache,
    write_parquet,
)
from tests.stage1_encode.test_encode import hashes, records
from tests.test_docs import ROOT, documented_commands

PAGE = ROOT / "docs" / "data.md"
ForeignFiles = Callable[[Path], Path]


@pytest.fixture(scope="module")
def foreign_clips(clips: Path, model: Path) -> list[ForeignClip]:
    return encode_clips(clips, model)


@pytest.fixture(scope="module")
def parquet(foreign_clips: list[ForeignClip], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parquet(tmp_path_factory.mktemp("fastvideo") / "set", parquet_rows(foreign_clips))


@pytest.fixture(scope="module")
def cache(foreign_clips: list[ForeignClip], model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("lightx2v") / "set", foreign_clips, model)


@pytest.mark.parametrize("program", ["parquet", "cache"])
def test_records_are_those_of_the_clips_encoded_here(
    program: str, request: pytest.FixtureRequest, dataset: Path, model: Path, tmp_path: Path
) -> None:
    """Raw latents are normalized, normalized ones not again; frame 0 of a whole clip is the first frame's latent."""
    source, out = request.getfixturevalue(program), tmp_path / "set"
    refuse = mock.Mock(side_effect=AssertionError("no model is loaded"))
    with mock.patch("stage1_encode.pipeline.load_encoders", refuse), mock.patch.object(vae, "load_vae", refuse):
        report = encode(configure(source, model, out, negative=str(dataset)))
    assert (report.records, report.failures, report.shards, report.is_complete) == (6, 0, 2, True)
    assert report.notes[0].records == 6 and "--model states" in report.notes[0].note
    for record, own in zip(records(out), records(dataset), strict=True):
        assert record.source.prompt == own.source.prompt
        assert record.first_frame.dtype == torch.bfloat16
        torch.testing.assert_close(record.first_frame.float(), own.first_frame.float(), rtol=2**-7, atol=1e-3)
        torch.testing.assert_close(record.text.float(), own.text.float(), rtol=2**-7, atol=1e-4)  # without padding
    assert not verify_data_set(str(out)).problems
    manifest, own_manifest = read_manifest(out), read_manifest(dataset)
    assert manifest.encoder.vae == own_manifest.encoder.vae
    assert torch.equal(read_negative_embedding(out), read_negative_embedding(dataset))
    assert manifest.encoder.negative_prompt == own_manifest.encoder.negative_prompt


def test_stated_alike_it_mixes_with_own_data(cache: Path, dataset: Path, model: Path, tmp_path: Path) -> None:
    encode(configure(cache, model, tmp_path / "set", negative=str(dataset), text_dtype="float32"))
    assert open_data_sets([str(dataset), str(tmp_path / "set")]).num_records == 12


def test_negative_prompt_of_the_cache(cache: Path, model: Path, tmp_path: Path) -> None:
    encode(configure(cache, model, tmp_path / "set"))
    assert read_manifest(tmp_path / "set").encoder.negative_prompt == NEGATIVE
    assert torch.equal(read_negative_embedding(tmp_path / "set"), embed(model, NEGATIVE).bfloat16())
    with pytest.raises(ValueError, match=f"negative_prompt=ugly: is not that of the embedding, '{NEGATIVE}'"):
        encode(configure(cache, model, tmp_path / "other", negative_prompt="ugly"))


@pytest.mark.parametrize("lost", ["shard-000001.json", "manifest.json", "negative.safetensors"])
def test_resumes_with_equal_bytes(lost: str, cache: Path, model: Path, tmp_path: Path) -> None:
    """Also from a copy of the files elsewhere."""
    encode(configure(cache, model, tmp_path / "set"))
    before = hashes(tmp_path / "set")
    (tmp_path / "set" / lost).unlink()
    moved = shutil.copytree(cache, tmp_path / "moved")
    encode(configure(moved, model, tmp_path / "set"))
    assert hashes(tmp_path / "set") == before


def test_repairs_and_grows(
    parquet: Path, foreign_clips: list[ForeignClip], dataset: Path, model: Path, tmp_path: Path
) -> None:
    source, options = tmp_path / "source", {"negative": str(dataset)}
    write_parquet(source, parquet_rows(foreign_clips[:4]))
    encode(configure(source, model, tmp_path / "set", **options))
    first = (tmp_path / "set" / "shard-000000.tar").stat().st_mtime_ns
    write_parquet(source, parquet_rows(foreign_clips))
    assert encode(configure(source, model, tmp_path / "set", **options)).records == 6
    assert (tmp_path / "set" / "shard-000000.tar").stat().st_mtime_ns == first
    encode(configure(parquet, model, tmp_path / "whole", **options))
    assert hashes(tmp_path / "set") == hashes(tmp_path / "whole")
    tar = tmp_path / "set" / "shard-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-600])
    result = CliRunner().invoke(cli, ["verify", str(tmp_path / "set"), "--repair", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert hashes(tmp_path / "set") == hashes(tmp_path / "whole")


def test_changed_captions_are_refused(
    foreign_clips: list[ForeignClip], cache: Path, model: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(cache, tmp_path / "source")
    encode(configure(source, model, tmp_path / "set"))
    table = source / "metadata.jsonl"
    table.write_text(table.read_text().replace("Yellow", "Red"))
    with pytest.raises(ValueError, match="line 4 changed since"):
        encode(configure(source, model, tmp_path / "set"))


def test_documented_command_and_one_iteration_of_training(
    parquet: Path, dataset: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands of docs/data.md as they stand; then `distill` trains on what the first one made."""
    monkeypatch.chdir(tmp_path)
    for name, target in (("MODEL", model), ("OWN_DATA", dataset), ("data/crush-smol_processed_ti2v", parquet)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(target)
    (tmp_path / "size.yaml").write_text("num_frames: 9\nheight: 64\nwidth: 96\nfps: 24\n")
    commands = [words for words in documented_commands(PAGE) if "--from" in words]
    assert len(commands) == 1
    small = {"iterations": 1, "batch-size": 2, "global-batch": 2, "critic-warmup": 0, "student-update-interval": 1}
    flags = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    paths = ["--shards", "IMPORTED", "--model", "MODEL", "--out", "RUN"]
    commands.append(["distill", *paths, *flags, "--device", "cpu", "--dtype", "float32"])
    for words in commands:
        result = CliRunner().invoke(cli, [*words, "--config", "size.yaml"], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    assert read_manifest(tmp_path / "IMPORTED").records == 6
    assert (tmp_path / "RUN" / "step-000001" / "student.json").is_file()


def no_negative(folder: Path) -> None:
    (folder / "negative_condition.pt").unlink()


def nameless_negative(folder: Path) -> None:
    save_condition(folder / "negative_condition.pt", "", torch.ones(3, tiny_models.TEXT_DIM))


def narrow_negative(folder: Path) -> None:
    save_condition(folder / "negative_condition.pt", "bad", torch.ones(3, 5))


def damaged_negative(folder: Path) -> None:
    (folder / "negative_condition.pt").write_bytes(b"no pickle")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_negative, "data=.*: holds no embedding of a negative prompt; give --negative DATA"),
        (nameless_negative, "negative=.*: does not state its prompt"),
        (narrow_negative, "negative=.*: is 3 x 5, not an embedding of 16 columns"),
        (damaged_negative, "negative=.*: negative_condition.pt: .*; give a data set"),
    ],
)
def test_a_negative_prompt_that_is_not_known_is_refused(
    change: Callable[[Path], None], message: str, cache: Path, model: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(cache, tmp_path / "source")
    change(source)
    with pytest.raises(ValueError, match=message):
        encode(configure(source, model, tmp_path / "set"))
    assert not (tmp_path / "set").exists()


def test_a_negative_prompt_of_another_text_encoder_is_refused(cache: Path, dataset: Path, tmp_path: Path) -> None:
    other = tiny_models.make_model(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"negative=.*: was embedded with another text_encoder than model=.*other has"):
        encode(configure(cache, other, tmp_path / "set", negative=str(dataset)))


@pytest.mark.parametrize("name", ["compile", "hdr", "engine"])
def test_options_without_an_effect_are_refused(name: str, cache: Path, model: Path, tmp_path: Path) -> None:
    value = {"compile": True, "hdr": "refuse", "engine": "ray"}[name]
    with pytest.raises(ValueError, match=f"^{name}={value}: has no effect"):
        encode(configure(cache, model, tmp_path / "set", **{name: value}))


def test_other_folders_and_a_csv_with_a_negative_are_refused(
    cache: Path, clips: Path, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="data=.*: is a folder without Parquet files of FastVideo"):
        encode(configure(clips, model, tmp_path / "set"))
    with pytest.raises(ValueError, match="negative=.*: is no finished data set"):
        encode(configure(cache, model, tmp_path / "set", negative=str(clips)))
    with pytest.raises(ValueError, match="negative=x: goes with --from"):
        encode(configure(clips / "clips.csv", model, tmp_path / "set", negative="x"))


def test_both_names_of_the_option_are_refused(cache: Path, clips: Path) -> None:
    words = ["encode", "--data", str(clips / "clips.csv"), f"--from={cache}", "--model", "x", "--out", "y"]
    result = CliRunner().invoke(cli, words)
    assert str(result.exception) == "data: --data and --from are the same option; give one of them"


def test_a_stopped_import_goes_on(cache: Path, model: Path, tmp_path: Path) -> None:
    encode(configure(cache, model, tmp_path / "whole", shard_size=2))
    original, calls = executors.save_shard, list[int]()

    def stop_at_second(config: EncodeConfig, number: int, *rest: object) -> ShardIndex:
        calls.append(number)
        if number == 1:
            raise KeyboardInterrupt
        return original(config, number, *rest)

    config = configure(cache, model, tmp_path / "set", shard_size=2)
    with mock.patch.object(executors, "save_shard", stop_at_second), pytest.raises(KeyboardInterrupt):
        encode(config)
    with pytest.raises(ValueError, match="is unfinished"):
        read_manifest(tmp_path / "set")
    calls.clear()
    with mock.patch.object(executors, "save_shard", lambda *args: calls.append(args[1]) or original(*args)):
        encode(config)
    assert calls == [1, 2]
    assert hashes(tmp_path / "set") == hashes(tmp_path / "whole")


def test_missing_files_are_retried(cache: Path, model: Path, tmp_path: Path) -> None:
    source = shutil.copytree(cache, tmp_path / "source")
    (path,) = source.glob("latents/*0001_*")
    path.rename(tmp_path / "aside")
    report = encode(configure(source, model, tmp_path / "set", max_failure_rate=0.5))
    assert report.reasons == "1 x the file sample_g000001_w000.pt does not exist"
    (tmp_path / "aside").rename(path)
    assert encode(configure(source, model, tmp_path / "set", retry_failures=True)).records == 6
    encode(configure(cache, model, tmp_path / "whole"))
    assert hashes(tmp_path / "set") == hashes(tmp_path / "whole")
