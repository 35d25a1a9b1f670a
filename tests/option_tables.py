"""Writes docs/options.md from the configurations: `python -m tests.option_tables`; test_readme holds the two equal."""

from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from commands.page_config import PageConfig
from common.options import option_spec
from stage1_encode.config import DecodeConfig, EncodeConfig, VerifyConfig
from stage2_distill.config import DistillConfig
from stage2_distill.evaluation.config import EvaluateConfig
from stage2_distill.export.config import ExportConfig
from stage2_distill.planning.config import DoctorConfig, PlanConfig
from stage2_distill.sampling.config import SampleConfig

PAGE = Path(__file__).parent.parent / "docs" / "options.md"
COMMANDS = {
    "encode": EncodeConfig,
    "verify": VerifyConfig,
    "plan": PlanConfig,
    "doctor": DoctorConfig,
    "distill": DistillConfig,
    "sample": SampleConfig,
    "ui": PageConfig,
    "decode": DecodeConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
}
HEAD = """# Options

Every option is a key of the YAML file of `--config` too; the command line wins over the file. `--help` shows the common
options of a command, `--help-all` all of them. A yes-or-no option `--compile` has the opposite `--no-compile`.
In paths a leading `~` and environment variables (`$DATA/clips`) are expanded, in the file as on the command line.
Names in brackets are those of the last release, which are accepted for one release more, with one warning.
A second name, as `--from`, is for the command line; in a file the first one counts.
"""


def default_text(default: object) -> str:
    """A default as the tables write it."""
    if default is MISSING:
        return "required"
    if isinstance(default, tuple):
        return "`" + ",".join(f"{x:g}" for x in default) + "`"
    if default is None or default == "":
        return ""
    if isinstance(default, bool):
        return "on" if default else "off"
    return "the official one" if len(str(default)) > 60 else f"`{default}`"


def option_row(item: Field[Any]) -> str:
    """One row of a table: option, default, choices or bounds, meaning."""
    spec = option_spec(item)
    name = f"`--{item.name.replace('_', '-')}`"
    if spec.alias:
        name += f", `--{spec.alias}`"
    if spec.old_name:
        name += f" (`--{spec.old_name.replace('_', '-')}`)"
    values = ", ".join(f"`{choice}`" for choice in spec.choices)
    if spec.maximum is not None:
        values = f"{spec.minimum:g} to {spec.maximum:g}"
    elif spec.minimum is not None or spec.above is not None:
        values = f">= {spec.minimum:g}" if spec.minimum is not None else f"> {spec.above:g}"
    return f"| {name} | {default_text(item.default)} | {values} | {spec.help} |"


def options_page() -> str:
    """The whole page."""
    parts = [HEAD]
    for command, config in COMMANDS.items():
        parts.append(f"\n## {command}\n")
        groups = dict.fromkeys(option_spec(item).group for item in fields(config))
        for group in groups:
            rows = [option_row(item) for item in fields(config) if option_spec(item).group == group]
            parts.append("\n".join([f"\n**{group.capitalize()}**\n", "| option | default | values | meaning |"]
                                   + ["|---|---|---|---|", *rows, ""]))  # fmt: skip
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(options_page(), encoding="utf-8")
