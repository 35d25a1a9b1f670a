"""What a command leaves behind: all of its results or what was there before; and which of several ranks writes."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from commands.evaluate import evaluate_students
from commands.sample import sample_videos
from common.files import FolderLock
from shards import latent_store
from shards.verification.verify import verify_data_set
from stage1_encode import repair
from stage1_encode.config import DecodeConfig, VerifyConfig
from stage1_encode.generation.decode import decode
from stage2_distill.evaluation import report
from stage2_distill.evaluation.config import EvaluateConfig
from stage2_distill.sampling.config import SampleConfig
from stage2_distill.sampling.student_sampler import StudentSampler
from tests.forked import run_python
from tests.stage2_distill import training_helpers
from tests.tiny_models import write_csv


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set and a short run."""
    folder = tmp_path_factory.mktemp("run")
    training_helpers.make_shards(folder / "data", model)
    config = training_helpers.make_config(
        folder / "data", model, folder / "run", iterations=1, student_update_interval=1
    )
    training_helpers.run_here(config)
    return folder / "run"


@pytest.fixture(scope="module")
def evaluation(run: Path, model: Path) -> EvaluateConfig:
    return EvaluateConfig(
        (str(run),), str(run.parent / "data"), str(model), "unset", num_records=5, seeds=(0, 1), teacher_steps=2,
        videos=1, report_videos=1, batch_size=2, dtype="float32", device="cpu",
    )  # fmt: skip


@pytest.fixture
def sampling(run: Path, model: Path, tmp_path: Path) -> SampleConfig:
    """Three rows of a CSV."""
    table = write_csv(tmp_path / "p.csv", [("a", 1), ("b", 2), ("c", 3)], ("prompt", "seed"))
    return SampleConfig(str(run), str(model), str(tmp_path / "out"), data=str(table), dtype="float32", device="cpu")


def snapshot(folder: Path) -> dict[str, bytes]:
    """The files of a folder, without those of unfinished work."""
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if "unfinished/" not in name}


def sample_nan(self: StudentSampler, records: list, seeds: list[int], segment: int = 0) -> torch.Tensor:
    return torch.full((len(records), *self.spec.latent_shape), torch.nan)


@pytest.mark.parametrize("mistake", ["a missing picture", "no number"])
def test_a_failed_video_leaves_the_earlier_one(
    mistake: str, sampling: SampleConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "videos" / "v.mp4"
    config = replace(sampling, out=str(out), data=None, prompt="a")
    assert sample_videos(config) == [out]
    before = snapshot(out.parent)
    assert sorted({name.split("/")[0] for name in before}) == ["v.mp4", "v.mp4.yaml", "v.zarr"]
    if mistake == "no number":
        monkeypatch.setattr(StudentSampler, "__call__", sample_nan)
    with pytest.raises(ValueError, match=r"gone\.png|not finite"):
        image = "gone.png" if mistake == "a missing picture" else None
        sample_videos(replace(config, prompt="b", seed=2, image=image))
    assert snapshot(out.parent) == before
    monkeypatch.undo()
    assert sample_videos(replace(config, seed=2)) == [out]
    after = snapshot(out.parent)
    assert after.keys() == before.keys() and all(after[name] != before[name] for name in ("v.mp4", "v.mp4.yaml"))
    assert len(list(out.parent.iterdir())) == 3


@pytest.mark.parametrize("mistake", ["a missing picture", "no number", "not one of the first rows"])
def test_failed_videos_leave_the_earlier_folder(
    mistake: str, sampling: SampleConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sample_videos(sampling)
    assert [path.name for path in files] == ["000000000.mp4", "000000001.mp4", "000000002.mp4", "contact.png"]
    assert all(path.is_file() and path.parent == tmp_path / "out" for path in files)
    before = snapshot(tmp_path / "out")
    rows = [("a", "", 5)] * (70 if mistake.startswith("not") else 1) + [("b", "gone.png", 6)]
    if mistake == "no number":
        monkeypatch.setattr(StudentSampler, "__call__", sample_nan)
        rows = rows[:1]
    table = write_csv(tmp_path / "q.csv", rows, ("prompt", "image", "seed"))
    with pytest.raises(ValueError, match=r"gone\.png|not finite"):
        sample_videos(replace(sampling, data=str(table)))
    assert snapshot(tmp_path / "out") == before
    assert not list(tmp_path.glob("out/unfinished/*.mp4"))


def test_the_same_command_works_after_one_that_was_killed(sampling: SampleConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    FolderLock(out).close()  # killed right at its start
    sample_videos(sampling)
    expected = snapshot(out)
    shutil.rmtree(out)
    FolderLock(out).close()  # killed while it moved its files
    (out / "unfinished" / "latents.zarr").mkdir(parents=True)
    for name in ("000000000.mp4", "000000001.mp4.partial"):
        (out / name).touch()
    sample_videos(sampling)
    (out / "000000001.mp4.partial").unlink()
    assert snapshot(out) == expected
    (out / "sample.yaml").unlink()
    (out / "letter.txt").touch()
    with pytest.raises(ValueError, match="holds other files"):
        sample_videos(sampling)


def test_failed_decoding_leaves_the_earlier_videos(sampling: SampleConfig, model: Path, tmp_path: Path) -> None:
    sample_videos(sampling)
    store = tmp_path / "out" / "latents.zarr"
    config = DecodeConfig(str(store), str(model), str(tmp_path / "decoded"), device="cpu")
    assert [path.name for path in decode(config)][-1] == "contact.png"
    before = snapshot(tmp_path / "decoded")
    assert before["000000001.mp4"] == (tmp_path / "out" / "000000001.mp4").read_bytes()
    shape = (1, *latent_store.describe_group(store, "sample").spec.latent_shape)
    latent_store.write_latents(store, "sample", [0], torch.zeros(shape))
    latent_store.write_latents(store, "sample", [2], torch.full(shape, torch.inf))
    with pytest.raises(ValueError, match="sample/000000002 is not finite"):
        decode(replace(config, columns=2))
    assert snapshot(tmp_path / "decoded") == before


def test_a_failed_evaluation_leaves_the_earlier_report(
    evaluation: EvaluateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(evaluation, out=str(tmp_path / "report"))
    page = evaluate_students(config)
    before = snapshot(page.parent)
    assert {"evaluate.yaml", "report.json", "report.html", "videos/teacher-seed-0/000.mp4"} <= before.keys()
    monkeypatch.setattr(report, "render_page", lambda *_: int("no page"))
    with pytest.raises(ValueError, match="no page"):
        evaluate_students(replace(config, report_videos=0))
    with pytest.raises(ValueError, match="judge="):
        evaluate_students(replace(config, judge=str(tmp_path / "gone.py")))
    after = snapshot(page.parent)
    assert all(after[name] == before[name] for name in ("evaluate.yaml", "report.json", "report.html"))


def test_sample_replaces_only_what_is_its_own(sampling: SampleConfig, tmp_path: Path) -> None:
    """Refused before a model is loaded: the checkpoint does not exist."""
    single = replace(sampling, data=None, prompt="a ball", out=str(tmp_path / "a.mp4"), checkpoint="gone")
    (tmp_path / "x.mp4").mkdir()
    (tmp_path / "y.zarr").mkdir()
    (tmp_path / "z").write_text("mine")
    for name, message in (
        ("x.mp4", "x.mp4: is a folder; give a file in it, such as .*/x.mp4/video.mp4"),
        ("y.mp4", "y.mp4: y.zarr beside it is not of an earlier sample; give another name"),
        ("z/a.mp4", "a.mp4: .*/z is a file; give a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            sample_videos(replace(single, out=str(tmp_path / name)))
    (tmp_path / "y.mp4.yaml").write_text("")  # of the earlier run
    with pytest.raises(ValueError, match="gone: "):
        sample_videos(replace(single, out=str(tmp_path / "y.mp4")))
    with pytest.raises(ValueError, match="data=.*gone.csv: No such file"):
        sample_videos(replace(sampling, data=str(tmp_path / "gone.csv"), checkpoint="gone"))
    assert not Path(sampling.out).exists()
    with pytest.raises(ValueError, match="data=.*none.csv: "):
        sample_videos(replace(sampling, data=str(write_csv(tmp_path / "none.csv", [], ("prompt",))), checkpoint="gone"))
    with pytest.raises(ValueError, match="z: is a file; give a folder"):
        sample_videos(replace(sampling, out=str(tmp_path / "z"), checkpoint="gone"))
    with pytest.raises(ValueError, match="z: is a file or below one; give a folder"):
        FolderLock(tmp_path / "z")


def test_evaluate_replaces_only_what_is_its_own(evaluation: EvaluateConfig, tmp_path: Path) -> None:
    config = replace(evaluation, out=str(tmp_path / "out"), checkpoint=("gone",))
    (tmp_path / "out" / "videos").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"out: holds other files \(videos\); give a new folder"):
        evaluate_students(config)
    (tmp_path / "out" / "evaluate.yaml").write_text("")  # of an earlier evaluation
    with pytest.raises(ValueError, match="gone: "):
        evaluate_students(config)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file: is a file; give a folder"):
        evaluate_students(replace(config, out=str(tmp_path / "file")))


def test_a_contact_sheet_is_replaced_at_once(
    run: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = VerifyConfig(model=str(model), sheet=str(tmp_path / "sheet.png"), device="cpu")
    data = verify_data_set(str(run.parent / "data"))
    assert repair.draw_contact_sheet(data, config) == tmp_path / "sheet.png"
    before = snapshot(tmp_path)
    monkeypatch.setattr(repair, "write_file", lambda *_: int("full"))
    with pytest.raises(ValueError, match="full"):
        repair.draw_contact_sheet(data, config)
    assert snapshot(tmp_path) == before


def flags(config: object) -> list[str]:
    """The options of a configuration as words of the command line."""
    values = {
        f"--{name.replace('_', '-')}": value for name, value in vars(config).items() if value not in (None, False)
    }
    words = []
    for flag, value in values.items():
        for part in value if flag == "--checkpoint" and isinstance(value, tuple) else (value,):
            words += [flag, ",".join(map(str, part)) if isinstance(part, tuple) else str(part)]
    return words


def test_two_ranks_make_what_one_makes(sampling: SampleConfig, evaluation: EvaluateConfig, tmp_path: Path) -> None:
    command = ["cli.py", "sample", *flags(sampling)]
    for done in (training_helpers.run_torchrun(command, 2), run_python(*command, ranks=2)):  # the second over the first
        assert done.returncode == 0, done.stderr
    both = snapshot(tmp_path / "out")
    sample_videos(replace(sampling, out=str(tmp_path / "alone")))
    alone = snapshot(tmp_path / "alone")
    assert {name for name in alone if name.endswith(".mp4")} == {name for name in both if name.endswith(".mp4")}
    expected = latent_store.read_latent_rows(tmp_path / "alone" / "latents.zarr", "sample", 0, 3)
    for rank in range(2):  # prompts are embedded in other batches, which round differently
        found = latent_store.read_latent_rows(tmp_path / "out" / f"latents-{rank}.zarr", "sample", 0, 2 - rank)
        assert torch.allclose(found, expected[rank::2], atol=1e-3)

    config = replace(evaluation, out=str(tmp_path / "report"))
    done = training_helpers.run_torchrun(["cli.py", "evaluate", *flags(config)], 2)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("sample teacher-seed-0: 3/3") == 1
    evaluate_students(replace(evaluation, out=str(tmp_path / "one")))
    stores = [tmp_path / name / "latents.zarr" for name in ("report", "one")]
    steps = latent_store.complete_groups(stores[0])
    assert steps == latent_store.complete_groups(stores[1])
    for step in steps:
        first, second = (latent_store.read_latent_rows(store, step, 0, 5) for store in stores)
        assert torch.equal(first, second), step


def test_ranks_report_one_error(sampling: SampleConfig, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").touch()
    done = training_helpers.run_torchrun(["cli.py", "sample", *flags(sampling)], 2)
    lines = [line for line in done.stderr.splitlines() if line.startswith(("error", "Traceback"))]
    assert done.returncode == 1 and len([line for line in lines if line.startswith("error")]) == 1, done.stderr
    assert lines[0].startswith(f"error: out={tmp_path / 'out'}: holds other files (letter.txt)")
