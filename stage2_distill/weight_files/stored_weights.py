"""The transformer's tensors in a file or folder of weights, under diffusers' names and read only when requested."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.files import read_json
from common.model_folder import WeightIndex
from stage2_distill.weight_files.safetensors_writer import DIFFUSERS_FILE

WEIGHTS_FILE = f"{DIFFUSERS_FILE}.safetensors"


class StoredTensor(Protocol):
    """A tensor in a file; indexing reads only the requested part."""

    def get_shape(self) -> list[int]:
        """Shape of the full tensor."""

    def __getitem__(self, index: object) -> Tensor:
        """Read a part."""


StoredTensors = Mapping[str, StoredTensor]  # by diffusers' names


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a diffusers model folder; ValueError if it has none."""
    index = folder / f"{WEIGHTS_FILE}.index.json"
    if index.is_file():
        return [folder / name for name in sorted(set(read_json(index, WeightIndex).weight_map.values()))]
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    raise ValueError(f"{folder}: holds no {WEIGHTS_FILE} (nor its .index.json)")


@contextmanager
def open_weights(folder: Path) -> Iterator[StoredTensors]:
    """All tensors of a diffusers model folder; the files are mapped, not read. ValueError if one is damaged."""
    found: dict[str, StoredTensor] = {}
    with ExitStack() as stack:
        for path in weight_files(folder):
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
                found |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: cannot be read ({error}); download the model again") from error
        yield found
