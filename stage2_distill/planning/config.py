"""Options of the commands `plan` and `doctor`."""

import math
from dataclasses import dataclass, fields
from difflib import get_close_matches

from common.options import MODEL_HELP, check_fields, device_option, json_option, option, read_yaml
from common.planning.cards import CARD_NAMES, CARDS, Card
from common.video import FrameSize, parse_frame_size
from stage2_distill.config import DistillConfig


@dataclass(frozen=True)
class PlanConfig:
    """Options of `plan`."""

    gpus: int = option(8, "GPUs of the run.", minimum=1, group="devices")
    gpu: str = option("h100", "Kind of GPU.", choices=CARD_NAMES, group="devices")
    records: int = option(10_000, "Records to encode and to train on.", minimum=1, group="data")
    sizes: tuple[str, ...] = option(
        (), "Size of records as HEIGHTxWIDTH, or HEIGHTxWIDTH:SHARE; repeat it for more; by default the recipe's.",
        group="data",
    )  # fmt: skip
    recipe: str | None = option(None, "YAML file for distill; by default its defaults.", path="input", group="recipe")
    set: tuple[str, ...] = option(
        (), "An option of distill as KEY=VALUE, such as lora_rank=32; repeat it for more.", group="recipe"
    )
    model: str | None = option(
        None, "Model folder whose size counts; by default Wan2.2-TI2V-5B's.", path="input", group="model"
    )
    price: float | None = option(None, "Price of a GPU-hour, in any currency.", minimum=0, group="devices")
    calibrate: bool = option(
        False, "Run two iterations here, on random data, and correct the plan by what they take; needs the model. The "
        "plan is then for GPUs like this machine's.", group="devices",
    )  # fmt: skip
    json: bool = json_option()

    def __post_init__(self) -> None:
        check_fields(self)
        if self.calibrate and self.model is None:
            raise ValueError("calibrate=True: runs iterations of a model; give --model")
        _ = self.size_shares

    @property
    def size_shares(self) -> dict[FrameSize, float]:
        """The share of each size in the records; ValueError for a text that is no size or a share that is not > 0."""
        shares: dict[FrameSize, float] = {}
        for text in (part for item in self.sizes for part in item.split(",")):
            size_text, colon, share_text = text.partition(":")
            try:
                size, share = parse_frame_size(size_text), float(share_text) if colon else 1.0
            except ValueError as error:
                raise ValueError(f"sizes={text}: {error}") from error
            if size in shares or not 0 < share < math.inf:
                raise ValueError(f"sizes={text}: each size needs one share above 0")
            shares[size] = share
        total = sum(shares.values())
        return {size: share / total for size, share in shares.items()}

    @property
    def card(self) -> Card:
        """The kind of GPU."""
        return next(card for card in CARDS if card.name == self.gpu)

    def distill_options(self) -> dict[str, object]:
        """The options of `distill` that are planned, as `resolve_config` takes them; ValueError for a bad KEY=VALUE."""
        if self.recipe:
            read_yaml(self.recipe, option="recipe")  # so that a message names the option that the user gave
        options: dict[str, object] = {"config": self.recipe, "shards": ("DATA",), "model": self.model or "MODEL"}
        options["out"], known = "RUN", [item.name for item in fields(DistillConfig)]
        if len(self.size_shares) == 1:
            options |= vars(*self.size_shares)
        for item in self.set:
            key, found, value = item.partition("=")
            if not (key and found):
                raise ValueError(f"set={item}: must be KEY=VALUE, such as lora_rank=32")
            if (name := key.replace("-", "_")) not in known:
                nearest = "".join(f"; did you mean {other}?" for other in get_close_matches(name, known, n=1))
                raise ValueError(f"set={item}: distill has no such option{nearest}")
            options[name] = {"true": True, "false": False}.get(value.lower(), value)
        return options


@dataclass(frozen=True)
class DoctorConfig:
    """Options of `doctor`."""

    model: str | None = option(None, MODEL_HELP, path="any", group="model")
    shards: tuple[str, ...] = option((), "Data set to read; repeat it for more.", path="any", group="data")
    out: str | None = option(None, "Folder that a run will write into.", path="output", group="output")
    device: str = device_option()
    json: bool = json_option()

    def __post_init__(self) -> None:
        check_fields(self)
