"""One dataclass field = one click option = one key of the YAML file.

A configuration is a frozen dataclass whose fields are made with `option`. Its values come from the defaults,
then the YAML file of `--config`, then the command line, and `__post_init__` checks them with `check_fields`.
"""

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


@dataclass(frozen=True)
class OptionSpec:
    """What one option accepts, stated on its field and checked by `check_fields`."""

    help: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None  # inclusive
    maximum: float | None = None  # inclusive
    above: float | None = None  # exclusive lower bound

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


def option(
    default: object = MISSING,
    help: str = "",
    *,
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
) -> Any:  # noqa: ANN401
    """A dataclass field with its help text, choices and bounds; without a default the option is required."""
    return field(default=default, metadata={"spec": OptionSpec(help, choices, minimum, maximum, above)})


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
        check_type(item.name, value, hint)
        for part in value if isinstance(value, tuple) else (value,):
            option_spec(item).check(item.name, part)


def check_type(name: str, value: object, hint: Any) -> None:  # noqa: ANN401
    """Raise ValueError unless a value has its field's type; an int is also a float, a bool is no number."""
    kind = _plain_type(hint)
    if value is None:
        if not _optional(hint):
            raise ValueError(f"{name}=None: must be {getattr(kind, '__name__', 'a list')}")
    elif get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            raise ValueError(f"{name}={value!r}: must be a tuple")
        for part in value:
            check_type(name, part, get_args(kind)[0])
    elif isinstance(value, bool) is not (kind is bool) or not isinstance(
        value, (int, float) if kind is float else kind
    ):
        raise ValueError(f"{name}={value!r}: must be {kind.__name__}")


MODEL = "Model folder in the layout of Wan-AI/Wan2.2-TI2V-5B-Diffusers, or a hub name."
SIZES = {
    "num_frames": (VideoSpec.num_frames, "Frames of a video, 4k+1."),
    "height": (VideoSpec.height, "Height in pixels, a multiple of 32."),
    "width": (VideoSpec.width, "Width in pixels, a multiple of 32."),
    "fps": (VideoSpec.fps, "Frames a second."),
}


def size_option(name: str, *, minimum: int | None = None) -> Any:  # noqa: ANN401
    """The option of one field of `VideoSpec`."""
    return option(*SIZES[name], minimum=minimum)


def device_option() -> Any:  # noqa: ANN401
    """The option `device`, which `common.device.pick_device` understands."""
    return option("auto", "cpu, cuda, or auto: cuda where there is one.", choices=("auto", "cpu", "cuda"))


def text_rows_option() -> Any:  # noqa: ANN401
    """The option `text_rows`, the number of rows of a text that the denoiser computes."""
    text = "Text rows computed; fewer are quicker and the same, if prompts are short."
    return option(TEXT_LENGTH, text, minimum=1, maximum=TEXT_LENGTH)


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
    spec = option_spec(item)
    text = spec.help
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
    metavar = f"[{'|'.join(spec.choices)}]" if spec.choices else None
    return click.option(flag, item.name, default=None, help=text, type=kind, metavar=metavar)


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
        raise ValueError(f"missing --{missing[0].replace('_', '-')}: {option_spec(known[missing[0]]).help}")
    hints = get_type_hints(config)
    return config(**{name: typed(name, value, hints[name]) for name, value in values.items()})


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
