"""One dataclass field = one click option = one key of the YAML file.

A configuration is a frozen dataclass whose fields are made with `option`. Its values come from the defaults,
then the YAML file of `--config`, then the command line, and `__post_init__` checks them with `check_fields`.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import click
import yaml

from common.video import TEXT_LENGTH, VideoSpec

Config = TypeVar("Config")
MODEL_HELP = "Model folder in the layout of Wan-AI/Wan2.2-TI2V-5B-Diffusers, or a hub name."
SIZE_OPTIONS = {
    "num_frames": (VideoSpec.num_frames, "Frames of a video, 4k+1."),
    "height": (VideoSpec.height, "Height in pixels, a multiple of 32."),
    "width": (VideoSpec.width, "Width in pixels, a multiple of 32."),
    "fps": (VideoSpec.fps, "Frames a second."),
}


@dataclass(frozen=True)
class OptionSpec:
    """What one option accepts, stated on its field and checked by `check_fields`."""

    help: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None  # inclusive
    maximum: float | None = None  # inclusive
    above: float | None = None  # exclusive lower bound
    group: str = "general"  # heading in --help
    advanced: bool = False  # listed by --help-all only
    old_name: str = ""  # accepted for one release
    old_values: Mapping[str, str] = field(default_factory=dict)  # what values under the old name are called today

    def check(self, name: str, value: object) -> None:
        """Raise ValueError if one value is not a choice, not a finite number or out of bounds."""
        if self.choices and value not in self.choices:
            nearest = get_close_matches(str(value), self.choices, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise ValueError(f"{name}={value}: choose one of {', '.join(self.choices)}{hint}")
        if not isinstance(value, int | float) or isinstance(value, bool):
            return
        if not math.isfinite(value):
            raise ValueError(f"{name}={value}: must be a finite number")
        if self.above is not None and value <= self.above:
            raise ValueError(f"{name}={value}: must be more than {self.above:g}")
        low, high = self.minimum, self.maximum
        if (low is not None and value < low) or (high is not None and value > high):
            bounds = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
            raise ValueError(f"{name}={value}: must be {bounds}")


def option(default: object = MISSING, help: str = "", **facts: Any) -> Any:  # noqa: ANN401
    """A dataclass field with its `OptionSpec`; without a default the option is required."""
    return field(default=default, metadata={"spec": OptionSpec(help, **facts)})


def option_spec(item: Field[Any]) -> OptionSpec:
    """The specification of a configuration's field."""
    spec = item.metadata["spec"]
    assert isinstance(spec, OptionSpec)
    return spec


def check_fields(config: object) -> None:
    """Raise ValueError for the first field of a configuration with a wrong type, an unknown choice or a bad number.

    Each `__post_init__` calls this, so values from Python, a YAML file and the command line pass the same check.
    """
    hints = get_type_hints(type(config))
    for item in fields(config):  # type: ignore[arg-type]
        value, hint = vars(config)[item.name], hints[item.name]
        check_value_type(item.name, value, hint)
        for part in value if isinstance(value, tuple) else (value,):
            option_spec(item).check(item.name, part)


def check_value_type(name: str, value: object, hint: Any) -> None:  # noqa: ANN401
    """Raise ValueError unless a value has its field's type; an int is also a float, a bool is no number."""
    kind = _plain_type(hint)
    if value is None:
        if not _is_optional(hint):
            raise ValueError(f"{name}=None: must be {getattr(kind, '__name__', 'a list')}")
    elif get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            raise ValueError(f"{name}={value!r}: must be a tuple")
        for part in value:
            check_value_type(name, part, get_args(kind)[0])
    elif isinstance(value, bool) is not (kind is bool) or not isinstance(
        value, (int, float) if kind is float else kind
    ):
        raise ValueError(f"{name}={value!r}: must be {kind.__name__}")


def size_option(name: str, *, minimum: int | None = None, advanced: bool = False) -> Any:  # noqa: ANN401
    """The option of one field of `VideoSpec`."""
    return option(*SIZE_OPTIONS[name], minimum=minimum, group="size", advanced=advanced)


def device_option(*, advanced: bool = False) -> Any:  # noqa: ANN401
    """The option `device`, which `common.device.pick_device` understands."""
    return option(
        "auto",
        "cpu, cuda, or auto: cuda if available.",
        choices=("auto", "cpu", "cuda"),
        group="devices",
        advanced=advanced,
    )


def max_text_tokens_option(*, advanced: bool = True, old_name: str = "text_rows") -> Any:  # noqa: ANN401
    """The option `text_rows`, the number of rows of a text that the denoiser computes."""
    text = "Text rows computed; fewer are quicker and the same, if prompts are short."
    return option(TEXT_LENGTH, text, minimum=1, maximum=TEXT_LENGTH, group="data", advanced=advanced, old_name=old_name)


class NumberList(click.ParamType):
    """Numbers separated by commas, as `1000,750,500,250`."""

    name = "numbers"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...] | None:
        """Parse one option value."""
        if value is None or isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers like 1000,750,500,250", param, ctx)


def _plain_type(hint: Any) -> Any:  # noqa: ANN401
    """The type behind `X | None`."""
    return next((arg for arg in get_args(hint) if arg is not type(None)), hint) if _is_optional(hint) else hint


def _is_optional(hint: Any) -> bool:  # noqa: ANN401
    return type(None) in get_args(hint)


class ConfigOption(click.Option):
    """A click option that knows its heading in the help and whether it is advanced."""

    def __init__(self, *names: Any, group: str = "general", advanced: bool = False, **settings: Any) -> None:  # noqa: ANN401
        super().__init__(*names, **settings)
        self.group, self.advanced = group, advanced


class ConfigCommand(click.Command):
    """A command whose `--help` lists the common options by group, and whose `--help-all` lists all of them."""

    show_all = False

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section per group, in the order in which the groups first appear."""
        sections: dict[str, list[tuple[str, str]]] = {}
        hidden = 0
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            if isinstance(parameter, ConfigOption) and parameter.advanced and not self.show_all:
                hidden += 1
                continue
            group = parameter.group if isinstance(parameter, ConfigOption) else "general"
            sections.setdefault(group, []).append(record)
        general = sections.pop("general", [])
        for title, records in [*sections.items(), ("general", general)]:
            with formatter.section(title.capitalize()):
                formatter.write_dl(records)
        if hidden:
            formatter.write_paragraph()
            formatter.write_text(f"{hidden} advanced options are listed by --help-all.")


def _print_all_help(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        assert isinstance(ctx.command, ConfigCommand)
        ctx.command.show_all = True
        click.echo(ctx.get_help())
        ctx.exit()


def _click_options(item: Field[Any], hint: Any) -> list[Callable[[Any], Any]]:  # noqa: ANN401
    """The click option of a field, and a hidden one for its old name."""
    kind, spec = _plain_type(hint), option_spec(item)
    text = spec.help
    if item.default is not MISSING and item.default is not None:
        shown = ",".join(f"{x:g}" for x in item.default) if isinstance(item.default, tuple) else item.default
        text += f"  [default: {shown}]"
    settings: dict[str, Any] = {"type": kind, "metavar": f"[{'|'.join(spec.choices)}]" if spec.choices else None}
    if kind is bool:
        settings = {}
    elif get_origin(kind) is tuple:
        numbers = get_args(kind)[0] is not str
        settings = {"type": NumberList() if numbers else str, "multiple": not numbers}
    decorators = []
    for name in filter(None, (item.name, spec.old_name)):
        flag = "--" + name.replace("_", "-")
        declared = f"{flag}/--no-{flag[2:]}" if kind is bool else flag
        decorators.append(
            click.option(
                declared, name, cls=ConfigOption, default=None, help=text, hidden=name != item.name,
                group=spec.group, advanced=spec.advanced, **settings,
            )
        )  # fmt: skip
    return decorators


def config_options(config: type) -> Callable[[Callable[..., object]], Callable[..., object]]:
    """Decorate a `ConfigCommand` with `--config`, `--help-all` and one option per field of `config`."""

    def decorate(command: Callable[..., object]) -> Callable[..., object]:
        hints = get_type_hints(config)
        for item in reversed(fields(config)):
            for decorator in _click_options(item, hints[item.name]):
                command = decorator(command)
        show_all = click.option(
            "--help-all", is_flag=True, is_eager=True, expose_value=False, callback=_print_all_help,
            help="Show every option and exit.",
        )  # fmt: skip
        return show_all(
            click.option("--config", help="YAML file with any of these options; the command line wins.")(command)
        )

    return decorate


def rename_old_keys(config: type, values: Mapping[str, object], *, where: str | None = None) -> dict[str, object]:
    """Replace the option names of earlier releases by today's, with one warning per name if `where` is given.

    ValueError if a value is given under both names.
    """
    renamed_fields = {option_spec(item).old_name: item for item in fields(config) if option_spec(item).old_name}
    renamed = {key: value for key, value in values.items() if key not in renamed_fields}
    for old, item in renamed_fields.items():
        value, new, spec = values.get(old), item.name, option_spec(item)
        if value is None or value == ():
            continue
        if renamed.get(new) not in (None, ()):
            raise ValueError(f"{old}={value}: is the old name of {new}, which is given too; keep {new} alone")
        renamed[new] = spec.old_values.get(str(value), value)
        if where is not None:
            logging.warning("%s: %s is now called %s; the old name goes with the next release", where, old, new)
    return renamed


def read_yaml(path: str) -> dict[str, object]:
    """The keys of a YAML file; ValueError with one line where it cannot be read."""
    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"config={path}: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"config={path}: must hold KEY: VALUE lines")
    return loaded


def resolve_config(config: type[Config], options: Mapping[str, object]) -> Config:
    """Build a configuration from `given` options (None = not given), the YAML file that they name, and defaults."""
    values = read_yaml(str(options["config"])) if options.get("config") else {}
    values = rename_old_keys(config, values, where=f"config={options.get('config')}")
    options = rename_old_keys(config, options, where="options")
    known_fields = {item.name: item for item in fields(config)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(known_fields))
    if unknown:
        raise ValueError(
            f"config={options['config']}: unknown {', '.join(unknown)}; known are {', '.join(known_fields)}"
        )
    values |= {
        key: value for key, value in options.items() if key in known_fields and value is not None and value != ()
    }
    missing = [name for name, item in known_fields.items() if item.default is MISSING and name not in values]
    if missing:
        raise ValueError(f"missing --{missing[0].replace('_', '-')}: {option_spec(known_fields[missing[0]]).help}")
    hints = get_type_hints(config)
    return config(**{name: convert_value(name, value, hints[name]) for name, value in values.items()})


def convert_value(name: str, value: object, hint: Any) -> object:  # noqa: ANN401
    """A YAML or command-line value as the field's type; ValueError where it is something else."""
    kind = _plain_type(hint)
    if value is None:
        if not _is_optional(hint):
            raise ValueError(f"{name} is empty: give a value, or leave the line out")
        return None
    if get_origin(kind) is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(convert_value(name, item, get_args(kind)[0]) for item in items)
    if isinstance(value, bool) is not (kind is bool) or (kind is int and isinstance(value, float) and value % 1):
        raise ValueError(f"{name}={value}: must be {kind.__name__}")
    try:
        return kind(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}={value}: must be {kind.__name__}") from error


def write_config(path: Path, config: object) -> None:
    """Write a resolved configuration as YAML that `--config` reads back, whole or not at all."""
    plain = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in asdict(config).items()  # type: ignore[call-overload]
    }
    partial = path.with_name(path.name + ".partial")
    partial.write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), encoding="utf-8")
    partial.replace(path)
