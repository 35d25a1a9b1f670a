"""The command `doctor`: checks this machine, a model, data sets and an output folder before a run."""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from common.device import pick_device
from common.model_folder import fingerprint_part, locate_part
from stage2_distill.config import COMPACT, STANDARD, DistillConfig
from stage2_distill.diagnosis.data_checks import check_clock, check_data_set, check_disk, check_model
from stage2_distill.diagnosis.finding import FAIL, OK, SKIP, WARN, Finding, report_errors
from stage2_distill.diagnosis.machine_checks import (
    available_host_bytes,
    check_attention,
    check_gpu,
    check_ranks,
    check_torch,
)
from stage2_distill.distributed.process_group import rank_and_world
from stage2_distill.planning.config import DoctorConfig
from stage2_distill.planning.memory import choose_form, estimate_memory
from stage2_distill.planning.model_size import read_model_size
from stage2_distill.planning.network_size import TransformerSize
from stage2_distill.planning.run_plan import GIB, compare_modes


def diagnose(config: DoctorConfig) -> Iterator[Finding]:
    """Yield a finding per check, as soon as it is made; every rank of torchrun must take all of them."""
    yield from report_errors("torch", check_torch)
    gpu_findings = list(report_errors("gpu", partial(check_gpu, config.device)))
    yield from gpu_findings
    if any(finding.state == FAIL for finding in gpu_findings):
        config = replace(config, device="cpu")  # the other checks would fail for the same reason
    yield from report_errors("attention", partial(check_attention, config.device))
    yield from report_errors("ranks", partial(check_ranks, config.device))
    if config.model is not None:
        yield from report_errors("model", partial(check_model, config.model))
    yield from report_errors("memory", partial(check_memory, config))
    for prefix in config.shards:
        yield from report_errors("shards", partial(check_shards, config, prefix))
    yield from report_errors("disk", partial(check_output, config)) if config.out is not None else check_clock(0)
    unchecked = {
        "the model (--model)": config.model,
        "data sets (--shards)": config.shards,
        "the disk (--out)": config.out,
    }
    if missing := [name for name, value in unchecked.items() if not value]:
        yield Finding("others", SKIP, f"not checked, as they were not named: {', '.join(missing)}")


def planned_run(config: DoctorConfig) -> tuple[DistillConfig, TransformerSize]:
    """The default recipe with one clip per GPU, and the size of the model that is given, else of Wan2.2-TI2V-5B."""
    _, world = rank_and_world()
    run = DistillConfig(("d",), "m", config.out or "o", global_batch=world)
    if config.model is not None and Path(config.model).exists():
        with suppress(ValueError):  # `check_model` has reported it
            return run, read_model_size(config.model)
    return run, TransformerSize()


def check_memory(config: DoctorConfig) -> Iterator[Finding]:
    """Which ways of training fit the memory of the GPU and of the host, at 121 x 704 x 1280."""
    device, (run, size), (_, world) = pick_device(config.device), planned_run(config), rank_and_world()
    if device.type == "cpu":
        return
    total, free = torch.cuda.mem_get_info(device)[1], available_host_bytes()
    fitting = [mode for mode in compare_modes(run, size, gpus=world, total=total) if mode.fits]
    if not fitting:
        text = f"no way of training {size.parameters / 1e9:.2f} G parameters at 121 x 704 x 1280 fits {world} GPU(s)"
        yield Finding("memory", WARN, text, "train smaller videos, or sample only; see the command plan")
        return
    text = f"training fits with {', '.join(f'{mode.name} ({mode.gib:.1f} GiB)' for mode in fitting)}"
    memory = estimate_memory(run, size, world=world, form=choose_form(run, size, world=world, gpu_bytes=total))
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if free is not None and free < memory.host * ranks_here:
        needed = f"{memory.host * ranks_here / GIB:.0f} GiB of host memory needed, {free / GIB:.0f} free"
        yield Finding("memory", WARN, f"{text}; {needed}", "use --no-async-checkpoint, or --lora-rank")
    else:
        yield Finding("memory", OK, text)


def check_shards(config: DoctorConfig, prefix: str) -> Iterator[Finding]:
    """A data set, and whether the model's encoders made it."""
    encoder: dict[str, object] = {}
    if config.model is not None and Path(config.model).is_dir():
        paths = {part: locate_part(Path(config.model), part) for part in ("vae", "text_encoder")}
        encoder = {part: fingerprint_part(path) for part, path in paths.items() if path.exists()}
    yield from check_data_set(prefix, encoder)


def check_output(config: DoctorConfig) -> Iterator[Finding]:
    """The disk of the output against the checkpoints of the default recipe."""
    (run, size), (_, world) = planned_run(config), rank_and_world()
    form = COMPACT if pick_device(config.device).type == "cuda" else STANDARD
    memory = estimate_memory(replace(run, optimizer_form=form), size, world=world, form=form)
    yield from check_disk(str(config.out), memory, run.keep_last)
