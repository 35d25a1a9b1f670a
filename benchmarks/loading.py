"""From safetensors on local disk to a trainer that can begin: seconds and peak host memory.

    python -m benchmarks.loading [--tiny] [--memory compact] [--folder FOLDER] [--write]

The model folder, of random bf16 weights, is written by a child process, so that its memory is not counted; --write
writes it and ends. From iteration `ema_start` on the EMA takes pinned host memory, twice the size of one model; it is
not counted here.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.device import make_case, meta_network, randomize_weights
from benchmarks.runner import Row, parse_arguments, run_benchmark, sync
from benchmarks.trainer import host_peak_gib, make_config
from stage2_distill.build import build_roles
from stage2_distill.config import DistillConfig
from stage2_distill.distributed.process_group import RankContext, start_process_group
from stage2_distill.model.layers import ExecutionPlan
from stage2_distill.trainer import Roles

FILE_BYTES = 2 << 30  # as the hub's


def write_model(folder: Path, tiny: bool) -> None:
    """Write a transformer folder of random bf16 weights, made on the device, in files of about 2 GiB."""
    case = make_case(tiny, half=True)
    net = meta_network(case, ExecutionPlan(), torch.bfloat16)
    (folder / "transformer").mkdir(parents=True)
    net.save_config(folder / "transformer")
    files: dict[str, list[tuple[str, Tensor]]] = {}
    total = 0
    for name, value in net.named_parameters():
        files.setdefault(f"diffusion_pytorch_model-{total // FILE_BYTES:05d}.safetensors", []).append((name, value))
        total += 2 * value.numel()
    index = {name: file for file, values in files.items() for name, _ in values}
    index_file = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    for file, values in files.items():
        weights = {name: torch.empty(value.shape, dtype=value.dtype, device=case.device) for name, value in values}
        randomize_weights(weights.items(), case.device)
        save_file({name: value.cpu() for name, value in weights.items()}, folder / "transformer" / file)


def write_in_child(folder: Path, tiny: bool) -> None:
    """Write the model in a child process, unless the folder exists."""
    if folder.exists():
        return
    child = multiprocessing.get_context("spawn").Process(target=write_model, args=(folder, tiny))
    child.start()
    child.join()


def load_roles(ranks: RankContext, config: DistillConfig, folder: Path) -> tuple[Roles, list[Row]]:
    """Open the three roles of a model folder; return them and what it took."""
    before, began = host_peak_gib(), time.perf_counter()
    roles = build_roles(config, ranks, folder)
    seconds = sync() - began
    size = sum(p.numel() for p in roles.teacher.parameters()) * 2 / 2**30
    return roles, [
        ("three roles opened", f"{seconds:.1f} s, one model in bf16 {size:.1f} GiB"),
        ("peak host memory until then", f"{host_peak_gib():.1f} GiB, mapped files included ({before:.1f} before)"),
    ]


def measure(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """Load the roles from a folder that exists."""
    case = make_case(options.tiny, half=True)
    ranks = start_process_group(case.device.type)
    yield from load_roles(ranks, make_config(case, ranks, optimizer_form=options.memory), folder)[1]


def main() -> None:
    """Measure, print and append to the results."""
    options = parse_arguments(__doc__, tiny=False, memory="compact", folder=Path, write=False)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "model"
        write_in_child(folder, options.tiny)
        if not options.write:
            run_benchmark("loading", measure(options, folder), keep=not options.tiny, model="random weights")


if __name__ == "__main__":
    main()
