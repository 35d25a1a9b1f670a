"""Options of the commands `encode`, `verify` and `decode`."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from common.options import (
    MODEL_HELP,
    base_folder_option,
    check_fields,
    decoder_option,
    device_option,
    json_option,
    option,
    size_option,
)
from common.video import FrameSize, VideoSpec
from stage1_encode.media.rows import rows_folder
from stage1_encode.video_sizes.size_list import format_frame_sizes, list_frame_sizes

DTYPES = ("float32", "bfloat16")
VAE_DTYPES = ("float32", "tf32", "float16", "bfloat16")  # tf32: float32 weights, convolutions in TF32
ENGINES = ("local", "ray")
# PyTorch compiles no more graphs of a network (torch._dynamo.config.recompile_limit); which sizes would go without
# depends on their order, and they would have other bytes after a kill.
MAX_COMPILED_SIZES = 8
HDR_RULES, UNTAGGED_HD_RULES = ("tonemap", "refuse"), ("bt601", "bt709")
NEGATIVE_PROMPT = (  # the official one of Wan2.2; do not translate it
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


@dataclass(frozen=True)
class EncodeConfig:
    """Options of `encode`."""

    data: str = option(
        help="CSV with columns video (or path) and prompt (or text), or latents of FastVideo or LightX2V.",
        path="input",
        group="data",
        alias="from",
    )
    model: str = option(help=MODEL_HELP, path="any", group="model")
    out: str = option(help="Folder of the data set.", path="output", group="output")
    num_frames: int = size_option("num_frames")
    height: int = size_option("height")
    width: int = size_option("width")
    fps: int = size_option("fps", advanced=True)
    sizes: str = option(
        "", "Several sizes, as 704x1280,1280x704 (height x width), or auto; rows go to the nearest shape.", group="size"
    )
    max_upscale: float = option(
        2.0, "With sizes: rows that must be enlarged more fail; 0 = none does.", minimum=0, group="size", advanced=True
    )
    shard_size: int = option(256, "CSV rows per shard.", minimum=1, group="output", advanced=True)
    batch_size: int = option(8, "Clips encoded at once.", minimum=1, group="speed")
    max_failure_rate: float = option(
        0.05,
        "Exit with code 1 if more rows fail than this share.",
        minimum=0,
        group="failures",
        old_name="max_failures",
    )
    retry_failures: bool = option(
        False, "Re-encode shards with failed rows, e.g. after a missing disk was mounted.", group="failures"
    )
    stop_after_failures: int = option(
        50, "Stop when this many rows have failed and none has succeeded; 0 = never.", minimum=0, group="failures",
        advanced=True,
    )  # fmt: skip
    read_timeout: float = option(
        30.0, "Seconds per file to read it.", above=0, group="failures", advanced=True, old_name="time_limit"
    )
    # plan.json keeps the dtypes, batch sizes and `compile`: they change the bytes of a data set.
    negative_prompt: str = option(NEGATIVE_PROMPT, "Prompt of the unconditional branch.", group="model", advanced=True)
    vae_dtype: str = option(
        "tf32", "Precision of the VAE; tf32 is float32 on a CPU.", choices=VAE_DTYPES, group="precision", advanced=True
    )
    text_dtype: str = option(
        "bfloat16", "Precision of the text encoder.", choices=DTYPES, group="precision", advanced=True
    )
    negative: str | None = option(
        None, "With --from: data set, or LightX2V condition file, that has the negative prompt's embedding.",
        path="input", group="data", advanced=True,
    )  # fmt: skip
    compile: bool = option(False, "Compile the encoders (a minute); faster from some thousand clips on.", group="speed")
    text_only: bool = option(False, "Allow rows without a video: their records have no first frame.", group="data")
    base_folder: str | None = base_folder_option()
    hdr: str = option(
        "tonemap", "Read HDR (HLG, PQ) as SDR, or let its rows fail.", choices=HDR_RULES, group="data", advanced=True
    )
    untagged_hd: str = option(
        "bt601",
        "Matrix of HD videos that name none: FFmpeg takes bt601, players bt709.",
        choices=UNTAGGED_HD_RULES,
        group="data",
        advanced=True,
    )
    text_batch_tokens: int = option(
        8192, "Prompt tokens embedded at once, with padding.", minimum=1, group="speed", advanced=True,
        old_name="text_tokens",
    )  # fmt: skip
    workers: int = option(0, "Processes that read files; 0 = one per CPU core, at most 16.", minimum=0, group="speed")
    engine: str = option(
        "local", "Encode in this process (or torchrun's ranks) or on a Ray cluster.", choices=ENGINES, group="devices"
    )
    shard_range: str = option(
        "",
        "Encode only shards A to B-1, given as A:B, for job arrays; empty = all.",
        group="devices",
        old_name="shards",
    )
    device: str = device_option()

    def __post_init__(self) -> None:
        check_fields(self)
        _ = self.spec, self.shard_bounds, self.frame_sizes  # all raise ValueError for bad values
        if not self.frame_sizes and self.max_upscale != type(self).max_upscale:  # the class attribute is the default
            raise ValueError(f"max_upscale={self.max_upscale:g}: applies to several sizes; give --sizes too")
        if self.compile and len(self.frame_sizes) > MAX_COMPILED_SIZES:
            raise ValueError(f"sizes={self.sizes}: at most {MAX_COMPILED_SIZES} sizes with --compile; leave it out")

    @property
    def shard_bounds(self) -> tuple[int, int | None]:
        """The first shard to encode and the one after the last; None = to the end of the CSV."""
        if not self.shard_range:
            return 0, None
        match = re.fullmatch(r"(\d+):(\d+)", self.shard_range)
        if not match or int(match[1]) >= int(match[2]):
            raise ValueError(f"shard_range={self.shard_range}: must be two whole numbers A:B with A < B, as 0:100")
        return int(match[1]), int(match[2])

    @property
    def with_absolute_paths(self) -> "EncodeConfig":
        """The same options with absolute paths, for use in another working directory; a hub name stays."""
        # `model` may be a hub name, which looks like a relative path
        data, out = (str(Path(path).absolute()) for path in (self.data, self.out))
        model = str(Path(self.model).absolute()) if Path(self.model).exists() else self.model
        folder, is_default = rows_folder(Path(self.data), self.base_folder), self.base_folder is None
        # without the option paths follow the CSV when it is moved, except from a pipe
        base = None if is_default and folder == Path(data).parent else str(folder)
        negative = self.negative and str(Path(self.negative).absolute())
        sizes = format_frame_sizes(self.frame_sizes)  # what `auto` stands for may change
        return replace(self, data=data, out=out, model=model, base_folder=base, negative=negative, sizes=sizes)

    @property
    def spec(self) -> VideoSpec:
        """Size and frame rate of the videos."""
        return VideoSpec(self.num_frames, self.height, self.width, self.fps)

    @property
    def frame_sizes(self) -> tuple[FrameSize, ...]:
        """The sizes side by side, sorted; none = that of `spec`, whose area `auto` keeps."""
        return list_frame_sizes(self.sizes, self.height * self.width)

    @property
    def largest_spec(self) -> VideoSpec:
        """Size and frame rate of the largest videos, by which time, memory and disk are predicted."""
        largest = max(self.frame_sizes or (self.spec.frame_size,), key=lambda size: size.height * size.width)
        return replace(self.spec, height=largest.height, width=largest.width)


@dataclass(frozen=True)
class VerifyConfig:
    """Options of `verify`."""

    repair: bool = option(False, "Re-encode broken shards with the options of their data set.", group="repair")
    data: str | None = option(None, "CSV of the data set, if it was moved.", path="input", group="repair")
    base_folder: str | None = base_folder_option(group="repair")
    model: str | None = option(
        None, "Model folder or hub name, for --sheet and --repair.", path="any", group="first-frames"
    )
    sheet: str | None = option(
        None, "Image file for decoded first frames; needs --model.", path="output", group="first-frames"
    )
    device: str = device_option()
    json: bool = json_option()

    def __post_init__(self) -> None:
        check_fields(self)
        if self.sheet is not None and not self.sheet.endswith((".png", ".jpg")):
            raise ValueError(f"sheet={self.sheet}: must end in .png or .jpg")
        if self.model and self.sheet is None and not self.repair:
            raise ValueError(f"model={self.model}: verify alone needs none; give --sheet FILE.png or --repair too")
        if not self.model and self.sheet is not None:
            raise ValueError(f"sheet={self.sheet}: first frames are drawn by the VAE; give --model too")


@dataclass(frozen=True)
class DecodeConfig:
    """Options of `decode`."""

    latents: str = option(help="Latents: a folder X.zarr.", path="input", group="data")
    model: str = option(help="Model folder or hub name of the VAE.", path="any", group="model")
    out: str = option(help="Folder for the mp4 files and the contact sheet.", path="output", group="output")
    watch: bool = option(False, "Decode the previews of a training run as they appear, until it ends.", group="data")
    columns: int = option(
        6, "Frames per video on the contact sheet.", minimum=1, maximum=64, group="output", advanced=True
    )
    vae_dtype: str = option("float32", "Precision of the VAE.", choices=DTYPES, group="precision", advanced=True)
    decoder: str = decoder_option()
    device: str = device_option()

    def __post_init__(self) -> None:
        check_fields(self)
