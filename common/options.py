"""One dataclass field = one click option = one key of the YAML file.

A configuration is a frozen dataclass whose fields are made with `option`. Its values come from the defaults,
then the YAML file of `--config`, then the command line, and `__post_init__` checks them.
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, asdict, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import click
import yaml

from common.video import TEXT_LENGTH, VideoSpec

Config = TypeVar("Config")


def option(default: object = MISSING, help: str = "", *, choices: tuple[str, ...] = ()) -> Any:  # noqa: ANN401
    """A dataclass field with its help text; without a default the option must be given."""
    return field(default=default, metadata={"help": help, "choices": choices})


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError naming the knob and its choices."""
    if value not in choices:
        raise ValueError(f"{name}={value}: choose one of {', '.join(choices)}")


MODEL = "Model folder in the layout of Wan-AI/Wan2.2-TI2V-5B-Diffusers, or a hub name."
SIZES = {
    "num_frames": (VideoSpec.num_frames, "Frames of a video, 4k+1."),
    "height": (VideoSpec.height, "Height in pixels, a multiple of 32."),
    "width": (VideoSpec.width, "Width in pixels, a multiple of 32."),
    "fps": (VideoSpec.fps, "Frames a second."),
}


def size_option(name: str) -> Any:  # noqa: ANN401
    """The option of one field of `VideoSpec`."""
    return option(*SIZES[name])


def device_option() -> Any:  # noqa: ANN401
    """The option `device`, which `common.device.pick_device` understands."""
    return option("auto", "cpu, cuda, or auto: cuda where there is one.", choices=("auto", "cpu", "cuda"))


def at_least(name: str, value: float, low: float) -> None:
    """Raise ValueError where value < low."""
    if value < low:
        raise ValueError(f"{name}={value}: must be at least {low}")


def check_text_rows(rows: int) -> None:
    """Raise ValueError where `text_rows` is not a number of rows that a text can have."""
    if not 1 <= rows <= TEXT_LENGTH:
        raise ValueError(f"text_rows={rows}: must be between 1 and {TEXT_LENGTH}")


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
    return next((arg for arg in get_args(hint) if arg is not type(None)), hint) if _optional(hint) else hint


def _optional(hint: Any) -> bool:  # noqa: ANN401
    return type(None) in get_args(hint)


def _click_option(item: Field[Any], hint: Any) -> Callable[[Any], Any]:  # noqa: ANN401
    kind = _plain_type(hint)
    flag = "--" + item.name.replace("_", "-")
    text = item.metadata["help"]
    if item.default is not MISSING and item.default is not None:
        shown = ",".join(f"{x:g}" for x in item.default) if isinstance(item.default, tuple) else item.default
        text += f"  [default: {shown}]"
    if kind is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", item.name, default=None, help=text)
    if get_origin(kind) is tuple:
        numbers = get_args(kind)[0] is not str
        return click.option(
            flag, item.name, default=None, help=text, type=NumberList() if numbers else str, multiple=not numbers
        )
    if item.metadata["choices"]:
        kind = click.Choice(item.metadata["choices"])
    return click.option(flag, item.name, default=None, help=text, type=kind)


def config_options(config: type) -> Callable[[Callable[..., object]], Callable[..., object]]:
    """Decorate a click command with `--config` and one option a field of `config`."""

    def decorate(command: Callable[..., object]) -> Callable[..., object]:
        hints = get_type_hints(config)
        for item in reversed(fields(config)):
            command = _click_option(item, hints[item.name])(command)
        return click.option("--config", help="YAML file with any of these options; the command line wins.")(command)

    return decorate


def read_yaml(path: str) -> dict[str, object]:
    """The keys of a YAML file; ValueError with one line where it cannot be read."""
    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"config={path}: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"config={path}: must hold KEY: VALUE lines")
    return loaded


def resolve(config: type[Config], given: Mapping[str, object]) -> Config:
    """Build a configuration from `given` options (None = not given), the YAML file that they name, and defaults."""
    values = read_yaml(str(given["config"])) if given.get("config") else {}
    known = {item.name: item for item in fields(config)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"config={given['config']}: unknown {', '.join(unknown)}; known are {', '.join(known)}")
    values |= {key: value for key, value in given.items() if key in known and value is not None and value != ()}
    missing = [name for name, item in known.items() if item.default is MISSING and name not in values]
    if missing:
        raise ValueError(f"missing --{missing[0].replace('_', '-')}: {known[missing[0]].metadata['help']}")
    hints = get_type_hints(config)
    checked = {name: typed(name, value, hints[name]) for name, value in values.items()}
    for name, value in checked.items():
        if known[name].metadata["choices"]:
            one_of(name, str(value), known[name].metadata["choices"])
    return config(**checked)


def typed(name: str, value: object, hint: Any) -> object:  # noqa: ANN401
    """A YAML or command-line value as the field's type; ValueError where it is something else."""
    kind = _plain_type(hint)
    if value is None:
        if not _optional(hint):
            raise ValueError(f"{name} is empty: give a value, or leave the line out")
        return None
    if get_origin(kind) is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(typed(name, item, get_args(kind)[0]) for item in items)
    if isinstance(value, bool) is not (kind is bool) or (kind is int and isinstance(value, float) and value % 1):
        raise ValueError(f"{name}={value}: must be {kind.__name__}")
    try:
        return kind(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}={value}: must be {kind.__name__}") from error


def holds_more(folder: Path, name: str) -> bool:
    """Whether a folder without the configuration `name` holds anything but an unfinished one, or is none."""
    if not folder.exists() or (folder / name).is_file():
        return False
    return not folder.is_dir() or any(path.name != f"{name}.partial" for path in folder.iterdir())


def write_config(path: Path, config: object) -> None:
    """Write a resolved configuration as YAML that `--config` reads back, whole or not at all."""
    plain = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in asdict(config).items()  # type: ignore[call-overload]
    }
    partial = path.with_name(path.name + ".partial")
    partial.write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), encoding="utf-8")
    partial.replace(path)
