"""Command-line entry point: parses options, calls one function per command, prints user errors as one line.

Torch and the stages are imported inside the commands, so that `--help` answers at once.
"""

import csv
import errno
import json
import logging
import os
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from common.files import (
    LOCK_FILE,
    UNFINISHED_FOLDER,
    FolderLock,
    check_local_path,
    refuse_foreign_files,
    staged_output,
)
from common.options import ConfigCommand, config_options, expand_path, resolve_config, write_config
from stage1_encode.config import DecodeConfig, EncodeConfig, VerifyConfig
from stage2_distill.config import DistillConfig
from stage2_distill.evaluation.config import EvaluateConfig
from stage2_distill.export.config import ExportConfig
from stage2_distill.planning.config import DoctorConfig, PlanConfig
from stage2_distill.sampling.config import SampleConfig
from stage2_distill.turbo_config import translated_options

ERROR_DELAY_SECONDS = 3.0  # before a rank reports an error that the first rank may have reported


def show_version(context: click.Context, _: click.Parameter, requested: bool) -> None:
    """Print the version that pyproject.toml states, in a checkout as when installed."""
    if requested:
        from importlib.metadata import version

        project = Path(__file__).with_name("pyproject.toml")
        stated = tomllib.loads(project.read_text())["project"]["version"] if project.is_file() else None
        click.echo(f"ti2v-distill {stated or version('ti2v-distill')}")
        context.exit()


@click.group(context_settings={"show_default": True, "max_content_width": 110})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=show_version,
              help="Show the version and exit.")  # fmt: skip
def cli() -> None:
    """Distill Wan2.2-TI2V-5B to a few steps: encode clips, distill, sample."""


@cli.command("encode", cls=ConfigCommand)
@config_options(EncodeConfig)
def encode_command(**options: object) -> None:
    """Encode a CSV of clips and prompts into shards."""
    from stage1_encode.encode import encode

    report = encode(resolve_config(EncodeConfig, options))
    state = "" if report.is_complete else " so far"
    summary = f"{report.records} records in {report.shards} shards, {report.failures} failed rows{state}"
    if report.reasons:
        click.echo(f"failed: {report.reasons}")
    click.echo(f"{summary}: {report.folder}")
    for item in report.notes:
        click.echo(f"{item.records} records: {item.note}")


@cli.command("verify", cls=ConfigCommand)
@click.argument("shards")
@config_options(VerifyConfig)
def verify_command(shards: str, **options: object) -> int:
    """Check every byte, row and record of a data set, and describe it."""
    from shards.verification.verify import verify_data_set

    config, shards = resolve_config(VerifyConfig, options), expand_path("shards", shards)
    report = verify_data_set(shards)
    click.echo("\n".join(report.format_lines()), err=config.json)
    if config.repair and report.problems:
        from stage1_encode.repair import repair_data_set

        repair_data_set(report, config)
        report = verify_data_set(shards)
        click.echo(f"after the repair: {report.format_lines()[0]}", err=config.json)
    if config.model and report.manifest:
        from stage1_encode.repair import draw_contact_sheet

        click.echo(f"first frames: {draw_contact_sheet(report, config)}", err=config.json)
    echo_report(report.for_json(), [], as_json=True) if config.json else None
    return int(bool(report.problems))


@cli.command("plan", cls=ConfigCommand)
@config_options(PlanConfig)
def plan_command(**options: object) -> None:
    """Predict memory, time, money and disk of a run of distill."""
    from stage2_distill.planning.network_size import TransformerSize
    from stage2_distill.planning.plan_text import format_plan
    from stage2_distill.planning.run_plan import make_plan

    config, size = resolve_config(PlanConfig, options), TransformerSize()
    run = resolve_config(DistillConfig, translated_options(config.distill_options())[0])
    if config.model:
        from stage2_distill.planning.model_size import read_model_size  # imports torch

        size = read_model_size(config.model)
    plan = make_plan(run, size, config.card, gpus=config.gpus, records=config.records, price=config.price)
    echo_report(asdict(plan), format_plan(plan, run, records=config.records), as_json=config.json)


@cli.command("doctor", cls=ConfigCommand)
@config_options(DoctorConfig)
def doctor_command(**options: object) -> int:
    """Check this machine, a model, data sets and an output folder before a run."""
    from stage2_distill.diagnosis.doctor import diagnose

    config = resolve_config(DoctorConfig, options)
    findings = list(diagnose(config))
    echo_report(list(map(asdict, findings)), list(map(str, findings)), as_json=config.json)
    return int(any(finding.is_failure for finding in findings))


@cli.command("distill", cls=ConfigCommand)
@config_options(DistillConfig)
def distill_command(**options: object) -> None:
    """Distill the model on shards; the same command resumes."""
    from stage2_distill.train import distill

    options, notes = translated_options(options)
    if notes and os.environ.get("RANK", "0") == "0":
        click.echo("\n".join(notes), err=True)
    click.echo(f"checkpoint: {distill(resolve_config(DistillConfig, options))}")


@cli.command("sample", cls=ConfigCommand)
@config_options(SampleConfig)
def sample_command(**options: object) -> None:
    """Make videos from a checkpoint, a prompt and a first frame."""
    for path in sample_videos(resolve_config(SampleConfig, options)):
        click.echo(str(path))


@cli.command("evaluate", cls=ConfigCommand)
@config_options(EvaluateConfig)
def evaluate_command(**options: object) -> None:
    """Compare students with their teacher and write report.json and report.html."""
    config = resolve_config(EvaluateConfig, options)
    page = evaluate_students(config)
    click.echo(page.with_suffix(".json").read_text("utf-8").rstrip() if config.json else str(page))


@cli.command("export", cls=ConfigCommand)
@config_options(ExportConfig)
def export_command(**options: object) -> None:
    """Write a student as files of diffusers, ComfyUI and others, with a model card."""
    from stage2_distill.export.export import export_student

    click.echo(str(export_student(resolve_config(ExportConfig, options))))


@cli.command("decode", cls=ConfigCommand)
@config_options(DecodeConfig)
def decode_command(**options: object) -> None:
    """Decode a zarr store of latents into mp4 files and a contact sheet."""
    from stage1_encode.generation.decode import decode, decode_as_written

    config = resolve_config(DecodeConfig, options)
    for path in decode_as_written(config) if config.watch else decode(config):
        click.echo(str(path))


@cli.command("plot")
@click.argument("run")
def plot_command(run: str) -> None:
    """Draw the curves of a run into RUN/curves.png."""
    from stage2_distill.monitoring.plot import plot_curves

    run = expand_path("run", run)
    check_local_path("run", run, is_output=True)
    click.echo(str(plot_curves(Path(run))))


@cli.command("demo")
@click.option("--out", default="demo", show_default=True, help="Folder for everything that the demo makes.")
def demo_command(out: str) -> None:
    """Run all steps on the small model of examples/nano."""
    from stage1_encode.encode import encode
    from stage2_distill.evaluation.report import summary_lines
    from stage2_distill.train import distill

    out = expand_path("out", out)
    check_local_path("out", out, is_output=True)
    nano, folder = find_example(), Path(out)
    sys.path.append(str(nano.parent.parent))  # its judge imports examples.nano, which is not installed
    common = {"model": str(nano / "model"), "device": "cpu"}
    data, held_out, run, videos = (folder / name for name in ("data", "held", "run", "videos"))
    for table, shards in (("clips.csv", data), ("held.csv", held_out)):
        options = {"config": nano / "encode.yaml", "data": str(nano / table), "out": str(shards)}
        encode(resolve_config(EncodeConfig, common | options))
    options = {"config": nano / "demo.yaml", "shards": (str(data),), "out": str(run)}
    distill(resolve_config(DistillConfig, common | options))
    options = {"config": nano / "evaluate.yaml", "checkpoint": (str(run),), "shards": str(held_out)}
    options |= {"out": str(folder / "report"), "judge": str(nano / "judge.py")}
    report = evaluate_students(resolve_config(EvaluateConfig, common | options))
    options = {"config": nano / "sample.yaml", "checkpoint": str(run), "data": str(nano / "prompts.csv")}
    sample_videos(resolve_config(SampleConfig, common | options | {"out": str(videos)}))
    click.echo("\n".join(["", *summary_lines(report.parent), ""]))
    click.echo("100 iterations bring the 4-step student nearer to its teacher's 50 steps; recipes/nano.yaml goes on.")
    click.echo(f"open {report} to see it; shards are in {data}, checkpoints in {run}, videos in {videos}")


def find_example() -> Path:
    """The folder examples/nano of the source, beside this file or in the working directory; ValueError without it."""
    folders = [root / "examples" / "nano" for root in (Path(__file__).parent, Path.cwd())]
    for folder in folders:
        if (folder / "demo.yaml").is_file():
            return folder
    raise ValueError(
        f"demo: needs the folder examples/nano of the source, which no installed package has (looked in "
        f"{' and '.join(str(folder) for folder in folders)}); clone the repository and run ti2v-distill demo in it"
    )


def sample_videos(config: SampleConfig) -> list[Path]:
    """Encode the conditions and decode the frames (stage one), denoise in between (stage two); returns the files.

    The latents are also stored, in X.zarr beside the videos. Under torchrun the processes share the rows of a CSV, or
    denoise the one video together.
    """
    from common.device import pick_device
    from stage1_encode.generation.condition_encoder import load_condition_encoder
    from stage1_encode.generation.generate import GenerationRequest, generate_videos, needs_offload
    from stage2_distill.sampling.multi_gpu import LeaderSampler, run_sampling_worker
    from stage2_distill.sampling.student_sampler import open_student

    is_single = config.prompt is not None
    offload = needs_offload(config.vram, pick_device(config.device))
    rank, world = join_ranks(config.device)
    student = open_student(config)
    shared_video = is_single and world > 1
    if shared_video and rank:
        run_sampling_worker(student)
        return []
    models = load_condition_encoder(
        config.model, precision=config.vae_dtype, device=student.device, keep_text_on_device=not offload,
        condition_dtype=config.dtype,
    )  # fmt: skip
    if shared_video:
        rank, world = 0, 1  # the leader alone writes the file
    with TemporaryDirectory() as temporary, prepare_output(config, rank) as folder:
        table = Path(write_prompt_csv(Path(temporary) / "prompt.csv", config) if is_single else str(config.data))
        target = folder / Path(config.out).name if is_single else folder
        store = target.with_suffix(".zarr") if is_single else folder / latent_store_name(rank, world)
        request = GenerationRequest(
            table, target, store, student.spec, config.seed, config.segments, config.batch_size, rank, world,
            config.base_folder,
        )  # fmt: skip
        with LeaderSampler(student) if shared_video else nullcontext(student) as sampler:
            files = generate_videos(request, models, sampler, offload=offload)
    return [(Path(config.out).parent if is_single else Path(config.out)) / path.name for path in files]


def join_ranks(device: str) -> tuple[int, int]:
    """Rank and number of the processes of torchrun, which can wait for each other from now on; (0, 1) without it."""
    from stage2_distill.distributed.process_group import rank_and_world, start_process_group

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        start_process_group(device)
    return rank_and_world()


def latent_store_name(rank: int, world: int) -> str:
    """File name of the latents of one rank of `sample --data`."""
    return f"latents-{rank}.zarr" if world > 1 else "latents.zarr"


def evaluate_students(config: EvaluateConfig) -> Path:
    """Sample all candidates (stage two), measure their videos (stage one), report (stage two); returns the page.

    Under torchrun the processes share the sampling, and the first one does the rest.
    """
    from stage1_encode.video_metrics.evaluate_videos import load_tools, measure_videos
    from stage2_distill.distributed.process_group import own_folder
    from stage2_distill.evaluation.compare import open_evaluation, sample_comparison
    from stage2_distill.evaluation.report import PAGE_FILE, write_report

    rank, _ = join_ranks(config.device)
    load = partial(load_tools, config.model, config.shards, config.device,
                   judge=config.judge, i3d_model=config.i3d_model, clip_model=config.clip_model)  # fmt: skip
    if config.videos and rank == 0:
        load()  # and let go: mistakes show before hours of sampling, which need the memory
    setting, out = open_evaluation(config), Path(config.out)
    with own_folder(out):
        sample_comparison(setting)
        if config.videos and rank == 0:
            with staged_output(out) as staging:
                measure_videos(out, staging, load(), max_videos=config.videos,
                               report_videos=config.report_videos, batch_size=config.batch_size)  # fmt: skip
        return write_report(config) if rank == 0 else out / PAGE_FILE


@contextmanager
def prepare_output(config: SampleConfig, rank: int) -> Iterator[Path]:
    """Own the output of `sample` and yield the folder into which all ranks write; its files are moved at the end.

    ValueError if the output folder holds other files or another process writes there.
    """
    from stage1_encode.generation.decode import VIDEO_FOLDER_FILES
    from stage2_distill.distributed.process_group import own_folder, wait_for_ranks

    out, config_file = Path(config.out), "sample.yaml"
    if config.prompt is not None:
        with FolderLock(out.parent, f"{out.name}.lock") as lock:
            lock.hold()
            with staged_output(out.parent, f"{out.name}.{UNFINISHED_FOLDER}") as staging:
                yield staging
                write_config(staging / f"{out.name}.yaml", config)
        return
    if not (out / config_file).is_file():
        is_marked = any((out / name).exists() for name in (LOCK_FILE, UNFINISHED_FOLDER))  # by a run that did not end
        refuse_foreign_files(out, lambda name: is_marked and VIDEO_FOLDER_FILES.fullmatch(name) is not None)
    with own_folder(out), staged_output(out) if rank == 0 else nullcontext(out / UNFINISHED_FOLDER) as staging:
        wait_for_ranks()  # the first one has emptied the folder
        yield staging
        if rank == 0:
            write_config(staging / config_file, config)
        wait_for_ranks()  # nothing is moved before all are complete


def echo_report(report: object, lines: list[str], *, as_json: bool) -> None:
    """Print a report as JSON or as lines, on the first rank."""
    if os.environ.get("RANK", "0") == "0":
        click.echo(json.dumps(report, indent=2, ensure_ascii=False) if as_json else "\n".join(lines))


def write_prompt_csv(path: Path, config: SampleConfig) -> str:
    """Write a CSV of one row for the prompt of a single video; returns its path."""
    from stage1_encode.media.rows import locate_file

    # absolute, because a path in a CSV starts at the CSV's folder
    image = "" if config.image is None else locate_file(Path("prompt.csv"), config.image)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("prompt", "image", "seed"), (config.prompt, image, config.seed)])
    return str(path)


def run_command() -> int | None:
    """Run a command; returns its exit code."""
    try:
        result: int | None = cli.main(standalone_mode=False)
    except (click.ClickException, ValueError, RuntimeError, OSError):
        if os.environ.get("RANK", "0") != "0":  # if the first rank failed too, torchrun ends this one meanwhile
            time.sleep(ERROR_DELAY_SECONDS)
        raise
    return result


RESUMABLE = ("encode", "distill", "evaluate", "demo")


def interruption_remedy(arguments: list[str]) -> str:
    """What to do after Ctrl-C in a command."""
    is_resumable = arguments[:1] and arguments[0] in RESUMABLE
    return "the same command resumes" if is_resumable else "nothing is damaged; the same command starts again"


def main() -> None:
    """Run a command; exits with 2 after a user error and with 1 after a failure of the system."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        code = run_command()
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except click.Abort:  # Ctrl-C
        click.echo(f"stopped; {interruption_remedy(sys.argv[1:])}", err=True)
        sys.exit(130)
    except ValueError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    except (RuntimeError, OSError) as error:
        if type(error) in (RuntimeError, NotImplementedError):  # a bug of ours: show the traceback
            raise
        is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        click.echo(f"error: {error}{'; free disk space and repeat the same command' if is_full else ''}", err=True)
        sys.exit(1)
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
