"""From safetensors on local disk to a trainer that can begin: seconds and peak host memory.

    python -m benchmarks.loading [--tiny] [--memory compact] [--folder FOLDER]

The model folder, of random bf16 weights, is written by a child process, so that its memory is not counted.
The average waits in pinned host memory from iteration `ema_start` on, twice one model's size; it is not counted here.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks.device import Case, case, randomise, synchronize
from benchmarks.report import append
from benchmarks.trainer import make_config, random_network
from stage2_distill.build import build_roles
from stage2_distill.config import DistillConfig
from stage2_distill.distributed.process_group import RankContext, start_process_group
from stage2_distill.model.layers import ExecutionPlan
from stage2_distill.trainer import Roles

FILE = 2 << 30  # bytes


def write_model(folder: Path, tiny: bool) -> None:
    """A transformer folder of random bf16 weights, in files of some 2 GiB as the hub's, made on the device."""
    chosen = case(tiny, half=True)
    net = random_network(chosen, ExecutionPlan(), torch.bfloat16)
    (folder / "transformer").mkdir(parents=True)
    net.save_config(folder / "transformer")
    parts: dict[str, list[tuple[str, nn.Parameter]]] = {}
    total = 0
    for name, value in net.named_parameters():
        parts.setdefault(f"diffusion_pytorch_model-{total // FILE:05d}.safetensors", []).append((name, value))
        total += 2 * value.numel()
    index = {name: file for file, values in parts.items() for name, _ in values}
    index_file = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    draws = torch.Generator(chosen.device).manual_seed(0)
    for file, values in parts.items():
        made = {name: torch.empty(v.shape, dtype=v.dtype, device=chosen.device) for name, v in values}
        for name, value in made.items():
            randomise(name, value, draws)
        save_file({name: value.cpu() for name, value in made.items()}, folder / "transformer" / file)


def write_apart(folder: Path, tiny: bool) -> None:
    """The same by a child process, if the folder is not there."""
    if folder.exists():
        return
    child = multiprocessing.get_context("spawn").Process(target=write_model, args=(folder, tiny))
    child.start()
    child.join()


def host_peak() -> float:
    """Most host memory of this process so far, GiB; mapped files count."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def load(chosen: Case, ranks: RankContext, config: DistillConfig, folder: Path) -> tuple[Roles, list[tuple[str, str]]]:
    """Open the three roles and say what it took."""
    before, began = host_peak(), time.perf_counter()
    roles = build_roles(config, ranks, folder)
    synchronize(chosen)
    spent = time.perf_counter() - began
    size = sum(p.numel() for p in roles.teacher.parameters()) * 2 / 2**30
    return roles, [
        ("three roles opened", f"{spent:.1f} s, one model in bf16 {size:.1f} GiB"),
        ("peak host memory until then", f"{host_peak():.1f} GiB, mapped files included ({before:.1f} before)"),
    ]


def main() -> None:
    """Measure, print and append to the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--memory", default="compact")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--write", action="store_true", help="write the folder, nothing more")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = given.folder or Path(made) / "model"
        write_apart(folder, given.tiny)
        if given.write:
            return
        chosen = case(given.tiny, half=True)
        ranks = start_process_group(chosen.device.type)
        _, rows = load(chosen, ranks, make_config(chosen, ranks, optimizer_form=given.memory), folder)
    print("\n".join(": ".join(row) for row in rows), flush=True)
    if not given.tiny:
        append("loading", rows, model="random weights")


if __name__ == "__main__":
    main()
