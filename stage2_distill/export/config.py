"""Options of export."""

from dataclasses import dataclass

from common.options import check_fields, device_option, option

DIFFUSERS, WAN, LORA = "diffusers", "wan", "lora"
FORMATS = (DIFFUSERS, WAN, LORA)
EXPORT_DTYPES = ("bfloat16", "float16", "float32")
EXPORTED_WEIGHTS = ("average", "student")


@dataclass(frozen=True)
class ExportConfig:
    """Options of `export`."""

    checkpoint: str = option(
        help="Folder of a run (its best checkpoint, else its newest, is used) or of one checkpoint.",
        path="input",
        group="model",
    )
    model: str = option(help="Model folder or hub name that the student was distilled from.", path="any", group="model")
    format: str = option(
        help="diffusers: a pipeline folder; wan: one file under the original names, for ComfyUI and others, with "
        "workflows; lora: a small file for use beside the base.", choices=FORMATS, group="output",
    )  # fmt: skip
    out: str = option(help="Folder to create; files in it carry its name.", path="output", group="output")
    weights: str = option("average", "Weights to export.", choices=EXPORTED_WEIGHTS, group="model")
    dtype: str = option("bfloat16", "Precision of the exported weights.", choices=EXPORT_DTYPES, group="model")
    rank: int | None = option(
        None, "For lora, from a run that trained all weights: rank of the differences' approximation.",
        minimum=1, group="model",
    )  # fmt: skip
    shards: str | None = option(
        None,
        "For --rank: data set of encode on which the error of sampled latents is measured.",
        path="any",
        group="data",
    )
    num_records: int = option(4, "Records of --shards that are sampled.", minimum=1, group="data", advanced=True)
    report: str | None = option(
        None, "Folder of evaluate whose figures the model card quotes.", path="input", group="data"
    )
    device: str = device_option(advanced=True)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.rank is not None and self.format != LORA:
            raise ValueError(f"rank={self.rank}: is for --format {LORA}; leave it out")
        if self.shards is not None and self.rank is None:
            raise ValueError(f"shards={self.shards}: measures the error of --rank; give --rank too, or leave it out")
