"""FastVideo's Parquet: rows that cannot be used are named, files that are no such files are refused."""

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pyarrow
import pyarrow.parquet
import pytest
import torch

from stage1_encode.encode import encode
from stage1_encode.imported_latents.fastvideo import FastVideoSource
from stage1_encode.models.vae import read_latent_statistics
from tests.stage1_encode.imported_latents.foreign_files import (
    ForeignClip,
    columns,
    configure,
    padded,
    parquet_rows,
    write_parquet,
)
from tests.stage1_encode.test_encode import failures, records
from tests.tiny_models import TEXT_DIM

ROWS = parquet_rows(
    [
        ForeignClip(
            f"prompt {n}", torch.randn(48, 3, 4, 6), torch.randn(3 + n, TEXT_DIM), (torch.zeros(1), torch.ones(1))
        )
        for n in range(3)
    ]
)


def change_second(**values: object) -> list[dict[str, object]]:
    return [ROWS[0], ROWS[1] | values, ROWS[2]]


def replace_tensor(name: str, tensor: torch.Tensor) -> list[dict[str, object]]:
    return change_second(**columns(name, tensor))


def with_value(value: float) -> torch.Tensor:
    latents = torch.randn(48, 3, 4, 6)
    latents[7, 0, 2, 3] = value
    return latents


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (replace_tensor("vae_latent", torch.randn(16, 3, 8, 12)), "latents of 16 channels belong to Wan2.1 or a 14B"),
        (replace_tensor("vae_latent", torch.randn(128, 3, 4, 6)), "latents of 128 channels, TI2V-5B has 48"),
        (replace_tensor("vae_latent", torch.randn(48, 4, 6)), "the latents have 3 dimensions"),
        (
            replace_tensor("vae_latent", torch.randn(48, 3, 6, 4)),
            r"first_frame is \(48, 1, 6, 4\).*expected \(48, 1, 4",
        ),
        (replace_tensor("vae_latent", with_value(float("nan"))), "the first frame holds NaN or infinity"),
        (replace_tensor("vae_latent", with_value(3.4e38)), "the first frame holds NaN or infinity"),
        (replace_tensor("text_embedding", torch.randn(3, 7)), r"text is \(3, 7\).*expected \(1..512, 16\)"),
        (replace_tensor("text_embedding", torch.zeros(3, TEXT_DIM)), "the text holds only zeros"),
        (replace_tensor("text_embedding", torch.randn(600, TEXT_DIM)), r"text is \(600, 16\)"),
        (change_second(vae_latent_bytes=b""), "vae_latent holds no latents"),
        (change_second(text_embedding_bytes=None), "the text embedding is missing"),
        (
            change_second(vae_latent_shape=[48, 3, 4, 7]),
            r"vae_latent is not what its columns say, .*'float32' and shape \[48, 3, 4, 7\]",
        ),
        (change_second(vae_latent_shape=[48, -3, 4, -6]), "vae_latent is not what its columns say"),
        (change_second(vae_latent_dtype="int8"), "vae_latent is not what its columns say, a tensor of dtype 'int8'"),
        (change_second(vae_latent_shape=None), "shape None"),
        (change_second(caption="  "), "the prompt is empty"),
    ],
)
def test_a_row_that_cannot_be_used_fails_alone(
    rows: list[dict[str, object]], reason: str, dataset: Path, model: Path, tmp_path: Path
) -> None:
    write_parquet(tmp_path / "source", rows)
    options = {"negative": str(dataset), "max_failure_rate": 0.5}
    encode(configure(tmp_path / "source", model, tmp_path / "set", **options))
    (failure,) = failures(tmp_path / "set")
    assert (failure["line"], failure["path"]) == ("2", "row 2 of worker_0/data_chunk_0.parquet")
    assert re.search(reason, failure["reason"]), failure
    assert [record.key for record in records(tmp_path / "set")] == ["000000000", "000000002"]


def test_padding_and_half_precision_change_nothing(dataset: Path, model: Path, tmp_path: Path) -> None:
    latents, text = torch.randn(48, 3, 4, 6).half(), torch.randn(5, TEXT_DIM)
    row = ROWS[0] | columns("vae_latent", latents) | columns("text_embedding", padded(text))
    encode(configure(write_parquet(tmp_path / "source", [row]), model, tmp_path / "set", negative=str(dataset)))
    (record,) = records(tmp_path / "set")
    assert torch.equal(record.text, text.bfloat16())
    statistics = read_latent_statistics(model)
    assert torch.equal(record.first_frame, ((latents[:, :1].float() - statistics.mean) / statistics.std).bfloat16())


def test_prompts_alone(dataset: Path, model: Path, tmp_path: Path) -> None:
    names = ("caption", "text_embedding_bytes", "text_embedding_shape", "text_embedding_dtype")
    write_parquet(tmp_path / "source", [{name: row[name] for name in names} for row in ROWS])
    config = configure(tmp_path / "source", model, tmp_path / "set", negative=str(dataset))
    with pytest.raises(ValueError, match="lacks columns that FastVideo writes: vae_latent_bytes.*; give --text-only"):
        encode(config)
    encode(replace(config, text_only=True))
    assert [record.first_frame for record in records(tmp_path / "set")] == [None] * 3


def test_latents_of_another_model_are_refused_at_once(dataset: Path, model: Path, tmp_path: Path) -> None:
    rows = [row | columns("vae_latent", torch.randn(16, 3, 8, 12)) for row in ROWS]
    source = write_parquet(tmp_path / "source", rows)
    with pytest.raises(ValueError, match=r"data=.*up to 3 fail: 3 x latents of 16 channels belong to Wan2\.1 or a 14B"):
        encode(configure(source, model, tmp_path / "set", negative=str(dataset)))
    assert not (tmp_path / "set").exists()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def another_table(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"image": ["x"], "caption": ["y"]}), path)


def no_rows(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(path).slice(0, 0), path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, r"^data=.*chunk_0.parquet: cannot be read as Parquet \(.*\); copy it again$"),
        (another_table, "lacks columns that FastVideo writes: text_embedding_bytes, .*; give files of its preproc"),
        (no_rows, "^data=.*: has no rows$"),
    ],
)
def test_files_that_are_not_usable_are_refused(
    change: Callable[[Path], None], message: str, dataset: Path, model: Path, tmp_path: Path
) -> None:
    source = write_parquet(tmp_path / "source", ROWS[:2])
    change(source / "worker_0" / "data_chunk_0.parquet")
    with pytest.raises(ValueError, match=message):
        encode(configure(source, model, tmp_path / "set", negative=str(dataset)))
    assert not (tmp_path / "set").exists()


def test_damage_within_a_file_costs_its_own_rows(dataset: Path, model: Path, tmp_path: Path) -> None:
    """The tensors of the first file are overwritten; its captions and the other file are whole."""
    source = write_parquet(tmp_path / "source", ROWS)
    path = source / "worker_0" / "data_chunk_0.parquet"
    metadata = pyarrow.parquet.ParquetFile(path).metadata.row_group(0)
    (column,) = (
        metadata.column(n)
        for n in range(metadata.num_columns)
        if metadata.column(n).path_in_schema == "vae_latent_bytes"
    )
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)
    encode(configure(source, model, tmp_path / "set", negative=str(dataset), max_failure_rate=1.0))
    assert [failure["line"] for failure in failures(tmp_path / "set")] == ["1", "2"]
    assert all(item["reason"].startswith("the Parquet file is damaged") for item in failures(tmp_path / "set"))
    assert [record.key for record in records(tmp_path / "set")] == ["000000002"]


def test_files_in_natural_order(tmp_path: Path) -> None:
    source = FastVideoSource(write_parquet(tmp_path, ROWS * 4, per_file=1))
    names = [row.path for row in source.read_rows(text_only=False)]
    assert names == [f"row 1 of worker_0/data_chunk_{n}.parquet" for n in range(12)]


def test_without_the_library_one_line_says_what_to_install(tmp_path: Path, model: Path, dataset: Path) -> None:
    source = write_parquet(tmp_path / "source", ROWS)
    with (
        mock.patch.dict(sys.modules, {"pyarrow": None, "pyarrow.parquet": None}),
        pytest.raises(ValueError, match=r"^data=.*; pip install 'ti2v-distill\[parquet\]'$"),
    ):
        encode(configure(source, model, tmp_path / "set", negative=str(dataset)))
