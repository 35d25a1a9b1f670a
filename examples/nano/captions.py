"""Writes prompts for scenes in several wordings, and parses prompts back into what they ask for."""

import re
from dataclasses import dataclass

from torch import Tensor

from examples.nano.world import BACKGROUNDS, COLOURS, FREE, NEVER, SHAPES, Scenes

NEGATIVE_PROMPT = "blurry, broken"
MOTION_WORDS = (
    ("right", "to the right"),
    ("down right", "to the lower right"),
    ("down", "downwards"),
    ("down left", "to the lower left"),
    ("left", "to the left"),
    ("up left", "to the upper left"),
    ("up", "upwards"),
    ("up right", "to the upper right"),
)  # after a verb of motion
VERBS = ("moves", "goes", "slides")
OTHER_WORDS = (
    ("grows", "gets bigger", "becomes larger"),
    ("shrinks", "gets smaller", "becomes tiny"),
    ("bounces", "bounces back", "turns back"),
    ("stays still", "does not move", "waits"),
    ("moves", "wanders", "travels somewhere"),
)  # grow, shrink, bounce, stay, free
ENTER_WORDS = ("appears", "pops up", "shows up")
SOMETHING = ("something", "another shape", "one more thing")
ARTICLES = ("a", "the", "one")
JOINTS = ((", ", ", "), (" and ", " and "), (" while ", " and "), (", ", " and "))
GROUNDS = ("", "", "", " on a {} background", " over a {} ground")
CLAUSE = re.compile(rf"^(?:{'|'.join(ARTICLES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) (.+)$")


@dataclass(frozen=True)
class Asked:
    """One object that a prompt asks for; None for what the prompt leaves open."""

    shape: int | None  # into SHAPES
    colour: int | None  # into COLOURS
    motion: int | None  # into MOTIONS, never FREE
    enters: bool  # it appears later


def phrases() -> dict[str, int]:
    """Return every motion phrase and the motion it names."""
    moving = {f"{verb} {direction}": m for m, words in enumerate(MOTION_WORDS) for direction in words for verb in VERBS}
    return moving | {words: 8 + m for m, choices in enumerate(OTHER_WORDS) for words in choices}


PHRASES = phrases()


def pick(choices: tuple[str, ...], u: float) -> str:
    """Return the choice at u in [0, 1)."""
    return choices[int(u * len(choices))]


def motion_phrase(motion: int, u: float, v: float) -> str:
    """Return words for a motion, chosen by u and v in [0, 1)."""
    if motion < 8:
        return f"{pick(VERBS, u)} {pick(MOTION_WORDS[motion], v)}"
    return pick(OTHER_WORDS[motion - 8], u)


def write_caption(shape: list[int], colour: list[int], motion: list[int], shown: list[bool], words: list[float]) -> str:
    """Return the clauses of a caption from one scene's attributes, one list entry per slot.

    An entering object that the caption does not describe has colour -1.
    """
    names = [f"{pick(ARTICLES, words[0])} {COLOURS[c]} {SHAPES[s]}" for s, c in zip(shape, colour, strict=True)]
    clauses = [f"{names[0]} {motion_phrase(motion[0], words[1], words[2])}"]
    if shown[1]:
        clauses.append(f"{names[1]} {motion_phrase(motion[1], words[3], words[2])}")
    if shown[2]:
        subject = names[2] if colour[2] >= 0 else pick(SOMETHING, words[4])
        clauses.append(f"{subject} {pick(ENTER_WORDS, words[5])}")
    joints = JOINTS[int(words[6] * len(JOINTS))]
    return clauses[0] + "".join(joints[i] + clause for i, clause in enumerate(clauses[1:]))


def captions(scenes: Scenes) -> list[str]:
    """Return the prompt of every scene (B)."""
    colour = scenes.colour.clone()
    colour[:, 2] = colour[:, 2].where(scenes.named, -1)
    fields: list[Tensor] = [scenes.shape, colour, scenes.motion, scenes.entry < NEVER, scenes.wording]
    kinds = [BACKGROUNDS[k] for k in scenes.background.tolist()]
    rows = zip(*(field.tolist() for field in fields), strict=True)
    return [write_caption(*row) + pick(GROUNDS, row[4][7]).format(kind) for row, kind in zip(rows, kinds, strict=True)]


def parse(prompt: str) -> tuple[Asked, ...]:
    """Return what a prompt asks for, object by object; ValueError if it does not follow the grammar."""
    body = re.sub(rf" (?:on|over) a (?:{'|'.join(BACKGROUNDS)}) (?:background|ground)$", "", prompt)
    return tuple(parse_clause(clause) for clause in re.split(", | and | while ", body))


def parse_clause(clause: str) -> Asked:
    """Parse one object of a prompt."""
    if any(clause == f"{thing} {words}" for thing in SOMETHING for words in ENTER_WORDS):
        return Asked(None, None, None, enters=True)
    match = CLAUSE.match(clause)
    if match is None or (match[3] not in ENTER_WORDS and match[3] not in PHRASES):
        raise ValueError(f"prompt clause {clause!r}: does not follow the grammar of the nano world")
    shape, colour = SHAPES.index(match[2]), COLOURS.index(match[1])
    if match[3] in ENTER_WORDS:
        return Asked(shape, colour, None, enters=True)
    motion = PHRASES[match[3]]
    return Asked(shape, colour, None if motion == FREE else motion, enters=False)
