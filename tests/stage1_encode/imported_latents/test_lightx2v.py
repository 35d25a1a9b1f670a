"""LightX2V's cache: lines and files that cannot be used fail alone, and nothing in a file is executed."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stage1_encode.encode import TooManyFailuresError, encode
from tests.stage1_encode.imported_latents.foreign_files import ForeignClip, configure, save_condition, write_cache
from tests.stage1_encode.test_encode import failures, records
from tests.tiny_models import TEXT_DIM

STEM = "sample_g000001_w000.pt"  # of the second clip

LINE = {"caption": "a", "condition_path": f"conditions/{STEM}"}


@pytest.fixture(scope="module")
def cache(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    draws = [(torch.randn(48, 3, 4, 6), torch.randn(3 + n, TEXT_DIM)) for n in range(3)]
    clips = [ForeignClip(f"prompt {n}", *pair, (torch.zeros(1), torch.ones(1))) for n, pair in enumerate(draws)]
    return write_cache(tmp_path_factory.mktemp("lightx2v") / "set", clips, model)


class Command:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch executed",)


def change_latents(content: object) -> Callable[[Path], None]:
    return lambda folder: torch.save(content, folder / "latents" / STEM)


def change_condition(content: object) -> Callable[[Path], None]:
    return lambda folder: torch.save(content, folder / "conditions" / STEM)


def cut(folder: Path) -> None:
    path = folder / "latents" / STEM
    path.write_bytes(path.read_bytes()[:-300])


def old_format(folder: Path) -> None:
    torch.save({"latents": torch.randn(48, 3, 4, 6)}, folder / "latents" / STEM, _use_new_zipfile_serialization=False)


def remove(folder: Path) -> None:
    (folder / "conditions" / STEM).unlink()


def change_line(text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        lines = (folder / "metadata.jsonl").read_text().splitlines()
        (folder / "metadata.jsonl").write_text("\n".join([lines[0], text, lines[2]]))

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (change_latents({"latents": torch.randn(16, 3, 8, 12)}), "^latents of 16 channels belong to Wan2.1 or a 14B"),
        (change_latents({"latents": torch.full((48, 3, 4, 6), float("inf"))}), "^the first frame holds NaN or inf"),
        (change_latents({"latents": torch.zeros(48, 3, 4, 6)}), "^the first frame holds only zeros$"),
        (change_latents({"latents": torch.ones(48, 3, 4, 6).int()}), f"^{STEM} holds no latents$"),
        (change_latents({"latents": torch.ones(48, 3, 4, 6).to_sparse()}), f"^{STEM} holds no latents$"),
        (change_latents({"latents": torch.ones(48, 3, 4, 6, device="meta")}), f"^{STEM} holds no latents$"),
        (change_latents({"latents": torch.ones(48, 3, 4, 6).to(torch.float8_e4m3fn)}), f"^{STEM} holds no latents$"),
        (change_latents([1, 2]), f"^{STEM} holds no latents$"),
        (change_latents({"latents": Command()}), f"^{STEM}: holds objects other than tensors"),
        (cut, f"^{STEM}: cannot be read as a file of torch.save"),
        (old_format, f"^{STEM}: cannot be read as a file of torch.save"),
        (change_condition({"conditions": {"video_context": torch.ones(3, 16)}}), f"^{STEM} holds no prompt_embed$"),
        (change_condition({"conditions": {"prompt_embed": torch.ones(3, 7)}}), r"^text is \(3, 7\)"),
        (change_condition({"conditions": {"prompt_embed": torch.zeros(512, 16)}}), "^the text holds only zeros$"),
        (remove, f"^the file {STEM} does not exist$"),
        (change_line("{"), "^the line is not an object of LightX2V's metadata$"),
        (change_line(json.dumps(LINE | {"video_latent_path": "latents"})), "^the file latents does not exist$"),
        (change_line(json.dumps(LINE | {"video_latent_path": "a" * 5000})), "^File name too long$"),
        (change_line(json.dumps(LINE | {"video_latent_path": "\0"})), "does not exist$"),
        (change_line('{"caption": 3}'), "^the line is not an object of LightX2V's metadata$"),
        (change_line('{"caption": "a", "video_latent_path": "x.pt"}'), "^no condition_path given$"),
        (change_line('{"caption": "a", "condition_path": "x.pt"}'), "^no video_latent_path given$"),
    ],
)
def test_a_clip_that_cannot_be_used_fails_alone(
    change: Callable[[Path], None],
    reason: str,
    cache: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    source = shutil.copytree(cache, tmp_path / "source")
    change(source)
    encode(configure(source, model, tmp_path / "set", max_failure_rate=0.5))
    (failure,) = failures(tmp_path / "set")
    assert failure["line"] == "2" and re.search(reason, failure["reason"]), failure
    assert str(tmp_path) not in failure["reason"]
    assert [record.key for record in records(tmp_path / "set")] == ["000000000", "000000002"]
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda text: {"positive": {"prompt_embed": text[None]}},
        lambda text: {"conditioning": {"condition": {"prompt_embed": text}}},
        lambda text: {"prompt_embed": text},
    ],
)
def test_all_forms_of_a_condition(
    wrap: Callable[[torch.Tensor], object], cache: Path, model: Path, tmp_path: Path
) -> None:
    """Those that LightX2V's reader accepts."""
    source, text = shutil.copytree(cache, tmp_path / "source"), torch.randn(4, TEXT_DIM).bfloat16()
    torch.save(wrap(text), source / "conditions" / STEM)
    torch.save(torch.full((48, 2, 4, 6), 0.5), source / "latents" / STEM)  # a tensor alone
    encode(configure(source, model, tmp_path / "set"))
    record = records(tmp_path / "set")[1]
    assert torch.equal(record.text, text) and torch.equal(record.first_frame, torch.full((48, 1, 4, 6), 0.5).bfloat16())


def test_metadata_of_several_ranks_and_prompts_alone(cache: Path, model: Path, tmp_path: Path) -> None:
    source = shutil.copytree(cache, tmp_path / "source")
    first, *others = (source / "metadata.jsonl").read_text().splitlines()
    (source / "metadata.jsonl").unlink()
    rows = [json.loads(line) | {"video_latent_path": ""} for line in others]
    (source / "metadata_rank01.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (source / "metadata_rank00.jsonl").write_text(first)
    encode(configure(source, model, tmp_path / "set", text_only=True))
    assert [record.source.prompt for record in records(tmp_path / "set")] == ["prompt 0", "prompt 1", "prompt 2"]
    assert [record.first_frame is None for record in records(tmp_path / "set")] == [False, True, True]
    by_file = configure(source / "metadata_rank00.jsonl", model, tmp_path / "one")
    assert encode(by_file).records == 1


def test_a_cache_of_another_size_ends_with_one_line(cache: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        TooManyFailuresError, match=r"3 of 3 rows failed.*first_frame is \(48, 1, 4, 6\).*\(48, 1, 6, 6\)"
    ):
        encode(configure(cache, model, tmp_path / "set", height=96))


def test_a_negative_prompt_by_file(cache: Path, model: Path, tmp_path: Path) -> None:
    save_condition(tmp_path / "mine.pt", "mine", torch.randn(2, TEXT_DIM))
    encode(configure(cache, model, tmp_path / "set", negative=str(tmp_path / "mine.pt")))
    assert '"negative_prompt": "mine"' in (tmp_path / "set" / "manifest.json").read_text()
