"""Every option of every command states its choices and bounds once and is checked from Python, YAML and the shell."""

import math
import re
from dataclasses import Field, dataclass, fields
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

from cli import cli
from common.options import check_fields, option, option_spec, read_yaml, resolve_config
from stage1_encode.config import DecodeConfig, EncodeConfig, VerifyConfig
from stage2_distill.config import DistillConfig
from stage2_distill.evaluation.config import EvaluateConfig
from stage2_distill.export.config import ExportConfig
from stage2_distill.sampling.config import SampleConfig

COMMANDS: dict[str, tuple[type, dict[str, object]]] = {
    "encode": (EncodeConfig, {"data": "a.csv", "model": "m", "out": "o"}),
    "verify": (VerifyConfig, {}),
    "distill": (DistillConfig, {"shards": ("s",), "model": "m", "out": "o"}),
    "sample": (SampleConfig, {"checkpoint": "c", "model": "m", "out": "o.mp4", "prompt": "p"}),
    "evaluate": (EvaluateConfig, {"checkpoint": ("c",), "shards": "s", "model": "m", "out": "o"}),
    "export": (ExportConfig, {"checkpoint": "c", "model": "m", "format": "lora", "rank": 2, "out": "o"}),
    "decode": (DecodeConfig, {"latents": "l.zarr", "model": "m", "out": "o"}),
}


def wrong_values(item: Field) -> list[object]:
    """Values that a field must refuse, from what it states."""
    spec, kind = option_spec(item), str(item.type)
    wrong: list[object] = ["foo"] if spec.choices else []
    wrong += [spec.minimum - 1] if spec.minimum is not None else []
    wrong += [spec.maximum + 1] if spec.maximum is not None else []
    wrong += [spec.above] if spec.above is not None else []
    wrong += [math.nan, math.inf, -math.inf] if "float" in kind else []
    wrong = [int(value) if kind == "<class 'int'>" and math.isfinite(value) else value for value in wrong]
    return [(value,) if kind.startswith("tuple") else value for value in wrong]


CASES = [
    (command, item.name, value)
    for command, (config, _) in COMMANDS.items()
    for item in fields(config)
    for value in wrong_values(item)
]


def test_there_are_cases_of_every_kind() -> None:
    assert len(CASES) > 90
    assert {command for command, _, _ in CASES} == set(COMMANDS)


@pytest.mark.parametrize(("command", "name", "value"), CASES)
def test_wrong_value_is_refused_from_python_yaml_and_the_command_line(
    command: str, name: str, value: object, tmp_path: Path
) -> None:
    config, valid = COMMANDS[command]
    shown = value[0] if isinstance(value, tuple) else value
    with pytest.raises(ValueError, match=f"^{name}={shown}: "):
        config(**valid | {name: value})
    stored = tmp_path / "c.yaml"
    plain = list(value) if isinstance(value, tuple) else value
    stored.write_text(
        yaml.safe_dump({k: list(v) if isinstance(v, tuple) else v for k, v in valid.items()} | {name: plain})
    )
    with pytest.raises(ValueError, match=f"^{name}="):
        resolve_config(config, {"config": str(stored)})
    arguments = [f"--{name.replace('_', '-')}={shown}"]
    for key, text in valid.items():
        arguments += (
            [f"--{key}={part}" for part in (text if isinstance(text, tuple) else (text,))] if key != name else []
        )
    outcome = CliRunner().invoke(cli, [command, *(["s"] if command == "verify" else []), *arguments])
    assert isinstance(outcome.exception, ValueError | SystemExit), outcome.exception
    assert name in str(outcome.exception) + outcome.output or name.replace("_", "-") in outcome.output


@pytest.mark.parametrize("command", COMMANDS)
def test_every_field_refuses_another_type(command: str) -> None:
    config, valid = COMMANDS[command]
    for item in fields(config):
        with pytest.raises(ValueError, match=f"^{item.name}="):
            config(**valid | {item.name: object()})


@pytest.mark.parametrize("command", COMMANDS)
def test_defaults_are_valid_and_every_option_is_offered(command: str) -> None:
    config, valid = COMMANDS[command]
    config(**valid)
    offered = {parameter.name for parameter in cli.commands[command].params if isinstance(parameter, click.Option)}
    assert {item.name for item in fields(config)} <= offered
    assert all(option_spec(item).help for item in fields(config))


def test_message_lists_the_choices_and_the_nearest_one() -> None:
    valid = COMMANDS["distill"][1]
    with pytest.raises(
        ValueError, match=r"^optimizer_form=compct: choose one of auto, standard, compact; did you mean compact\?$"
    ):
        DistillConfig(**valid | {"optimizer_form": "compct"})


@pytest.mark.parametrize(
    ("value", "nearest"),
    [
        ("24gb", "16gb"),
        ("32", "16gb"),
        ("80GB", "full"),
        ("15 GiB", "12gb"),
        ("8gb", "12gb"),
        ("ful", "full"),
        ("x", ""),
    ],
)
def test_the_nearest_choice_of_a_size_is_one_that_fits(value: str, nearest: str) -> None:
    hint = f"; did you mean {nearest}?" if nearest else ""
    with pytest.raises(ValueError, match=r"^vram=") as caught:
        SampleConfig(**COMMANDS["sample"][1] | {"vram": value})
    assert str(caught.value) == f"vram={value}: choose one of auto, full, 16gb, 12gb{hint}"


def test_the_holes_of_the_review_are_closed() -> None:
    for wrong in (
        {"optimizer_form": "foo"},
        {"activation_checkpointing": "bar"},
        {"attention": "baz"},
        {"device": "tpu"},
    ):
        with pytest.raises(ValueError, match="choose one of"):
            DistillConfig(**COMMANDS["distill"][1] | wrong)
    for wrong in ({"vram": "foo"}, {"vae_dtype": "int4"}):
        with pytest.raises(ValueError, match="choose one of"):
            SampleConfig(**COMMANDS["sample"][1] | wrong)


NUMBER_OPTIONS = [
    (command, item.name)
    for command, (config, _) in COMMANDS.items()
    for item in fields(config)
    if re.search(r"\b(int|float)\b", str(item.type))
]
NO_NUMBERS = ("nan", "NaN", "-nan", "inf", "-inf", "Infinity", "1e999", "-1e999", ".nan", ".inf", "-.inf")


def test_there_are_numbers_of_every_kind() -> None:
    assert len(NUMBER_OPTIONS) > 60
    assert {("distill", "timesteps"), ("sample", "timesteps"), ("evaluate", "seeds")} < set(NUMBER_OPTIONS)


@pytest.mark.parametrize(("command", "name"), NUMBER_OPTIONS)
def test_what_is_no_number_is_refused_everywhere(command: str, name: str, tmp_path: Path) -> None:
    config, valid = COMMANDS[command]
    is_list = str({item.name: item for item in fields(config)}[name].type).startswith("tuple")
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in valid.items()}
    for text in NO_NUMBERS:
        for value in (text, [1000.0, yaml.safe_load(text)], [text]) if is_list else (text,):
            (tmp_path / "c.yaml").write_text(yaml.safe_dump(plain | {name: value}).replace(f"'{text}'", text))
            with pytest.raises(ValueError, match=f"^{name}="):
                resolve_config(config, {"config": str(tmp_path / "c.yaml")})
        required = [
            f"--{key}={part}"
            for key, value in plain.items()
            for part in (value if isinstance(value, list) else [value])
        ]
        arguments = ["s"] * (command == "verify") + required
        for shown in (text, f"1000,{text}") if is_list else (text,):
            outcome = CliRunner().invoke(cli, [command, *arguments, f"--{name.replace('_', '-')}={shown}"])
            assert isinstance(outcome.exception, ValueError | SystemExit), (text, outcome)
            assert name in str(outcome.exception) or f"--{name.replace('_', '-')}" in outcome.output, (text, outcome)


PATH_OPTIONS = [
    (command, item.name, option_spec(item).path)
    for command, (config, _) in COMMANDS.items()
    for item in fields(config)
    if option_spec(item).path in ("output", "input")
]
ADDRESSES = (
    "s3://b/x", "S3://b/x", "s3:/b/x", "gs://b/x", "hf://datasets/a/b", "file:///tmp/x", "FILE://x", "memory://x",
    "abfs://c@a.net/x", "http://h/x", "simplecache::s3://b/x", "scp://me@host:/x", "://x", "",
)  # fmt: skip


def holds_tuple(config: type, name: str) -> bool:
    """Whether an option can be repeated."""
    (item,) = [item for item in fields(config) if item.name == name]
    return str(item.type).startswith("tuple")


def test_every_option_that_is_written_says_so() -> None:
    outputs = {(command, name) for command, name, path in PATH_OPTIONS if path == "output"}
    assert outputs == {(command, "sheet" if command == "verify" else "out") for command in COMMANDS}


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize(("command", "name", "path"), PATH_OPTIONS)
def test_an_address_is_refused_where_only_local_files_are_used(
    command: str, name: str, path: str, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config, valid = COMMANDS[command]
    if name in ("data", "prompt"):  # `sample` takes one of the two
        valid = {key: value for key, value in valid.items() if key != "prompt"}
    value = (address,) if holds_tuple(config, name) else address
    verb = "written" if path == "output" else "read"
    with pytest.raises(ValueError, match=rf"^{name}=.*: (only local files are {verb}|is no path); \S.*"):
        config(**valid | {name: value})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [["demo", "--out"], ["plot"]])
@pytest.mark.parametrize("address", ADDRESSES)
def test_demo_and_plot_refuse_an_address_too(
    command: list[str], address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = CliRunner().invoke(cli, [*command, address])
    assert isinstance(outcome.exception, ValueError), outcome
    assert list(tmp_path.iterdir()) == []


def test_the_remedy_names_the_tool_of_the_store() -> None:
    for address, remedy in {
        "S3://b/x": "aws s3 cp --recursive", "gs://b": "gcloud storage cp -r", "hf://a": "hf upload",
        "sftp://h/x": "rclone copy", "file:///x": "give the path without file://",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=remedy):
            EncodeConfig("a.csv", "m", address)


@pytest.mark.parametrize("name", ["out-12:30", "file:x", "a:b/c", "data:x", "concat:x", "pipe:1", "C:/x", "./a://b"])
def test_a_colon_is_a_part_of_a_name(name: str) -> None:
    assert EncodeConfig(name, "m", name).out == name


@dataclass(frozen=True)
class Renamed:
    """A configuration with an option that had another name and other values in the last release."""

    new_name: str = option("on", "Text.", choices=("on", "off"), old_name="ancient", old_values={"never": "off"})

    def __post_init__(self) -> None:
        check_fields(self)


def test_old_name_and_old_value_are_accepted_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    assert resolve_config(Renamed, {"ancient": "never"}) == Renamed("off")
    assert caplog.messages == ["options: ancient is now called new_name; the old name goes with the next release"]


def test_old_name_in_yaml(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "c.yaml").write_text("ancient: never\n")
    assert resolve_config(Renamed, {"config": str(tmp_path / "c.yaml")}) == Renamed("off")
    assert len(caplog.messages) == 1


def test_bare_off_in_yaml_is_the_choice_off(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("new_name: off\n")
    assert resolve_config(Renamed, {"config": str(tmp_path / "c.yaml")}) == Renamed("off")


def test_old_name_beside_the_new_one_is_refused() -> None:
    with pytest.raises(ValueError, match="^ancient=never: is the old name of new_name, which is given too"):
        resolve_config(Renamed, {"ancient": "never", "new_name": "on"})


def test_old_value_under_the_new_name_is_refused() -> None:
    with pytest.raises(ValueError, match="^new_name=never: choose one of on, off"):
        resolve_config(Renamed, {"new_name": "never"})


def test_help_shows_common_options_by_group_and_help_all_the_rest() -> None:
    short = CliRunner().invoke(cli, ["distill", "--help"]).output
    full = CliRunner().invoke(cli, ["distill", "--help-all"]).output
    for item in fields(DistillConfig):
        flag = "--" + item.name.replace("_", "-")
        assert flag in full
        assert (f"{flag} " in short) is not option_spec(item).advanced


@pytest.mark.parametrize(
    ("text", "value"), [("81", 81), ("[81, 121]", "81,121"), ("81,121", "81,121"), ("81:0.3,121:0.7", "81:0.3,121:0.7")]
)
def test_a_number_or_several_come_from_yaml_and_the_command_line(text: str, value: int | str, tmp_path: Path) -> None:
    _, options = COMMANDS["distill"]
    path = tmp_path / "options.yaml"
    path.write_text(f"num_frames: {text}\n")
    assert resolve_config(DistillConfig, options | {"config": str(path)}).num_frames == value
    if "[" not in text:
        assert resolve_config(DistillConfig, options | {"num_frames": text}).num_frames == value


PATHS = [
    (command, item.name)
    for command, (config, _) in COMMANDS.items()
    for item in fields(config)
    if option_spec(item).path
]


def test_every_option_that_names_a_file_or_folder_says_so() -> None:
    texts = {
        item.name
        for config, _ in COMMANDS.values()
        for item in fields(config)
        if "str" in str(item.type) and not option_spec(item).choices and not option_spec(item).path
    }
    assert texts == {"prompt", "negative_prompt", "shard_range", "num_frames", "size", "sizes"}


@pytest.mark.parametrize(("command", "name"), PATHS)
def test_home_and_variables_in_paths(command: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Expanded in a YAML file and on the command line; what exists under that very name stays as it is."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WHERE", str(tmp_path))
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.chdir(tmp_path)
    config, valid = COMMANDS[command]
    end = ".png" if name == "sheet" else ".mp4" if (command, name) == ("sample", "out") else ""
    needed = {"model": "m"} | ({"sheet": "s.png"} if command == "verify" else {})  # either is refused without the other
    valid = {key: value for key, value in (needed | valid).items() if key != name}
    if (command, name) == ("sample", "data"):
        valid = {"checkpoint": "c", "model": "m", "out": "o"}
    is_tuple = holds_tuple(config, name)

    def resolve(text: str, *, from_yaml: bool) -> str:
        value = (text,) if is_tuple else text
        if from_yaml:
            (tmp_path / "c.yaml").write_text(yaml.safe_dump({name: list(value) if is_tuple else value}))
        resolved = vars(resolve_config(config, valid | ({"config": "$WHERE/c.yaml"} if from_yaml else {name: value})))[
            name
        ]
        return resolved[0] if is_tuple else resolved

    for from_yaml in (False, True):
        for text, expected in (
            ("~/x", tmp_path / "home" / "x"), ("$WHERE/x", tmp_path / "x"), ("${WHERE}/a b~", tmp_path / "a b~"),
            ("x~/y", "x~/y"), ("cost$5", "cost$5"), ("./~x", "./~x"),
        ):  # fmt: skip
            assert resolve(f"{text}{end}", from_yaml=from_yaml) == f"{expected}{end}"
        for text, words in (("$NOWHERE/x", "NOWHERE is not set"), ("~nobody-here/x", "there is no such user")):
            with pytest.raises(ValueError, match=rf"^{name}=.*{words}"):
                resolve(f"{text}{end}", from_yaml=from_yaml)
    for folder in (f"$NOWHERE{end}", f"~nobody-here{end}"):
        (tmp_path / folder).mkdir()
        assert resolve(folder, from_yaml=False) == folder


def test_home_and_variables_in_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for words in (["verify", "~/none"], ["plot", "~/none"], ["encode", "--config", "~/none"]):
        error = CliRunner().invoke(cli, words).exception
        assert str(tmp_path / "none") in str(error)


@pytest.mark.parametrize("content", ["?", "1: 2", "[" * 3000, "a: 2020-99-99", "\0"])
def test_a_file_that_yaml_itself_fails_on_is_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(ValueError, match=rf"^config={tmp_path}/x.yaml: [^\n]+$"):
        read_yaml(str(tmp_path / "x.yaml"))


def test_a_config_that_is_no_file_says_what_to_give(tmp_path: Path) -> None:
    for path, problem in ((tmp_path / "none.yaml", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(ValueError, match=f"^config={path}: {problem}; give the path of a YAML file$"):
            read_yaml(str(path))
