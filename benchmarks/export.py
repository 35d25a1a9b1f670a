"""Export of a checkpoint of random weights: seconds and peak host memory of each format.

    python -m benchmarks.export [--tiny] [--parts diffusers,wan,lora] [--folder FOLDER]

The base (bf16) and the checkpoint's average (float32) are written first, tensor by tensor, by this process; each
format is then exported by a process of its own, so that its peak is counted alone. The VAE and the text encoder of the
base are stand-ins of a few bytes: export links such files and reads nothing of them. FOLDER keeps base and checkpoint.
The SVD of `lora` runs on the GPU if there is one.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.device import TINY, TRUE, build_network
from benchmarks.runner import RANDOM_WEIGHTS, Row, parse_arguments, run_benchmark
from common.model_folder import fingerprint_folder
from stage2_distill.checkpointing.format import SAMPLER_KIND, STUDENT_FILE, StudentFacts, write_json
from stage2_distill.config import DistillConfig
from stage2_distill.export.config import FORMATS, ExportConfig
from stage2_distill.export.export import export_student
from stage2_distill.weight_files.safetensors_writer import TensorShape, write_model_folder

FILE_BYTES = 2 * 10**9  # of the base and of the checkpoint
# name of a row: options of the export
EXPORTS: dict[str, dict[str, object]] = {
    "diffusers, bf16": {"format": "diffusers"},
    "wan, bf16": {"format": "wan"},
    "wan, fp16": {"format": "wan", "dtype": "float16"},
    "lora of rank 32 by SVD": {"format": "lora", "rank": 32},
}


def network_shapes(tiny: bool, folder: Path, dtype: torch.dtype) -> dict[str, TensorShape]:
    """Shapes of the network's tensors; its configuration is written into the folder."""
    with torch.device("meta"):  # a machine without a GPU exports too
        net = build_network(TINY if tiny else TRUE)
    net.save_config(folder)
    return {name: TensorShape(tuple(value.shape), dtype) for name, value in net.named_parameters()}


def random_tensors(shapes: Mapping[str, TensorShape], seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yield small random weights, drawn on the GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    draws = torch.Generator(device).manual_seed(seed)
    for name, one in shapes.items():
        yield name, 0.02 * torch.randn(one.shape, generator=draws, device=device)


def write_base(folder: Path, tiny: bool) -> None:
    """Write a model folder with random weights and stand-ins for its other parts."""
    transformer = folder / "transformer"
    transformer.mkdir(parents=True)
    shapes = network_shapes(tiny, transformer, torch.bfloat16)
    write_model_folder(transformer, shapes, random_tensors(shapes, 0), shard_bytes=FILE_BYTES)
    for part in ("vae", "text_encoder", "tokenizer"):
        (folder / part).mkdir()
        (folder / part / ("tokenizer_config.json" if part == "tokenizer" else "config.json")).write_text("{}")
        save_file({"x": torch.zeros(1)}, folder / part / "model.safetensors")


def write_checkpoint(folder: Path, base: Path, tiny: bool) -> None:
    """Write a checkpoint with a random float32 average."""
    folder.mkdir(parents=True)
    shapes = network_shapes(tiny, folder, torch.float32)
    stored = {f"ema.{name}": one for name, one in shapes.items()}
    tensors = ((f"ema.{name}", value) for name, value in random_tensors(shapes, 1))
    write_model_folder(folder, stored, tensors, shard_bytes=FILE_BYTES)
    config = DistillConfig(shards=("DATA",), model=str(base), out="RUN")
    facts = StudentFacts(
        0, config.timesteps, config.shift, SAMPLER_KIND, config.spec, str(base),
        fingerprint_folder(base / "transformer"), fingerprint_folder(base / "vae"),
        fingerprint_folder(base / "text_encoder"), asdict(config),
    )  # fmt: skip
    write_json(folder / STUDENT_FILE, asdict(facts))


def export_once(folder: Path, name: str) -> None:
    """Export one row and print what it took as JSON."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    out = folder / "exported"
    checkpoint, base = str(folder / "run" / "step-000001"), str(folder / "base")
    export_student(ExportConfig(checkpoint=checkpoint, model=base, out=str(out), **EXPORTS[name]))
    seconds, peak = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    shutil.rmtree(out)
    print(json.dumps({"seconds": seconds, "peak": 1024 * peak, "before": 1024 * before, "size": size}))


def measure_exports(folder: Path, tiny: bool, parts: Sequence[str]) -> Iterator[Row]:
    """Write base and checkpoint unless they are there, and measure exports of some formats, each in its own process."""
    if not (folder / "run").exists():
        write_base(folder / "base", tiny)
        write_checkpoint(folder / "run" / "step-000001", folder / "base", tiny)
    size = sum(path.stat().st_size for path in (folder / "run").rglob("*.safetensors"))
    yield "checkpoint's average", f"{size / 2**30:.2f} GiB"
    for name in [name for name, settings in EXPORTS.items() if settings["format"] in parts]:
        command = [sys.executable, "-m", "benchmarks.export", "--folder", str(folder), "--row", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        figures = json.loads(done.stdout.splitlines()[-1])
        peak, before, written = (figures[key] / 2**30 for key in ("peak", "before", "size"))
        memory = f"peak host memory {peak:.2f} GiB ({before:.2f} before)"
        yield name, f"{figures['seconds']:.1f} s, {memory}, {written:.2f} GiB written"


def main(options: argparse.Namespace) -> None:
    """Measure all rows, or one of them in this process."""
    if options.row:
        export_once(Path(options.folder), options.row)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        model = "tiny" if options.tiny else RANDOM_WEIGHTS
        rows = measure_exports(folder, options.tiny, options.parts.split(","))
        run_benchmark("export", rows, keep=not options.tiny, model=model)


if __name__ == "__main__":
    main(parse_arguments(__doc__, tiny=False, parts=",".join(FORMATS), folder="", row=""))
