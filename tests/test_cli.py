"""The command line as a user meets it: the whole way on real clips, and one clear line for each mistake."""

import gc
import io
import json
import shutil
import subprocess
import sys
import tomllib
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import av
import numpy
import pytest
import torch
from PIL import Image

import cli
from commands import demo, evaluate
from commands.sample import write_prompt_csv
from common.options import resolve_config
from shards.latent_store import read_latents
from stage1_encode.media.rows import locate_file, read_shard_rows
from stage2_distill.sampling.config import SampleConfig
from tests.forked import run_python
from tests.tiny_models import make_model, picture, write_csv

ROOT = Path(__file__).parent.parent
SIZE = ["--num-frames", "9", "--height", "64", "--width", "96", "--fps", "12"]


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command in this process, which has torch loaded already."""
    out, err = io.StringIO(), io.StringIO()
    words = ["cli.py", *(str(argument) for argument in arguments)]
    with mock.patch.object(sys, "argv", words), redirect_stdout(out), redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            return subprocess.CompletedProcess(words, int(end.code or 0), out.getvalue(), err.getvalue())
    raise AssertionError("main ends with an exit code")


def test_a_mistake_in_a_process_of_its_own() -> None:
    """What `call` stands for: exit code 2 and one line, from the real process."""
    command = [sys.executable, "cli.py", "encode", "--data", "none.csv", "--model", "m", "--out", "o"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1


def test_a_command_is_imported_without_garbage_collection() -> None:
    """In a process of its own; in one that has torch, as here, nothing changes: its garbage must not be kept."""
    code = "assert not gc.isenabled(); import decimal\nassert gc.isenabled() and gc.get_freeze_count() > 1000"
    program = f"import gc, cli\nwith cli.unscanned_imports(): {code}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    frozen = gc.get_freeze_count()
    with cli.unscanned_imports():
        assert gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() == frozen


def works(*arguments: object) -> str:
    done = call(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refuses(*arguments: object, code: int = 2) -> str:
    """The one line on stderr that says what is wrong."""
    done = call(*arguments)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.lower().startswith("error")]
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.fixture(scope="module")
def run(model: Path, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set and a short run made by the commands themselves."""
    folder = tmp_path_factory.mktemp("way")
    works("encode", "--data", clips / "clips.csv", "--model", model, "--out", folder / "data", *SIZE)
    options = ["--iterations", 2, "--global-batch", 2, "--dtype", "float32", *SIZE]
    works("distill", "--shards", folder / "data", "--model", model, "--out", folder / "run", *options)
    Image.fromarray(picture(90, 160, seed=3)).save(folder / "first.png")
    return folder


def sample(run: Path, model: Path, out: Path, *more: object) -> str:
    return works(
        "sample", "--checkpoint", run / "run", "--model", model, "--out", out, "--dtype", "float32", *more
    )  # fmt: skip


def test_prompt_and_picture_become_a_video(run: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("fps: 12  # mine\n")
    options = ["--prompt", "a circle moves", "--image", run / "first.png", "--seed", 3]
    for name in ("one.mp4", "two.mp4"):
        assert sample(run, model, tmp_path / name, *options).strip() == str(tmp_path / name)
    with av.open(str(tmp_path / "one.mp4")) as file:
        stream = file.streams.video[0]
        assert (stream.codec.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 12)
        assert len(list(file.decode(stream))) == 9
    first, second = (read_latents(tmp_path / f"{name}.zarr", "sample", 0) for name in ("one", "two"))
    assert first.shape == (48, 3, 4, 6)
    assert first.numpy().tobytes() == second.numpy().tobytes(), "same seed, same bytes"
    sample(run, model, tmp_path / "three.mp4", *options[:-1], 4)
    assert not numpy.array_equal(first, read_latents(tmp_path / "three.zarr", "sample", 0))
    assert "prompt: a circle moves" in (tmp_path / "one.mp4.yaml").read_text()
    assert (tmp_path / "one.yaml").read_text() == "fps: 12  # mine\n"


@pytest.mark.parametrize(
    ("image", "found"),
    [
        ("https://host/a.png?x=1", "https://host/a.png?x=1"),
        ("a.png", str(Path.cwd() / "a.png")),
        ("/b/a.png", "/b/a.png"),
    ],
)
def test_an_image_may_be_a_web_address(image: str, found: str, tmp_path: Path) -> None:
    config = SampleConfig("c", "m", "o.mp4", prompt="p", image=image)
    table = Path(write_prompt_csv(tmp_path / "prompt.csv", config))
    (rows,) = read_shard_rows(table, shard_size=9, text_only=True)
    assert locate_file(table, rows[0].path) == found


def test_memory_24gb_of_the_last_release_is_16gb_now() -> None:
    required = {"checkpoint": "c", "model": "m", "out": "o.mp4", "prompt": "p"}
    assert resolve_config(SampleConfig, required | {"memory": "24gb"}).vram == "16gb"
    with pytest.raises(ValueError, match="vram=24gb: choose one of auto, full, 16gb, 12gb"):
        resolve_config(SampleConfig, required | {"vram": "24gb"})


def test_csv_of_prompts_becomes_a_folder(run: Path, model: Path, tmp_path: Path) -> None:
    write_csv(run / "p.csv", [("a", "first.png", 1), ("b", "", 2), ("a", "first.png", 1)], ("prompt", "image", "seed"))
    made = sample(run, model, tmp_path / "out", "--data", run / "p.csv", "--batch-size", 2).split()
    assert [Path(path).suffix for path in made] == [".mp4", ".mp4", ".mp4", ".png"]
    latents = [read_latents(tmp_path / "out" / "latents.zarr", "sample", row) for row in range(3)]
    assert numpy.allclose(latents[0], latents[2], atol=1e-5)  # padding differs
    assert not numpy.array_equal(latents[0], latents[1])
    sheet = Image.open(tmp_path / "out" / "contact.png")
    assert sheet.height > 3 * 64 * 0.9


def test_readme_makes_the_same_from_python(run: Path, model: Path, tmp_path: Path) -> None:
    """The lines of the README, as they stand there, but for the precision."""
    code = (ROOT / "README.md").read_text().split("```python\n")[2].split("```")[0]
    assert len(code.splitlines()) == 4
    table = write_csv(tmp_path / "prompts.csv", [("a", "first.png", 1)], ("prompt", "image", "seed"))
    shutil.copy(run / "first.png", tmp_path)
    sample(run, model, tmp_path / "wanted", "--data", table)
    (tmp_path / "RUN").symlink_to(run / "run")
    code = code.replace("data=", "dtype='float32', data=").replace("videos = ", f"MODEL = {str(model)!r}\nvideos = ")
    (tmp_path / "lines.py").write_text(code)
    run_python("lines.py", cwd=tmp_path).check_returncode()
    found, wanted = ((tmp_path / name / "000000000.mp4").read_bytes() for name in ("videos", "wanted"))
    assert found == wanted


def test_resolved_configuration_beside_every_output(run: Path) -> None:
    assert "shard_size" in (run / "data" / "encode.yaml").read_text()
    assert "guidance_scale: 7.0" in (run / "run" / "distill.yaml").read_text()
    facts = json.loads(next((run / "run").glob("step-*/student.json")).read_text())
    assert facts["config"]["student_lr"] == 5e-7


def test_yaml_then_options(run: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("seed: 3\nstudent_lr: 1.0e-4\niterations: 1\nglobal_batch: 1\ndtype: float32\n")
    options = ["--config", tmp_path / "c.yaml", "--student-lr", "2e-4", *SIZE]
    works("distill", "--shards", run / "data", "--model", model, "--out", tmp_path / "run", *options)
    resolved = (tmp_path / "run" / "distill.yaml").read_text()
    assert "seed: 3\n" in resolved
    assert "student_lr: 0.0002\n" in resolved
    assert "critic_lr: 1.0e-07\n" in resolved


def test_colons_are_parts_of_names_everywhere(
    clips: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names that FFmpeg, fsspec or zarr would take for a protocol, relative to the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("m:odel").symlink_to(model)
    names = ("a:b.mp4", "concat:x.mp4", "pipe:1", "file:c.mp4", "data:d,e.mp4")
    for number, name in enumerate(names):
        shutil.copy(clips / f"clip-{number}.mp4", name)
    Image.fromarray(picture(90, 160, seed=3)).save("http:p.png")
    write_csv(Path("file:t.csv"), [(name, "fine") for name in names])
    works("encode", "--data", "file:t.csv", "--model", "m:odel", "--out", "file:set", *SIZE)
    assert "5 records + 0 failures" in works("verify", "file:set")
    options = ["--iterations", 1, "--global-batch", 1, "--dtype", "float32", *SIZE]
    works("distill", "--shards", "file:set", "--model", "m:odel", "--out", "data:run", *options)
    options = ["--checkpoint", "data:run", "--model", "m:odel", "--dtype", "float32", "--image", "http:p.png"]
    assert works("sample", "--out", "12:30.mp4", "--prompt", "a", *options) == "12:30.mp4\n"
    works("decode", "--latents", "12:30.zarr", "--model", "m:odel", "--out", "out-12:30")
    assert {path.name for path in Path("out-12:30").iterdir()} == {"000000000.mp4", "contact.png", "decode.yaml"}


def test_mistakes_of_encode(model: Path, clips: Path, tmp_path: Path) -> None:
    def encode(table: Path, *more: object, out: Path = tmp_path / "out", code: int = 2) -> str:
        return refuses("encode", "--data", table, "--model", model, "--out", out, *SIZE, *more, code=code)

    assert "none.csv" in encode(tmp_path / "none.csv")
    columns = encode(write_csv(tmp_path / "c.csv", [("x", "y")], ("file", "caption")))
    assert all(word in columns for word in ("video", "prompt", "file", "caption"))
    assert "no rows" in encode(write_csv(tmp_path / "e.csv", []))
    assert "height=70" in encode(clips / "clips.csv", "--height", 70)
    assert "num_frames=10" in encode(clips / "clips.csv", "--num-frames", 10)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    assert "full" in encode(clips / "clips.csv", out=tmp_path / "full")
    half = make_model(tmp_path / "half")
    (half / "vae" / "config.json").unlink()
    assert "vae" in refuses("encode", "--data", clips / "clips.csv", "--model", half, "--out", tmp_path / "o", *SIZE)
    assert not (tmp_path / "o").exists()
    assert "no such option" in refuses("encode", "--colour", "red").lower()


def test_a_flipped_bit_is_named_and_mended(run: Path, model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run / "data", tmp_path / "data")
    tar = folder / "shard-000000.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:700] + bytes([whole[700] ^ 1]) + whole[701:])
    done = call("verify", folder)
    assert done.returncode == 1 and "broken: shard-000000.tar: 000000000.safetensors: hash differs" in done.stdout
    said = works("verify", folder, "--repair", "--model", model, "--sheet", tmp_path / "frames.png")
    assert "after the repair" in said and "0 problems" in said
    assert tar.read_bytes() == whole and Image.open(tmp_path / "frames.png").width > 96


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_one_line_in_every_command(run: Path, model: Path, clips: Path, tmp_path: Path) -> None:
    common = ["--model", model, "--out", tmp_path / "out", "--device", "cuda"]
    checkpoint = ["--checkpoint", run / "run"]
    for command in (
        ["encode", "--data", clips / "clips.csv", *SIZE],
        ["distill", "--shards", run / "data", *SIZE],
        ["sample", "--data", write_csv(tmp_path / "p.csv", [("a", "")], ("prompt", "image")), *checkpoint],
        ["evaluate", "--shards", run / "data", *checkpoint],
    ):
        assert "device=cuda: " in refuses(*command, *common)
    sample(run, model, tmp_path / "one.mp4", "--prompt", "a")
    assert "device=cuda: " in refuses("decode", "--latents", tmp_path / "one.zarr", *common)


def test_broken_rows_are_reported_and_the_rest_encoded(model: Path, clips: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video")
    good = [(clips / f"clip-{i}.mp4", "fine") for i in range(2)]
    bad = [("gone.mp4", "x"), ("empty.mp4", "x"), ("text.mp4", "x"), (clips / "clip-0.mp4", "  ")]
    table = write_csv(tmp_path / "c.csv", [*good, *bad])
    line = refuses("encode", "--data", table, "--model", model, "--out", tmp_path / "out", *SIZE, code=1)
    assert "4 of 6 rows failed" in line
    failures = (tmp_path / "out" / "failures.csv").read_text()
    assert [row.split(",")[0] for row in failures.splitlines()[1:]] == ["4", "5", "6", "7"]
    works("encode", "--data", table, "--model", model, "--out", tmp_path / "out", *SIZE, "--max-failure-rate", "0.7")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["shards"][0]["records"] == 2


def test_mistakes_of_distill(run: Path, model: Path, tmp_path: Path) -> None:
    def distill(shards: Path, *more: object) -> str:
        return refuses("distill", "--shards", shards, "--model", model, "--out", tmp_path / "run", *SIZE, *more)

    assert "does not exist" in distill(tmp_path / "none")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "encode.yaml").write_text("")
    assert "unfinished" in distill(tmp_path / "half")
    assert "height: 64, expected 96" in distill(run / "data", "--height", 96)
    assert "timesteps" in distill(run / "data", "--timesteps", "250,500")
    assert "must be int" in distill(run / "data", "--config", _yaml(tmp_path, "iterations: many"))
    assert "device=gpu" in distill(run / "data", "--config", _yaml(tmp_path, "device: gpu"))
    assert "unknown" in distill(run / "data", "--config", _yaml(tmp_path, "learning_rate: 1"))
    assert "global_batch=64" in distill(run / "data", "--batch-size", 3)
    assert not (tmp_path / "run").exists()


def _yaml(folder: Path, text: str) -> Path:
    (folder / "bad.yaml").write_text(text)
    return folder / "bad.yaml"


def test_mistakes_of_sample(run: Path, model: Path, tmp_path: Path) -> None:
    def mistake(*more: object, checkpoint: Path = run / "run", base: Path = model) -> str:
        return refuses("sample", "--checkpoint", checkpoint, "--model", base, *more)

    out = ["--out", tmp_path / "v.mp4"]
    assert "no checkpoint" in mistake("--prompt", "a", *out, checkpoint=tmp_path)
    assert "prompt is empty" in mistake("--prompt", " ", *out)
    empty = mistake("--prompt", "&nbsp;", *out, base=tmp_path / "none")
    assert empty == "error: prompt=&nbsp;: nothing is left after HTML is unescaped; describe the video"
    for name in ("v.avi", ".mp4"):
        with pytest.raises(ValueError, match=rf"^out=.*{name}: must end in .mp4 for a single video"):
            SampleConfig("c", "m", str(tmp_path / name), prompt="a")
    gone = mistake("--prompt", "a", "--image", tmp_path / "gone.png", *out)
    assert gone.endswith("gone.png: does not exist; name a picture or a video") and "line" not in gone
    (tmp_path / "text.png").write_text("no picture")
    assert "text.png" in mistake("--prompt", "a", "--image", tmp_path / "text.png", *out)
    assert "num_frames=10" in mistake("--prompt", "a", "--num-frames", 10, *out)
    assert "height=70" in mistake("--prompt", "a", "--height", 70, *out)
    assert "segments=0" in mistake("--prompt", "a", "--segments", 0, *out)
    wrong_seed = mistake("--prompt", "a", "--seed", -1, *out, base=tmp_path / "none")
    assert "seed=-1: must be between 0 and 999999999999999999" in wrong_seed
    assert "v.mp4: must be a folder" in mistake("--data", tmp_path / "e.csv", *out, base=tmp_path / "none")
    write_csv(tmp_path / "e.csv", [("a", ""), (" ", "x.png")], ("prompt", "image"))
    assert "line 3" in mistake("--data", tmp_path / "e.csv", "--out", tmp_path / "videos")
    other = make_model(tmp_path / "other", seed=1)
    assert "vae" in mistake("--prompt", "a", *out, base=other)
    half = shutil.copytree(model, tmp_path / "half")
    shutil.copytree(other / "transformer", half / "transformer", dirs_exist_ok=True)
    assert "its transformer is not the one of the distillation" in mistake("--prompt", "a", *out, base=half)
    assert "16gb" in mistake("--prompt", "a", *out, "--memory", "8gb")
    assert not (tmp_path / "v.mp4").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    write_csv(tmp_path / "p.csv", [("a", "")], ("prompt", "image"))
    assert "full" in mistake("--data", tmp_path / "p.csv", "--out", tmp_path / "full")


def test_json_of_verify_and_evaluate(run: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = json.loads(works("verify", run / "data", "--json"))
    assert (found["records"], found["problems"], found["spec"]["height"]) == (6, [], 64)
    assert found["value_summaries"]["text rms"]["median"] > 0
    broken = shutil.copytree(run / "data", tmp_path / "data")
    (broken / "shard-000000.tar").write_bytes(b"")
    done = call("verify", broken, "--json")
    assert done.returncode == 1 and json.loads(done.stdout)["problems"][0]["file"] == "shard-000000.tar"
    (tmp_path / "report.json").write_text('{"contestants": {}}\n')
    monkeypatch.setattr(evaluate, "evaluate_students", lambda config: tmp_path / "report.html")
    options = ["--checkpoint", run / "run", "--shards", run / "data", "--model", model, "--out", tmp_path / "o"]
    assert json.loads(works("evaluate", *options, "--json")) == {"contestants": {}}
    assert works("evaluate", *options) == f"{tmp_path / 'report.html'}\n"


def test_encode_and_sample_say_what_they_do(
    run: Path, model: Path, clips: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    options = ["encode", "--data", clips / "clips.csv", "--model", model, "--out", tmp_path / "data", *SIZE]
    works(*options, "--device", "cpu")
    assert [line for line in caplog.messages if line.startswith(f"encode: {clips / 'clips.csv'}, 6 rows in 1 shards")]
    _, device, time, output, stop, *_, end = caplog.messages
    assert device == "on 1 x the CPU" and stop.startswith("to stop: Ctrl-C or SIGTERM; finished shards stay")
    assert time == "6 rows to encode; this device is not in the table of speeds, so watch the progress"
    assert output.startswith(f"output: {tmp_path / 'data'}, about ") and " kB; " in output
    assert end.startswith("6 rows in ")
    caplog.clear()
    works(*options)
    assert not [line for line in caplog.messages if line.startswith("encode: ")]  # there was nothing to do
    sample(run, model, tmp_path / "one.mp4", "--prompt", "a", "--device", "cpu")
    text = "\n".join(caplog.messages)
    assert "sample: 1 videos of 9 x 64 x 96\non 1 x the CPU\nthis device is not in the table" in text
    assert f"output: {tmp_path / 'one.mp4'}, with latents of 13.8 kB; " in text and "\n1 videos in " in text


def test_another_ladder_must_be_said_explicitly(run: Path, model: Path, tmp_path: Path) -> None:
    """The checkpoint's ladder is used unless --timesteps is there; then two steps differ from four."""
    options = ["--prompt", "a", "--seed", 1]
    sample(run, model, tmp_path / "own.mp4", *options)
    sample(run, model, tmp_path / "same.mp4", *options, "--timesteps", "1000,750,500,250")
    sample(run, model, tmp_path / "two.mp4", *options, "--timesteps", "1000,500")
    own, same, two = (read_latents(tmp_path / f"{name}.zarr", "sample", 0) for name in ("own", "same", "two"))
    assert numpy.array_equal(own, same)
    assert not numpy.array_equal(own, two)


def test_version_is_that_of_the_project() -> None:
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert works("--version") == f"ti2v-distill {stated}\n"


def test_demo_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an installed package, away from the source; inside a clone it finds the example in the working directory."""
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "site-packages" / "commands" / "demo.py"))
    monkeypatch.chdir(tmp_path)
    message = refuses("demo", "--out", tmp_path / "demo")
    assert "demo: needs the folder examples/nano of the source" in message
    assert "clone the repository and run ti2v-distill demo in it" in message
    assert list(tmp_path.iterdir()) == []
    monkeypatch.chdir(ROOT)
    assert demo.find_example() == ROOT / "examples" / "nano"
