"""Make the data files of this folder with the code of commit f7ecdb0 (version 0.1.0).

    git worktree add ../old f7ecdb0
    OMP_NUM_THREADS=1 python tests/data/made_by_0_1/make.py ../old

All commands run in a temporary folder with relative paths, so the stored options contain no absolute path.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import diffusers
import numpy
import torch
import zarr
from facts import digest, group_digests, machine
from PIL import Image
from safetensors.torch import load, load_file, save_file

FOLDER = Path(__file__).resolve().parent
COMMIT = "f7ecdb0"
PARTS = ("model", "clips", "data", "standard", "compact", "lora", "prompts.csv", "first.png", "options", "expected")
SMALLER = {  # than the model of tests/tiny.py, so that this folder stays small
    "transformer": (diffusers.WanTransformer3DModel, {"attention_head_dim": 6, "ffn_dim": 24}),
    "vae": (diffusers.AutoencoderKLWan, {"base_dim": 2, "decoder_base_dim": 2, "dim_mult": [1, 1, 2, 2]}),
}
SIZE = "--num-frames 9 --height 64 --width 96 --fps 12"
TRAINING = (
    f"--shards data --model model {SIZE} --student-lr 1e-3 --critic-lr 2e-3 --guidance-scale 3 "
    "--ema-start 1 --ema-decay 0.9 --batch-size 2 --global-batch 4 --text-rows 80 --seed 3 --device cpu"
)
ENCODE = (
    f"encode --data clips/clips.csv --model model --out data {SIZE} --shard-size 4 --text-dtype float32 "
    "--negative-prompt blurry --workers 1 --device cpu"
)
RUNS = {  # name: (options, iterations of the stored run, iterations of the expected run)
    "standard": (
        "--dtype float32 --memory standard --student-every 3 --critic-loss flow --rollout-reuse "
        "--exit-schedule stratified --text-only-fraction 0.25 --first-frame-jitter 0.25 --ts-schedule --warmup 3 "
        "--checkpoint-every 4 --preview-every 4 --preview-count 1",
        4,
        8,
    ),
    "compact": ("--dtype bfloat16 --memory compact --student-every 2 --checkpoint-every 3", 3, 5),
    "lora": (
        "--dtype float32 --lora-rank 2 --lora-alpha 4 --student-every 2 --ladder 1000,500 --checkpoint-every 3",
        3,
        5,
    ),
}
PROMPTS = [("A red circle moves to the right.", "first.png", 7), ("A white circle rises.", "", 8)]
SAMPLE = (
    "sample --checkpoint standard --model model --data prompts.csv --out videos --dtype float32 --text-rows 80 "
    "--device cpu"
)
SAMPLE_ONE = (
    "sample --checkpoint lora --model model --out one.mp4 --image first.png --seed 5 --weights student "
    "--dtype float32 --text-rows 80 --device cpu --prompt"
)
EVALUATE = (
    "evaluate --checkpoint standard --shards data --model model --out report --count 2 --seeds 0 --teacher-steps 3 "
    "--videos 0 --batch-size 2 --text-rows 80 --dtype float32 --device cpu"
)


class Old:
    """The old code, run in a folder."""

    def __init__(self, checkout: Path, folder: Path) -> None:
        self.checkout, self.folder = checkout, folder

    def __call__(self, command: str, *more: str) -> None:
        """Run a command of its command line."""
        words = [sys.executable, str(self.checkout / "cli.py"), *command.split(), *more]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        subprocess.run(words, cwd=self.folder, env=environment, check=True)


def check_commit(checkout: Path) -> None:
    """Stop unless the checkout is the old commit, unchanged."""
    git = ["git", "-C", str(checkout)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    if not head.startswith(COMMIT) or changed:
        sys.exit(f"{checkout}: must be commit {COMMIT} without changes")


def make_inputs(folder: Path, checkout: Path) -> None:
    """Write the model, six clips, a CSV of prompts and a picture."""
    sys.path.insert(0, str(checkout / "tests"))
    import tiny  # of the old commit

    tiny.make_model(folder / "model")
    for part, (kind, smaller) in SMALLER.items():
        config = kind.load_config(folder / "model" / part) | smaller
        shutil.rmtree(folder / "model" / part)
        torch.manual_seed(0)
        kind.from_config(config).save_pretrained(folder / "model" / part)
    if (FOLDER / "clips").is_dir():
        shutil.copytree(FOLDER / "clips", folder / "clips")  # x264 does not encode to the same bytes every time
    else:
        tiny.make_clips(folder / "clips")
    Image.fromarray(tiny.picture(64, 96, seed=3)).save(folder / "first.png")
    with (folder / "prompts.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([("prompt", "image", "seed"), *PROMPTS])


def encode(folder: Path, old: Old) -> None:
    """Make the data set; in its stored options, absolute paths become relative ones."""
    old(ENCODE)
    stored = folder / "data" / "encode.yaml"
    stored.write_text(stored.read_text().replace(f"{folder}/", ""))


def distill(folder: Path, old: Old, name: str) -> None:
    """Make a run, and store what the old code computes when it resumes a copy of that run."""
    options, stop, end = RUNS[name]
    command = f"distill {TRAINING} {options} --out"
    old(f"{command} {name} --iterations {stop}")
    shutil.rmtree(folder / name / "tensorboard")  # its file names contain the name of the host; no command reads them
    shutil.copytree(folder / name, folder / "resumed" / name)
    old(f"{command} resumed/{name} --iterations {end}")
    (last,) = (folder / "resumed" / name / f"step-{end:06d}").glob("*.safetensors")
    tensors = load_file(last)
    weights = {key: value for key, value in tensors.items() if key.startswith(("student.", "ema."))}
    save_file(weights, folder / "expected" / f"{name}.safetensors")
    write_json(folder / "expected" / f"{name}.json", group_digests(tensors))
    shutil.copy(folder / "resumed" / name / "metrics.jsonl", folder / "expected" / f"{name}.jsonl")
    shutil.copy(folder / name / "distill.yaml", folder / "options" / f"distill-{name}.yaml")


def sample(folder: Path, old: Old) -> None:
    """Sample from the stored runs and evaluate one; store the latents and the options."""
    old(SAMPLE)
    old(SAMPLE_ONE, PROMPTS[0][0])
    old(EVALUATE)
    for stored, name in (
        ("videos/sample", "sample"),
        ("one.mp4", "sample-one"),
        ("report/evaluate", "evaluate"),
        ("data/encode", "encode"),
    ):
        shutil.copy(folder / f"{stored}.yaml", folder / "options" / f"{name}.yaml")
    (student,) = (folder / "report" / "latents.zarr").glob("standard-*-seed-0")
    stores = {
        "videos": "videos/latents.zarr/sample",
        "one": "one.zarr/sample",
        "teacher": "report/latents.zarr/teacher-seed-0",
        "student": f"report/latents.zarr/{student.name}",
        "preview": "resumed/standard/previews.zarr/step-000008",
    }
    arrays = {name: zarr.open_array(folder / path / "latents", mode="r")[:] for name, path in stores.items()}
    latents = {name: torch.from_numpy(numpy.ascontiguousarray(values)) for name, values in arrays.items()}
    save_file(latents, folder / "expected" / "latents.safetensors")


def record_digests(folder: Path) -> dict[str, str]:
    """The digest of each record's tensors, by key; no code of this project reads them."""
    digests = {}
    for path in sorted((folder / "data").glob("shard-*.tar")):
        with tarfile.open(path) as tar:
            for name in tar.getnames()[::2]:
                file = tar.extractfile(name)
                assert file is not None, name
                digests[name.removesuffix(".safetensors")] = digest(load(file.read()))
    return digests


def write_json(path: Path, value: object) -> None:
    """Write JSON for people."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Make all files in a temporary folder, then replace those of this folder."""
    checkout = Path(sys.argv[1]).resolve()
    check_commit(checkout)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work).resolve()
        old = Old(checkout, folder)
        for name in ("options", "expected", "resumed"):
            (folder / name).mkdir()
        make_inputs(folder, checkout)
        encode(folder, old)
        for name in RUNS:
            distill(folder, old, name)
        sample(folder, old)
        write_json(folder / "expected" / "records.json", record_digests(folder))
        write_json(folder / "expected" / "machine.json", machine())
        for part in PARTS:
            stored = FOLDER / part
            if stored.is_dir():
                shutil.rmtree(stored)
            shutil.move(folder / part, stored)


if __name__ == "__main__":
    main()
