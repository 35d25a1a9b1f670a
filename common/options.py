"""One dataclass field = one click option = one key of the YAML file.

A configuration is a frozen dataclass whose fields are made with `option`. Its values come from the defaults,
then the YAML file of `--config`, then the command line, and `__post_init__` checks them with `check_fields`.
"""

import logging
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import click
import yaml

from common.files import check_local_path, write_file
from common.video import TEXT_LENGTH, VideoSpec

Config = TypeVar("Config")
MODEL_HELP = "Model folder in the layout of Wan-AI/Wan2.2-TI2V-5B-Diffusers, or a hub name."
FULL_DECODER = "full"  # of `decoder`: the VAE's own
SIZE_OPTIONS = {
    "num_frames": (VideoSpec.num_frames, "Frames of a video, 4k+1."),
    "height": (VideoSpec.height, "Height in pixels, a multiple of 32."),
    "width": (VideoSpec.width, "Width in pixels, a multiple of 32."),
    "fps": (VideoSpec.fps, "Frames per second."),
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
    path: str = ""  # "output" or "input": a local path, which is written or read; "any": also an address or a hub name
    advanced: bool = False  # listed by --help-all only
    alias: str = ""  # another name of the flag, for good
    old_name: str = ""  # accepted for one release
    old_values: Mapping[str, str] = field(default_factory=dict)  # {value under the old name: its name today}
    sizes: Mapping[int, str] = field(default_factory=dict)  # {GB: the choice that needs so many}

    def check(self, name: str, value: object, kind: type) -> None:
        """Raise ValueError for another type, an unknown choice, a number out of bounds or a path that is an address."""
        accepted = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or isinstance(value, bool) is not (kind is bool):  # a bool is also an int
            raise ValueError(f"{name}={value!r}: must be {type_name(kind)}")
        if self.choices and value not in self.choices:
            nearest = self.nearest_choice(str(value))
            hint = f"; did you mean {nearest}?" if nearest else ""
            raise ValueError(f"{name}={value}: choose one of {', '.join(self.choices)}{hint}")
        if isinstance(value, str) and self.path in ("output", "input"):
            check_local_path(name, value, is_output=self.path == "output")
        if not isinstance(value, int | float):
            return
        if not math.isfinite(value):
            raise ValueError(f"{name}={value}: must be a finite number")
        if self.above is not None and value <= self.above:
            raise ValueError(f"{name}={value}: must be more than {self.above:g}")
        low, high = self.minimum, self.maximum
        if (low is not None and value < low) or (high is not None and value > high):
            top = (
                high if isinstance(high, int) else f"{high:g}" if high is not None else None
            )  # all digits of an integer
            bounds = f"at least {low:g}" if high is None else f"between {low:g} and {top}"
            raise ValueError(f"{name}={value}: must be {bounds}")

    def nearest_choice(self, value: str) -> str:
        """The choice that a value was probably meant to be: the nearest by size or by spelling; "" if there is none."""
        size = re.fullmatch(r"(\d{1,6}) ?(gi?b)?", value, re.IGNORECASE) if self.sizes else None
        if size is None:
            return next(iter(get_close_matches(value, self.choices, n=1)), "")
        fitting = [needed for needed in self.sizes if needed <= int(size[1])]
        return self.sizes[max(fitting, default=min(self.sizes))]


def option(default: object = MISSING, help: str = "", **facts: Any) -> Any:  # noqa: ANN401
    """A dataclass field with its `OptionSpec`; without a default the option is required."""
    return field(default=default, metadata={"spec": OptionSpec(help, **facts)})


def option_of(config: type, name: str) -> Any:  # noqa: ANN401
    """The same option as that of another configuration, without its old name."""
    (item,) = (item for item in fields(config) if item.name == name)
    spec = replace(option_spec(item), old_name="", old_values={})
    return field(default=item.default, metadata={"spec": spec})


def size_option(name: str, *, minimum: int | None = None, advanced: bool = False) -> Any:  # noqa: ANN401
    """The option of one field of `VideoSpec`."""
    return option(*SIZE_OPTIONS[name], minimum=minimum, group="size", advanced=advanced)


def base_folder_option(*, group: str = "data") -> Any:  # noqa: ANN401
    """The option `base_folder` of the commands that read a CSV."""
    return option(
        None, "Folder where relative paths of the CSV start; default: the CSV's.", path="input", group=group,
        advanced=True,
    )  # fmt: skip


def device_option(*, advanced: bool = False) -> Any:  # noqa: ANN401
    """The option `device`, which `common.device.pick_device` understands."""
    text = "cpu, cuda, or auto: cuda if available."
    return option("auto", text, choices=("auto", "cpu", "cuda"), group="devices", advanced=advanced)


def decoder_option() -> Any:  # noqa: ANN401
    """The option `decoder` of the commands that make pixels."""
    text = "full (exact), or the file of a tiny or pruned decoder of this VAE: faster, an approximation."
    return option(FULL_DECODER, text, path="input", group="speed", advanced=True)


def json_option() -> Any:  # noqa: ANN401
    """The option `json` of the commands that report something."""
    return option(False, "Print JSON instead of text.", group="output")


def max_text_tokens_option(*, advanced: bool = True, old_name: str = "text_rows") -> Any:  # noqa: ANN401
    """The option `max_text_tokens`, the number of text rows that the denoiser computes."""
    text = "Text tokens computed; a smaller number is faster and equivalent if all prompts are shorter."
    return option(TEXT_LENGTH, text, minimum=1, maximum=TEXT_LENGTH, group="data", advanced=advanced, old_name=old_name)


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
        kind, is_tuple = _value_type(hint)
        if value is None and type(None) in get_args(hint):
            continue
        if is_tuple and not isinstance(value, tuple):
            raise ValueError(f"{item.name}={value!r}: must be a tuple")
        for part in value if is_tuple else (value,):
            option_spec(item).check(item.name, part, kind)


def type_name(kind: Any) -> str:  # noqa: ANN401
    """The name of a type, or of several as `int | str`."""
    return str(kind) if get_args(kind) else str(kind.__name__)


def convert_value(value: object, hint: Any) -> object:  # noqa: ANN401
    """A YAML or command-line value in the field's type if nothing is lost, else as it is, for `check_fields`."""
    kind, is_tuple = _value_type(hint)
    if value is None or isinstance(value, bool) or kind is bool:
        return value
    if get_args(kind):  # int | str: one number, or a text that lists several
        number, text = get_args(kind)
        listed = ",".join(map(str, value)) if isinstance(value, list | tuple) else value
        converted = convert_value(listed, number)
        return converted if isinstance(converted, number) else convert_value(listed, text)
    if is_tuple:
        if isinstance(value, str) and kind is not str:  # a path may contain a comma
            value = value.split(",")
        return tuple(convert_value(part, kind) for part in (value if isinstance(value, list | tuple) else [value]))
    try:
        converted = kind(value)
    except (TypeError, ValueError, OverflowError):
        return value
    return value if kind is int and isinstance(value, float) and converted != value else converted


def expand_path(name: str, path: str) -> str:
    """The path of an option with a leading `~` and environment variables replaced; one that exists stays as it is.

    ValueError for a variable that is not set, or a user without a home.
    """
    if not (path.startswith("~") or "$" in path) or os.path.lexists(path):
        return path
    expanded = os.path.expandvars(path)
    if unset := re.search(r"\$\{?([A-Za-z_]\w*)", expanded):
        raise ValueError(
            f"{name}={path}: the environment variable {unset[1]} is not set; set it, or give the whole path"
        )
    try:
        return str(Path(expanded).expanduser()) if expanded.startswith("~") else expanded
    except RuntimeError as error:
        raise ValueError(f"{name}={path}: there is no such user; give the whole path") from error


def _expand_paths(item: Field[Any], value: object) -> object:
    """The value of an option, expanded if it is a path or several."""
    if not option_spec(item).path:
        return value
    if isinstance(value, tuple):
        return tuple(_expand_paths(item, part) for part in value)
    return expand_path(item.name, value) if isinstance(value, str) else value


def _value_type(hint: Any) -> tuple[Any, bool]:  # noqa: ANN401
    """X and whether it is that of a tuple's parts, for `X`, `tuple[X, ...]`, and either of them `| None`."""
    kind = get_args(hint)[0] if type(None) in get_args(hint) else hint
    is_tuple = get_origin(kind) is tuple
    return (get_args(kind)[0] if is_tuple else kind), is_tuple


class ConfigOption(click.Option):
    """A click option that knows its heading in the help and whether it is advanced."""

    def __init__(self, *names: Any, spec: OptionSpec, **settings: Any) -> None:  # noqa: ANN401
        super().__init__(*names, **settings)
        self.spec = spec


class ConfigCommand(click.Command):
    """A command whose `--help` lists the common options by group, and whose `--help-all` lists all of them."""

    show_all = False

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse an option that is given under both of its names, of which click would take the last."""
        for parameter in self.params:
            names = [flag for flag in parameter.opts if any(word.partition("=")[0] == flag for word in args)]
            if len(names) > 1 and isinstance(parameter, ConfigOption):
                raise ValueError(f"{parameter.name}: {' and '.join(names)} are the same option; give one of them")
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section per group, in the order in which the groups first appear, and "general" last."""
        sections: dict[str, list[tuple[str, str]]] = {}
        hidden_count, general = 0, OptionSpec("")
        for parameter in self.get_params(ctx):
            spec = parameter.spec if isinstance(parameter, ConfigOption) else general
            record = parameter.get_help_record(ctx)
            if record is not None and spec.advanced and not self.show_all:
                hidden_count += 1
            elif record is not None:  # None: an old name
                sections.setdefault(spec.group, []).append(record)
        for title in sorted(sections, key=lambda group: group == general.group):
            with formatter.section(title.capitalize()):
                formatter.write_dl(sections[title])
        if hidden_count:
            formatter.write_paragraph()
            formatter.write_text(f"{hidden_count} advanced options are listed by --help-all.")


def _print_all_help(ctx: click.Context, _: click.Parameter, requested: bool) -> None:
    if requested:
        assert isinstance(ctx.command, ConfigCommand)
        ctx.command.show_all = True
        click.echo(ctx.get_help())
        ctx.exit()


def _click_option(item: Field[Any], hint: Any, name: str) -> Callable[[Any], Any]:  # noqa: ANN401
    """The click option of a field under its own name, or a hidden one under its old name."""
    (kind, is_tuple), spec, flag = _value_type(hint), option_spec(item), "--" + name.replace("_", "-")
    text = spec.help
    if item.default is not MISSING and item.default is not None:
        shown = ",".join(f"{x:g}" for x in item.default) if isinstance(item.default, tuple) else item.default
        text += f"  [default: {shown}]"
    settings: dict[str, Any] = {"metavar": f"[{'|'.join(spec.choices)}]" if spec.choices else None}
    if kind is bool:
        flag = f"{flag}/--no-{flag[2:]}"
    elif is_tuple:  # numbers are separated by commas, strings by repeating the option
        settings = {"multiple": True} if kind is str else {"metavar": "NUMBERS"}
    else:
        settings["type"] = str if get_args(kind) else kind
    flags = [flag, f"--{spec.alias}"] if spec.alias and name == item.name else [flag]
    return click.option(
        *flags, name, cls=ConfigOption, default=None, help=text, hidden=name != item.name, spec=spec, **settings
    )


def config_options(config: type) -> Callable[[Callable[..., object]], Callable[..., object]]:
    """Decorate a `ConfigCommand` with `--config`, `--help-all` and one option per field of `config`."""
    hints = get_type_hints(config)
    decorators = [
        click.option(
            "--help-all", is_flag=True, is_eager=True, expose_value=False, callback=_print_all_help,
            help="Show every option and exit.",
        ),
        click.option("--config", help="YAML file with any of these options; the command line wins."),
    ]  # fmt: skip
    for item in fields(config):
        names = filter(None, (option_spec(item).old_name, item.name))
        decorators += [_click_option(item, hints[item.name], name) for name in names]

    def decorate(command: Callable[..., object]) -> Callable[..., object]:
        for decorator in reversed(decorators):  # the last one applied is listed first
            command = decorator(command)
        return command

    return decorate


def rename_old_keys(config: type, values: Mapping[str, object], *, where: str | None = None) -> dict[str, object]:
    """Replace the option names of the last release by today's, with one warning per name if `where` is given.

    ValueError if an option is given under both names.
    """
    renamed_fields = {option_spec(item).old_name: item for item in fields(config) if option_spec(item).old_name}
    renamed = {key: value for key, value in values.items() if key not in renamed_fields}
    for old, item in renamed_fields.items():
        value, new = values.get(old), item.name
        if value is None or value == ():
            continue
        if renamed.get(new) not in (None, ()):
            raise ValueError(f"{old}={value}: is the old name of {new}, which is given too; keep {new} alone")
        renamed[new] = option_spec(item).old_values.get(str(value), value)
        if where is not None:
            logging.warning("%s: %s is now called %s; the old name goes with the next release", where, old, new)
    return renamed


def read_yaml(path: str, *, option: str = "config") -> dict[str, object]:
    """The keys of the YAML file that `option` names; ValueError with one line if it cannot be read."""
    try:
        loaded = yaml.safe_load(Path(expand_path(option, path)).read_text(encoding="utf-8")) or {}
    except OSError as error:
        where = f"{option}={error.filename or path}"
        raise ValueError(f"{where}: {error.strerror or error}; give the path of a YAML file") from error
    except (ValueError, OverflowError, RecursionError, yaml.YAMLError) as error:  # of dates and deep nesting
        raise ValueError(f"{option}={path}: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise ValueError(f"{option}={path}: must hold KEY: VALUE lines")
    return loaded


def resolve_config(config: type[Config], options: Mapping[str, object]) -> Config:
    """Build a configuration from options (None or () = unset), the YAML file that they name, and defaults."""
    path = options.get("config")
    values = rename_old_keys(config, read_yaml(str(path)) if path else {}, where=f"config={path}")
    options = rename_old_keys(config, options, where="options")
    known_fields = {item.name: item for item in fields(config)}  # type: ignore[arg-type]
    unknown = sorted(values.keys() - known_fields.keys())
    if unknown:
        raise ValueError(f"config={path}: unknown {', '.join(unknown)}; known are {', '.join(known_fields)}")
    values |= {key: options[key] for key in known_fields if options.get(key) not in (None, ())}
    for name, item in known_fields.items():
        if values.get(name) is False and "off" in option_spec(item).choices:  # YAML reads a bare `off` as false
            values[name] = "off"
        if item.default is MISSING and name not in values:
            raise ValueError(f"missing --{name.replace('_', '-')}: {option_spec(item).help}")
    hints = get_type_hints(config)
    converted = {name: convert_value(value, hints[name]) for name, value in values.items()}
    return config(**{name: _expand_paths(known_fields[name], value) for name, value in converted.items()})


def write_config(path: Path, config: object) -> None:
    """Write a resolved configuration as YAML that `--config` reads back, completely or not at all."""
    options = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(config).items()}
    write_file(path, yaml.safe_dump(options, sort_keys=False, allow_unicode=True).encode())
