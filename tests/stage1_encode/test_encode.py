"""`encode`: content of records, equal bytes, resume, and errors of the user."""

import csv
import hashlib
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from transformers import AutoTokenizer, UMT5EncoderModel

from shards.manifest import read_manifest, read_negative_embedding
from shards.mixture import open_data_sets
from shards.record import Record, from_members, pad_text
from stage1_encode.config import EncodeConfig
from stage1_encode.encode import TooManyFailuresError, encode
from stage1_encode.media.first_frame import read_first_frame
from tests import tiny_models


def configure(data: Path, model: Path, out: Path, **options: object) -> EncodeConfig:
    base = EncodeConfig(
        str(data), str(model), str(out), 9, 64, 96, shard_size=4, text_dtype="float32", device="cpu", workers=1
    )
    return replace(base, **options)


def hashes(folder: Path) -> dict[str, str]:
    """Hash of each file that must be equal after two runs."""
    names = [path for path in sorted(folder.iterdir()) if path.name not in ("encode.yaml", "encode.lock")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in names}


def records(folder: Path) -> list[Record]:
    result = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            names = tar.getnames()
            data = {name: tar.extractfile(name).read() for name in names}
        for name in names[::2]:
            key = name.split(".")[0]
            result.append(from_members(key, data[f"{key}.safetensors"], data[f"{key}.json"]))
    return result


def failures(folder: Path) -> list[dict[str, str]]:
    with (folder / "failures.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_two_runs_give_equal_bytes(dataset: Path, clips: Path, model: Path, tmp_path: Path) -> None:
    encode(configure(clips / "clips.csv", model, tmp_path / "again"))
    again = hashes(tmp_path / "again")
    assert again == hashes(dataset)
    assert {"shard-000000.tar", "shard-000001.tar", "manifest.json", "negative.safetensors"} <= set(again)


def test_latents_are_the_normalised_mode_of_diffusers(dataset: Path, clips: Path, model: Path) -> None:
    vae = AutoencoderKLWan.from_pretrained(model / "vae")
    mean, std = (torch.tensor(v).view(1, 48, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    for index, record in enumerate(records(dataset)):
        frame = read_first_frame(str(clips / f"clip-{index}.mp4"), height=64, width=96)
        pixels = torch.from_numpy(frame.pixels.copy()).permute(2, 0, 1)[None, :, None] / 127.5 - 1
        with torch.no_grad():
            expected = (vae.encode(pixels).latent_dist.mode() - mean) / std
        assert record.first_frame.shape == (48, 1, 4, 6) and record.first_frame.dtype == torch.bfloat16
        torch.testing.assert_close(record.first_frame.float(), expected[0], rtol=2**-8, atol=1e-4)


def test_embeddings_are_those_of_the_wan_pipeline(dataset: Path, clips: Path, model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model / "tokenizer")
    text_encoder = UMT5EncoderModel.from_pretrained(model / "text_encoder")
    pipeline = WanPipeline(tokenizer, text_encoder, vae=None, scheduler=None, transformer=None)
    with (clips / "clips.csv").open() as file:
        prompts = [row["prompt"] for row in csv.DictReader(file)]
    negative = read_manifest(dataset).encoder.negative_prompt
    expected, _ = pipeline.encode_prompt(
        [*prompts, negative], do_classifier_free_guidance=False, max_sequence_length=512, device="cpu"
    )
    texts = [record.text for record in records(dataset)] + [read_negative_embedding(dataset)]
    for embedding, padded in zip(texts, expected, strict=True):
        assert padded[len(embedding) - 1].abs().sum() > 0  # the true rows, and no more
        torch.testing.assert_close(pad_text(embedding).float(), padded, rtol=2**-8, atol=1e-4)


def test_a_long_prompt_is_cut_to_512_tokens_with_the_end_token(clips: Path, model: Path, tmp_path: Path) -> None:
    table = tiny_models.write_csv(tmp_path / "long.csv", [(clips / "clip-0.mp4", "word " * 10_000)])
    encode(configure(table, model, tmp_path / "out"))
    (record,) = records(tmp_path / "out")
    assert record.text.shape == (512, tiny_models.TEXT_DIM)


def test_a_record_says_where_it_comes_from(dataset: Path) -> None:
    third = records(dataset)[2]
    assert third.key == "000000002"
    assert third.source.prompt == "A green triangle turns around, slowly, in front of a grey wall."
    assert (third.source.path, third.source.line, third.source.size) == ("clip-2.mp4", 4, (64, 96))
    assert records(dataset)[1].source.prompt == "A blue square falls & bounces."


def test_text_only_rows_and_seeds(clips: Path, model: Path, tmp_path: Path) -> None:
    rows = [("a", "", 7), ("b", clips / "clip-0.mp4", ""), ("c", "", "x")]
    table = tiny_models.write_csv(tmp_path / "prompts.csv", rows, ["prompt", "image", "seed"])
    report = encode(configure(table, model, tmp_path / "out", text_only=True, max_failure_rate=1.0))
    first, second = records(tmp_path / "out")
    assert first.first_frame is None and first.source.seed == 7 and first.source.path == ""
    assert second.first_frame is not None and second.source.seed is None
    assert report.failures == 1
    assert failures(tmp_path / "out") == [{"line": "4", "path": "", "reason": "seed 'x' is not a whole number"}]
    table = tiny_models.write_csv(tmp_path / "only.csv", [("a",)], ["prompt"])
    assert encode(configure(table, model, tmp_path / "only", text_only=True)).records == 1


def test_a_model_that_was_saved_again_continues_a_data_set(
    clips: Path, model: Path, dataset: Path, tmp_path: Path
) -> None:
    """Another version stamp changes no record; the finished data set has the bytes that the first model gives."""
    saved_again = shutil.copytree(model, tmp_path / "saved again")
    for part in ("vae", "text_encoder"):
        path = saved_again / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"_diffusers_version": "9", "_name_or_path": "x"}))
    shutil.copytree(dataset, tmp_path / "set")
    for name in ("manifest.json", "shard-000001.json", "shard-000001.tar"):
        (tmp_path / "set" / name).unlink()
    encode(configure(clips / "clips.csv", saved_again, tmp_path / "set"))
    assert hashes(tmp_path / "set") == hashes(dataset)
    encode(configure(clips / "clips.csv", saved_again, tmp_path / "other"))
    both = open_data_sets([str(dataset), str(tmp_path / "other")])  # can be mixed
    assert both.num_records == 12


def test_the_same_command_again_does_nothing(clips: Path, model: Path, dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset, tmp_path / "set")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").glob("*") if path.name != "encode.lock"}
    report = encode(configure(clips / "clips.csv", model, tmp_path / "set"))
    assert (report.records, report.shards, report.failures, report.is_complete) == (6, 2, 0, True)
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("lost", ["shard-000001.json", "shard-000001.tar", "manifest.json", "negative.safetensors"])
def test_only_what_is_missing_is_made_again(lost: str, clips: Path, model: Path, dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    shutil.copytree(dataset, out)
    (out / lost).unlink()
    (out / "shard-000001.tar.partial").write_bytes(b"half")
    first_mtime = (out / "shard-000000.tar").stat().st_mtime_ns
    encode(configure(clips / "clips.csv", model, out))
    repaired = hashes(out)
    repaired.pop("shard-000001.tar.partial", None)
    assert repaired == hashes(dataset)
    assert (out / "shard-000000.tar").stat().st_mtime_ns == first_mtime


def test_rows_added_at_the_end_are_encoded_alone(clips: Path, model: Path, tmp_path: Path) -> None:
    rows = [(clips / f"clip-{i}.mp4", f"prompt {i}") for i in range(6)]
    table = tmp_path / "rows.csv"
    tiny_models.write_csv(table, rows)
    encode(configure(table, model, tmp_path / "whole"))
    tiny_models.write_csv(table, rows[:5])
    encode(configure(table, model, tmp_path / "grown"))
    first_mtime = (tmp_path / "grown/shard-000000.tar").stat().st_mtime_ns
    tiny_models.write_csv(table, rows)
    report = encode(configure(table, model, tmp_path / "grown"))
    assert report.records == 6
    assert hashes(tmp_path / "grown") == hashes(tmp_path / "whole")
    assert (tmp_path / "grown/shard-000000.tar").stat().st_mtime_ns == first_mtime


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 96}, "spec.height: 64, expected 96"),
        ({"shard_size": 3}, "shard_size: 4, expected 3"),
        ({"batch_size": 3}, "batch_size: 8, expected 3"),
        ({"text_batch_tokens": 99}, "text_tokens: 8192, expected 99"),
        ({"vae_dtype": "bfloat16"}, "encoder.vae_dtype: 'tf32', expected 'bfloat16'"),
        ({"negative_prompt": "ugly"}, "encoder.negative_prompt"),
    ],
)
def test_changed_settings_are_refused(
    change: dict[str, object], message: str, clips: Path, model: Path, dataset: Path
) -> None:
    before = hashes(dataset)
    with pytest.raises(ValueError, match=message):
        encode(configure(clips / "clips.csv", model, dataset, **change))
    assert hashes(dataset) == before


def test_another_model_is_refused(clips: Path, dataset: Path, tmp_path: Path) -> None:
    other = tiny_models.make_model(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"encoder\.vae.*encoder\.text_encoder"):
        encode(configure(clips / "clips.csv", other, dataset))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda lines: [lines[0], "clip-0.mp4,another prompt", *lines[2:]], "line 2 changed"),
        (lambda lines: [*lines[:3], *(f"{line} more" for line in lines[3:5]), *lines[5:]], "lines 4, 5 changed"),
        (lambda lines: [*lines[:6], lines[6].replace("clip-5", "clip-4")], "line 7 changed"),
        (lambda lines: [lines[0], *lines[2:]], "lines 2, 3, 4, 5 changed"),
        (lambda lines: lines[:6], r"rows after line 6 were removed \(1\)"),
        (lambda lines: lines[:5], "fewer rows"),
    ],
    ids=["changed", "two changed", "another path", "removed first", "removed last", "removed shard"],
)
def test_a_changed_csv_is_refused(edit: object, message: str, clips: Path, model: Path, dataset: Path, tmp_path: Path):
    shutil.copytree(clips, tmp_path / "clips")
    table = tmp_path / "clips/clips.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join(edit(lines)) + "\n")
    with pytest.raises(ValueError, match=message):
        encode(configure(table, model, dataset))


def test_failed_rows_are_reported_and_the_rest_encoded(clips: Path, model: Path, tmp_path: Path) -> None:
    good, work = clips / "clip-0.mp4", tmp_path
    (work / "empty.mp4").touch()
    (work / "text.mp4").write_text("this is no video\n" * 100)
    (work / "cut.mp4").write_bytes(good.read_bytes()[:400])
    rows = [
        (good, "a"),
        ("missing.mp4", "b"),
        ("empty.mp4", "c"),
        ("text.mp4", "d"),
        ("cut.mp4", "e"),
        (good, "  "),
        ("", "g"),
        (good, "h"),
    ]
    table = tiny_models.write_csv(work / "rows.csv", rows)
    report = encode(configure(table, model, work / "out", max_failure_rate=1.0))
    assert (report.records, report.failures) == (2, 6)
    assert [record.key for record in records(work / "out")] == ["000000000", "000000007"]
    failed = failures(work / "out")
    assert [int(row["line"]) for row in failed] == [3, 4, 5, 6, 7, 8]
    reasons = ["does not exist", "is empty", "no readable video", "no readable video", "prompt is empty", "no video"]
    assert all(reason in row["reason"] for row, reason in zip(failed, reasons, strict=True)), failed
    with pytest.raises(TooManyFailuresError, match=r"6 of 8 rows .*max_failure_rate=0.05 allows: .*does not exist"):
        encode(configure(table, model, work / "out"))
    assert read_manifest(work / "out").failures == 6


def test_a_run_whose_first_rows_all_fail_stops_early(clips: Path, model: Path, tmp_path: Path) -> None:
    wrong = [(f"gone-{i}.mp4", "a") for i in range(7)] + [("", "b")] * 2 + [(clips / "clip-0.mp4", " ")]
    table = tiny_models.write_csv(tmp_path / "rows.csv", [*wrong, *[(clips / "clip-0.mp4", "good")] * 3])
    with pytest.raises(TooManyFailuresError) as raised:
        encode(configure(table, model, tmp_path / "out", shard_size=64, stop_after_failures=10))
    assert str(raised.value).startswith(
        "the first 10 rows all failed: 7 x does not exist; 2 x no video given; 1 x the prompt is empty; correct the CSV"
    )
    assert not list((tmp_path / "out").glob("shard-*"))
    for stop_after_failures in (11, 0):  # one row more succeeds; 0 = never
        out = tmp_path / f"out-{stop_after_failures}"
        config = configure(table, model, out, stop_after_failures=stop_after_failures, max_failure_rate=1.0)
        assert encode(config).records == 3


def test_a_success_before_many_failures_stops_nothing(clips: Path, model: Path, tmp_path: Path) -> None:
    rows = [(clips / "clip-0.mp4", "good"), *[("gone.mp4", "a")] * 20]
    table = tiny_models.write_csv(tmp_path / "rows.csv", rows)
    report = encode(configure(table, model, tmp_path / "out", stop_after_failures=5, max_failure_rate=1.0))
    assert (report.records, report.failures, report.reasons) == (1, 20, "20 x does not exist")


def test_progress_ends_with_all_rows(
    clips: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encode(configure(clips / "clips.csv", model, tmp_path / "out"))
    assert capsys.readouterr().err.splitlines()[-1].startswith("encode: 6/6, ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("", "is empty; needs a header line"),
        ("video,prompt\n", "has no rows"),
        ("file,caption\na,b\n", r"lacks the column video \(or path\) and prompt \(or text\); found file, caption"),
        ("video,caption\na,b\n", r"lacks the column prompt \(or text\); found video, caption"),
        ('video,prompt\na,"b\n', "line 2.*is a quote left open"),
    ],
)
def test_a_bad_csv_is_one_clear_line_and_writes_nothing(text: str, message: str, model: Path, tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    if text is not None:
        table.write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        encode(configure(table, model, tmp_path / "out"))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer"])
def test_a_model_without_a_part_is_refused(part: str, clips: Path, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / part)
    with pytest.raises(ValueError, match=f"{part}/.* is missing"):
        encode(configure(clips / "clips.csv", tmp_path / "model", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_plan_with_a_missing_field_is_refused(clips: Path, model: Path, tmp_path: Path) -> None:
    config = configure(clips / "clips.csv", model, tmp_path / "out")
    encode(config)
    plan = json.loads((tmp_path / "out/plan.json").read_text())
    del plan["shard_size"]
    (tmp_path / "out/plan.json").write_text(json.dumps(plan))
    with pytest.raises(ValueError, match="plan.json: is damaged .*missing required field `shard_size`"):
        encode(config)


@pytest.mark.parametrize("content", ["", "[]", '{"model_type": "clip_text_model", "hidden_size": 768}'])
def test_another_text_encoder_is_one_line_with_its_file(content: str, clips: Path, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model/text_encoder/config.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"^model=.*/text_encoder/config\.json: does not describe a UMT5 text encoder; .*$"
    ):
        encode(configure(clips / "clips.csv", tmp_path / "model", tmp_path / "out"))


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_model_that_does_not_load_leaves_no_plan(part: str, clips: Path, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    next((tmp_path / "model" / part).glob("*.safetensors")).write_bytes(b"cut")
    with pytest.raises(ValueError, match=rf"^model=.*/{part}: cannot be read: [^\n]*$"):
        encode(configure(clips / "clips.csv", tmp_path / "model", tmp_path / "out"))
    assert encode(configure(clips / "clips.csv", model, tmp_path / "out")).records == 6


def test_a_folder_with_something_else_is_refused(clips: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files \(thesis.txt\)"):
        encode(configure(clips / "clips.csv", model, tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(("options", "is_accepted"), [({}, True), ({"hdr": "refuse"}, False)])
def test_a_plan_of_an_earlier_version_has_the_defaults(
    options: dict[str, str], is_accepted: bool, clips: Path, model: Path, dataset: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(dataset, tmp_path / "set"))
    plan = json.loads((out / "plan.json").read_text())
    old = {name: value for name, value in plan.items() if name not in ("hdr", "untagged_hd")}
    assert len(old) == len(plan) - 2
    (out / "plan.json").write_text(json.dumps(old))
    config = configure(clips / "clips.csv", model, out, **options)
    if is_accepted:
        assert encode(config).records == 6
    else:
        with pytest.raises(ValueError, match="hdr: 'tonemap', expected 'refuse'"):
            encode(config)
