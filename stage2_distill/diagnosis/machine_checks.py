"""Checks of the machine: GPU, torch, attention kernels, the connection between ranks, host memory."""

import logging
import os
import re
import time
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist

from common.device import pick_device
from stage2_distill.diagnosis.finding import FAIL, OK, WARN, Finding
from stage2_distill.distributed.process_group import on_any_rank, start_process_group
from stage2_distill.model.attention import (
    FLASH_3_MODULE,
    SDPA_BACKENDS,
    check_kernel,
    choose_kernel,
    enable_determinism,
    uses_flash_3,
)

GIB = 2**30
DRIVER_FILE = Path("/proc/driver/nvidia/version")
HEAD_SIZE = 128  # of Wan2.2
EXCHANGED_BYTES = 64 << 20
LOW_RATE = 5e9  # bytes per second between GPUs: PCIe of an old machine; NVLink reaches a hundred times as much


def check_gpu(device: str) -> Iterator[Finding]:
    """The GPU of this process: name, memory and driver, and whether torch has code for it."""
    chosen = pick_device(device)
    if chosen.type == "cpu":
        if torch.version.cuda and DRIVER_FILE.exists():
            yield Finding(
                "gpu",
                WARN,
                f"there is an NVIDIA driver ({driver_version()}), but torch sees no GPU",
                f"check CUDA_VISIBLE_DEVICES, and that the driver supports CUDA {torch.version.cuda}",
            )
        else:
            text = "none: everything runs on the CPU, where only small models such as examples/nano are practical"
            yield Finding("gpu", OK, text)
        return
    free, total = torch.cuda.mem_get_info(chosen)
    name = torch.cuda.get_device_name(chosen)
    text = f"{torch.cuda.device_count()} x {name}, {total / GIB:.1f} GiB, driver {driver_version()}"
    if free < 0.9 * total:
        text += f", only {free / GIB:.1f} GiB free"
        yield Finding("gpu", WARN, text, "end the other programs on it (nvidia-smi lists them)")
    elif not torch.cuda.is_bf16_supported(including_emulation=False):
        yield Finding("gpu", WARN, f"{text}, no bfloat16", "use --dtype float32, which is slow, or a newer GPU")
    else:
        yield Finding("gpu", OK, text)


def driver_version() -> str:
    """Version of the NVIDIA driver; the line is worded otherwise by its open kernel modules."""
    found = re.search(r"\b\d+\.\d+(\.\d+)*", DRIVER_FILE.read_text()) if DRIVER_FILE.exists() else None
    return found[0] if found else "unknown"


def check_torch() -> Iterator[Finding]:
    """The build of torch, and whether it compiles."""
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    text = f"torch {torch.__version__}, {build}"
    if not torch.version.cuda and DRIVER_FILE.exists():
        yield Finding("torch", FAIL, f"{text}, though there is an NVIDIA driver", "install torch with CUDA")
    elif torch.cuda.is_available() and find_spec("triton") is None:
        yield Finding("torch", FAIL, f"{text}, without triton, which training on a GPU needs", "pip install triton")
    else:
        yield Finding("torch", OK, text)


def check_attention(device: str) -> Iterator[Finding]:
    """Kernels of attention that run here, the one that `auto` takes, and whether it adds in a fixed order."""
    chosen = pick_device(device)
    dtype = torch.bfloat16 if chosen.type == "cuda" else torch.float32
    kernel = choose_kernel("auto", half_on_gpu=chosen.type == "cuda")
    name = "flash (FlashAttention-3)" if kernel == "flash" and uses_flash_3() else kernel
    running = [one for one in ("torch", *SDPA_BACKENDS) if runs_kernel(one, dtype, chosen)]
    in_order = enable_determinism("auto", dtype, chosen)
    text = f"auto takes {name}, available: {', '.join(running)}; {'' if in_order else 'no '}fixed order of sums"
    if kernel not in running:
        yield Finding("attention", FAIL, text, "use --attention torch")
    elif in_order:
        yield Finding("attention", OK, f"{text}: a resumed run has the same bits")
    else:
        hopper = torch.cuda.get_device_capability(chosen) == (9, 0)
        remedy = f"install flash-attn-3 ({FLASH_3_MODULE})" if hopper else "use --attention flash, which is slower"
        yield Finding("attention", WARN, f"{text}: a resumed run differs in its last bits", remedy)


def runs_kernel(kernel: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a kernel of attention runs forward and backward here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch explains at length why a kernel cannot be used
        try:
            check_kernel(kernel, HEAD_SIZE, dtype, device)
        except ValueError:
            return False
    return True


def check_ranks(device: str) -> Iterator[Finding]:
    """Under torchrun: sum a tensor over all ranks, and measure how fast."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    ranks = start_process_group(device)
    is_cpu = ranks.device.type == "cpu"
    if on_any_rank(is_cpu) and on_any_rank(not is_cpu):  # a sum over both would wait for ever
        yield Finding("ranks", FAIL, "some ranks have a GPU and some have none", "start one rank per GPU of each host")
        return
    values = torch.ones(EXCHANGED_BYTES // 4, device=ranks.device)
    time_sum(values)  # the first one also connects the ranks and loads the kernels
    rate = EXCHANGED_BYTES / time_sum(values)
    is_right = bool((values == ranks.world**2).all())
    text = f"{ranks.world} ranks over {'NCCL' if ranks.device.type == 'cuda' else 'gloo'}, {rate / 1e9:.1f} GB/s"
    if not is_right:
        yield Finding("ranks", FAIL, f"{text}, with a wrong sum", "run nvidia-smi topo -m and NCCL's own tests")
    elif ranks.device.type == "cuda" and rate < LOW_RATE:
        yield Finding("ranks", WARN, f"{text}, which slows training", "use GPUs with NVLink, or --replicate per host")
    else:
        yield Finding("ranks", OK, text)


def time_sum(values: torch.Tensor) -> float:
    """Add the values of all ranks, in place; returns the seconds."""
    if values.is_cuda:
        torch.cuda.synchronize(values.device)
    began = time.perf_counter()
    dist.all_reduce(values)
    if values.is_cuda:
        torch.cuda.synchronize(values.device)  # NCCL only queues the sum
    return time.perf_counter() - began


def available_host_bytes() -> int | None:
    """Free host memory in bytes; None where the system does not tell (not Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError as error:
        logging.debug("no /proc/meminfo: %s", error)
        return None
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
