"""What the fuzz tests draw: JSON values, and mutations of JSON and of bytes that start from something valid."""

import copy
import os
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# 100 tries are part of every run of the tests; TI2V_FUZZ_TRIES=2000 is what a release is tried with.
TRIES = int(os.environ.get("TI2V_FUZZ_TRIES", "100"))
fuzz_settings = settings(
    max_examples=TRIES, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)

NUMBERS = st.one_of(
    st.integers(),
    st.sampled_from([0, -1, 2**31, 2**40, 2**63, 10**13, 10**30, -(2**70)]),
    st.floats(allow_nan=True, allow_infinity=True),
)
# With lone surrogates and control characters.
SPECIAL_TEXTS = ["", "..", "../x", "/etc/passwd", "nan", "1e999", "\ud800", "~", "a,b", "1,2", "\0"]
TEXTS = st.one_of(st.text(max_size=12), st.sampled_from(SPECIAL_TEXTS))
SPECIAL_BYTES = [b"\0" * 512, b"[" * 3000, b'"', b"{", b"-1", b",,"]
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=6
)


@st.composite
def mutated_json(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value in which one to three places are replaced, removed, repeated or renamed."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        node = value
        while isinstance(node, dict | list) and node:
            key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
            if isinstance(node[key], dict | list) and node[key] and draw(st.integers(0, 3)):
                node = node[key]  # deeper
                continue
            action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "repeat"]))
            if action == "replace":
                node[key] = draw(JSON)
            elif action == "remove":
                del node[key]
            elif isinstance(node, list):
                node.insert(key, copy.deepcopy(node[key]))
            else:
                node[draw(TEXTS)] = node.pop(key)
            break
    return value


@st.composite
def mutated_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes in which one to four places are changed, cut, filled or repeated."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 16) | st.integers(0, max(1, len(data))))
        new = draw(st.binary(max_size=12) | st.sampled_from(SPECIAL_BYTES))
        action = draw(st.sampled_from(["overwrite", "insert", "delete", "cut", "repeat"]))
        if action == "overwrite":
            data = data[:start] + new + data[start + len(new) :]
        elif action == "insert":
            data = data[:start] + new + data[start:]
        elif action == "delete":
            data = data[:start] + data[start + length :]
        elif action == "cut":
            data = data[:start]
        else:
            data = data[: start + length] + data[start:]
    return data
