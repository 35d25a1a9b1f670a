"""The comparison of students with their teacher: written by sampling, read by decoding and the report."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from common.files import read_json, write_file

COMPARISON_FILE, LATENTS_STORE = "contest.json", "latents.zarr"  # in the folder of an evaluation


@dataclass(frozen=True)
class Candidate:
    """One way to make the videos."""

    name: str  # short, the same in every evaluation
    label: str  # for people
    evaluations: int  # of the network, per video
    sets: str  # first part of the names of its sets in the store


@dataclass(frozen=True)
class Comparison:
    """The sets that are compared; all start from the same noise. The fields are the keys of `contest.json`."""

    contestants: tuple[Candidate, ...]  # the teacher first
    seeds: tuple[int, ...]
    references: tuple[int, ...]  # for each seed, that of the teacher's independent set
    count: int  # N, conditions
    guidance_scale: float

    @property
    def teacher(self) -> Candidate:
        """The candidate that the others are measured against."""
        return self.contestants[0]


def latent_set_name(candidate: Candidate, seed: int) -> str:
    """Name of a set in the store of latents."""
    return f"{candidate.sets}-seed-{seed}"


def write_comparison(folder: Path, comparison: Comparison) -> None:
    """Write `contest.json`."""
    write_file(folder / COMPARISON_FILE, (json.dumps(asdict(comparison), indent=1, ensure_ascii=False) + "\n").encode())


def read_comparison(folder: Path) -> Comparison:
    """Read `contest.json`; ValueError if it is missing or damaged."""
    return read_json(folder / COMPARISON_FILE, Comparison)
