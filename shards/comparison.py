"""Who is compared with whom, on which conditions and seeds: written by sampling, read by decoding and the report."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from common.files import write_file

CONTEST, LATENTS = "contest.json", "latents.zarr"  # in the folder of an evaluation


@dataclass(frozen=True)
class Contestant:
    """One way to make the videos."""

    name: str  # short, the same in every evaluation
    label: str  # for people
    evaluations: int  # of the network, for one video
    sets: str  # its sets in the store are named by this and the seed


@dataclass(frozen=True)
class Contest:
    """The sets that are compared; all start from the same noise."""

    contestants: tuple[Contestant, ...]  # the teacher first: the others are measured against it
    seeds: tuple[int, ...]
    references: tuple[int, ...]  # for each seed that of the teacher's independent set
    count: int  # N, conditions
    guidance_scale: float

    @property
    def teacher(self) -> Contestant:
        """The one that the others are measured against."""
        return self.contestants[0]


def set_name(contestant: Contestant, seed: int) -> str:
    """Name of a set in the store of latents."""
    return f"{contestant.sets}-seed-{seed}"


def write_contest(folder: Path, contest: Contest) -> None:
    """Write `contest.json`."""
    write_file(folder / CONTEST, (json.dumps(asdict(contest), indent=1, ensure_ascii=False) + "\n").encode())


def read_contest(folder: Path) -> Contest:
    """Read `contest.json`."""
    fields = json.loads((folder / CONTEST).read_bytes())
    fields["contestants"] = tuple(Contestant(**contestant) for contestant in fields["contestants"])
    fields["seeds"], fields["references"] = tuple(fields["seeds"]), tuple(fields["references"])
    return Contest(**fields)
