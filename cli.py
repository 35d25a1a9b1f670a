"""Command-line entry point: parses options, calls one function per command, prints user errors as one line.

Torch and the stages are imported inside the commands, so that `--help` answers at once.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below ends without a traceback

import errno
import gc
import json
import logging
import os
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import click

from commands.page_config import PageConfig
from common.files import check_local_path
from common.options import ConfigCommand, config_options, expand_path, resolve_config
from stage1_encode.config import DecodeConfig, EncodeConfig, VerifyConfig
from stage2_distill.config import DistillConfig
from stage2_distill.evaluation.config import EvaluateConfig
from stage2_distill.export.config import ExportConfig
from stage2_distill.planning.config import DoctorConfig, PlanConfig
from stage2_distill.sampling.config import SampleConfig
from stage2_distill.turbo_config import translated_options

ERROR_DELAY_SECONDS = 3.0  # before a rank reports an error that the first rank may have reported


@contextmanager
def unscanned_imports() -> Iterator[None]:
    """Import without garbage collection, and keep what was imported out of later collections.

    Torch, diffusers and transformers make a million objects that stay to the end: to search them for garbage takes a
    third of a command's start and end, and later stops a run at each full collection.
    """
    if "torch" in sys.modules:  # not a process of its own: there may be garbage, which must not be kept
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:  # whose exception an import may swallow, or turn into another
        signal.signal(signal.SIGINT, lambda *_: stop_at_once())
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        if handler is signal.default_int_handler:
            signal.signal(signal.SIGINT, handler)


def stop_at_once() -> None:
    """End the process after Ctrl-C in words, without unwinding: nothing was begun."""
    os.write(2, f"{interruption_words()}\n".encode())
    os._exit(130)


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
    with unscanned_imports():
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
    with unscanned_imports():
        from shards.verification.verify import verify_data_set

    config, shards = resolve_config(VerifyConfig, options), expand_path("shards", shards)
    report = verify_data_set(shards)
    click.echo("\n".join(report.format_lines()), err=config.json)
    if config.repair and report.problems:
        with unscanned_imports():
            from stage1_encode.repair import repair_data_set

        repair_data_set(report, config)
        report = verify_data_set(shards)
        click.echo(f"after the repair: {report.format_lines()[0]}", err=config.json)
    if config.sheet and report.manifest:
        with unscanned_imports():
            from stage1_encode.repair import draw_contact_sheet

        click.echo(f"first frames: {draw_contact_sheet(report, config)}", err=config.json)
    echo_report(report.for_json(), [], as_json=True) if config.json else None
    return int(bool(report.problems))


@cli.command("plan", cls=ConfigCommand)
@config_options(PlanConfig)
def plan_command(**options: object) -> None:
    """Predict memory, time, money and disk of a run of distill."""
    with unscanned_imports():
        from stage2_distill.planning.duration import list_shapes
        from stage2_distill.planning.network_size import TransformerSize
        from stage2_distill.planning.plan_text import format_plan
        from stage2_distill.planning.run_plan import make_plan

    config, size = resolve_config(PlanConfig, options), TransformerSize()
    run = resolve_config(DistillConfig, translated_options(config.distill_options())[0])
    if config.model:
        with unscanned_imports():
            from stage2_distill.planning.model_size import read_model_size  # imports torch

        size = read_model_size(config.model)
    shapes, sizes, calibration = list_shapes(run, config.size_shares), config.size_shares, None
    if config.calibrate:
        with unscanned_imports():
            from commands.calibrate import calibrate

        _ = run.accumulation_steps(config.gpus)  # a plan that is impossible is refused before anything runs
        calibration = calibrate(shapes[0].config, size, config.card)
    plan = make_plan(shapes, size, config.card, gpus=config.gpus, records=config.records, price=config.price,
                     calibration=calibration)  # fmt: skip
    echo_report(asdict(plan), format_plan(plan, run, records=config.records, sizes=sizes), as_json=config.json)


@cli.command("doctor", cls=ConfigCommand)
@config_options(DoctorConfig)
def doctor_command(**options: object) -> int:
    """Check this machine, a model, data sets and an output folder before a run."""
    with unscanned_imports():
        from stage2_distill.diagnosis.doctor import diagnose

    config = resolve_config(DoctorConfig, options)
    findings = list(diagnose(config))
    echo_report(list(map(asdict, findings)), list(map(str, findings)), as_json=config.json)
    return int(any(finding.is_failure for finding in findings))


@cli.command("distill", cls=ConfigCommand)
@config_options(DistillConfig)
def distill_command(**options: object) -> None:
    """Distill the model on shards; the same command resumes."""
    with unscanned_imports():
        from stage2_distill.train import distill

    options, notes = translated_options(options)
    if notes and os.environ.get("RANK", "0") == "0":
        click.echo("\n".join(notes), err=True)
    click.echo(f"checkpoint: {distill(resolve_config(DistillConfig, options))}")


@cli.command("sample", cls=ConfigCommand)
@config_options(SampleConfig)
def sample_command(**options: object) -> None:
    """Make videos from a checkpoint, a prompt and a first frame."""
    with unscanned_imports():
        from commands.sample import sample_videos

    for path in sample_videos(resolve_config(SampleConfig, options)):
        click.echo(str(path))


@cli.command("evaluate", cls=ConfigCommand)
@config_options(EvaluateConfig)
def evaluate_command(**options: object) -> None:
    """Compare students with their teacher and write report.json and report.html."""
    with unscanned_imports():
        from commands.evaluate import evaluate_students

    config = resolve_config(EvaluateConfig, options)
    page = evaluate_students(config)
    click.echo(page.with_suffix(".json").read_text("utf-8").rstrip() if config.json else str(page))


@cli.command("export", cls=ConfigCommand)
@config_options(ExportConfig)
def export_command(**options: object) -> None:
    """Write a student as files of diffusers, ComfyUI and others, with a model card."""
    with unscanned_imports():
        from stage2_distill.export.export import export_student

    click.echo(str(export_student(resolve_config(ExportConfig, options))))


@cli.command("ui", cls=ConfigCommand)
@config_options(PageConfig)
def ui_command(**options: object) -> None:
    """Serve a page to play with: picture and prompt in, video out."""
    config = resolve_config(PageConfig, options)
    if find_spec("gradio") is None:
        raise ValueError("ui: gradio is not installed; pip install 'ti2v-distill[ui]'")
    with unscanned_imports():
        from commands.page_server import serve_page

    serve_page(config)


@cli.command("decode", cls=ConfigCommand)
@config_options(DecodeConfig)
def decode_command(**options: object) -> None:
    """Decode a zarr store of latents into mp4 files and a contact sheet."""
    with unscanned_imports():
        from stage1_encode.generation.decode import decode, decode_as_written

    config = resolve_config(DecodeConfig, options)
    for path in decode_as_written(config) if config.watch else decode(config):
        click.echo(str(path))


@cli.command("plot")
@click.argument("run")
def plot_command(run: str) -> None:
    """Draw the curves of a run into RUN/curves.png."""
    with unscanned_imports():
        from stage2_distill.monitoring.plot import plot_curves

    run = expand_path("run", run)
    check_local_path("run", run, is_output=True)
    click.echo(str(plot_curves(Path(run))))


@cli.command("demo")
@click.option("--out", default="demo", show_default=True, help="Folder for everything that the demo makes.")
def demo_command(out: str) -> None:
    """Run all steps on the small model of examples/nano."""
    with unscanned_imports():
        from commands.demo import run_demo

    out = expand_path("out", out)
    check_local_path("out", out, is_output=True)
    click.echo("\n".join(run_demo(Path(out))))


def echo_report(report: object, lines: list[str], *, as_json: bool) -> None:
    """Print a report as JSON or as lines, on the first rank."""
    if os.environ.get("RANK", "0") == "0":
        click.echo(json.dumps(report, indent=2, ensure_ascii=False) if as_json else "\n".join(lines))


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


def interruption_words() -> str:
    """What to do after Ctrl-C in the command of this process."""
    is_resumable = sys.argv[1:2] and sys.argv[1] in RESUMABLE
    remedy = "the same command resumes" if is_resumable else "nothing is damaged; the same command starts again"
    return f"stopped; {remedy}"


def main() -> None:
    """Run a command; exits with 2 after a user error and with 1 after a failure of the system."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # not if it is ignored, as with nohup
            signal.signal(signal.SIGINT, signal.default_int_handler)
        code = run_command()
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):  # Ctrl-C
        click.echo(interruption_words(), err=True)
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
