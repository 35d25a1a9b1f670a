"""Every kind of file and prompt is encoded correctly or reported with a reason, also if the decoder crashes."""

import os
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy
import pytest

from common.video import VideoSpec
from stage1_encode.encode import encode
from stage1_encode.media.first_frame import FirstFrame, UnreadableError
from stage1_encode.media.reader_pool import ReaderPool
from tests import tiny_models
from tests.stage1_encode.corpus import BROKEN, HEIGHT, PICTURES, QUARTERS, VIDEOS, Kind, luminance
from tests.stage1_encode.test_encode import configure, failures, records

KINDS = VIDEOS + PICTURES + BROKEN
SPEC = VideoSpec(9, HEIGHT, 160)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one file of every kind."""
    folder = tmp_path_factory.mktemp("corpus")
    os.environ.setdefault("SVT_LOG", "0")
    for kind in KINDS:
        kind.make(folder / kind.name)
    return folder


@pytest.fixture(scope="module")
def readers() -> Iterator[ReaderPool]:
    pool = ReaderPool(1, SPEC, 20.0)
    yield pool
    pool.close()


def shows_the_quarters(frame: FirstFrame, kind: Kind) -> bool:
    height, width = frame.pixels.shape[:2]
    differences = []
    for (y, x), colour in QUARTERS.items():
        expected = [luminance(colour)] * 3 if kind.grey else colour
        differences.append(abs(frame.pixels[int(y * height), int(x * width)] - numpy.array(expected)).max())
    return max(differences) <= kind.within


def test_there_are_at_least_thirty_kinds() -> None:
    assert len({kind.name for kind in KINDS}) == len(KINDS) >= 30
    assert len(BROKEN) >= 15


@pytest.mark.parametrize("kind", VIDEOS + PICTURES, ids=lambda kind: kind.name)
def test_a_readable_file_shows_what_is_in_it(kind: Kind, corpus: Path, readers: ReaderPool) -> None:
    frame = readers.submit(str(corpus / kind.name)).result()
    assert frame.pixels.shape == (SPEC.height, SPEC.width, 3)
    assert shows_the_quarters(frame, kind)


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.name)
def test_a_broken_file_is_named_with_its_reason(kind: Kind, corpus: Path, readers: ReaderPool) -> None:
    with pytest.raises(UnreadableError, match=kind.reason):
        readers.submit(str(corpus / kind.name)).result()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(tmp_path: Path, readers: ReaderPool) -> None:
    tiny_models.make_clip(tmp_path / "secret.mp4", seed=0).chmod(0)
    with pytest.raises(UnreadableError, match="Permission denied"):
        readers.submit(str(tmp_path / "secret.mp4")).result()


def test_a_pipe_does_not_hang(tmp_path: Path, readers: ReaderPool) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(UnreadableError, match="no ordinary file"):
        readers.submit(str(tmp_path / "pipe.mp4")).result()


def test_a_file_on_the_web_is_read(corpus: Path, readers: ReaderPool) -> None:
    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(corpus)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        frame = readers.submit(f"{address}/vp9.webm").result()
        assert shows_the_quarters(frame, VIDEOS[0])
        with pytest.raises(UnreadableError, match="no readable video"):
            readers.submit(f"{address}/missing.mp4").result()
    finally:
        server.shutdown()


def test_the_whole_corpus_goes_through_one_run(corpus: Path, model: Path, tmp_path: Path) -> None:
    table = tiny_models.write_csv(tmp_path / "rows.csv", [(corpus / kind.name, f"a {kind.name}") for kind in KINDS])
    report = encode(configure(table, model, tmp_path / "out", shard_size=16, max_failure_rate=1.0))
    assert (report.records, report.failures) == (len(KINDS) - len(BROKEN), len(BROKEN))
    assert [Path(record.source.path).name for record in records(tmp_path / "out")] == [
        kind.name for kind in VIDEOS + PICTURES
    ]
    assert [Path(row["path"]).name for row in failures(tmp_path / "out")] == [kind.name for kind in BROKEN]
    assert all(record.first_frame.isfinite().all() for record in records(tmp_path / "out"))


PROMPTS = {
    "": None,
    " \t ": None,
    "\x00\x07": None,
    "word " * 10_000: ("word " * 10_000).strip(),
    "a\x00b\x1b[31mc": "abc",
    "a 🦊 jumps": "a 🦊 jumps",
    "קוֹף אוכל בננה": "קוֹף אוכל בננה",
    "&amp;lt;b&amp;gt; &quot;x&quot;": '<b> "x"',
    "two\nlines": "two lines",
    'she says "hi", then leaves': 'she says "hi", then leaves',
    "cafÃ©": "café",
}


def test_prompts_of_every_kind(clips: Path, model: Path, tmp_path: Path) -> None:
    rows = [(clips / "clip-0.mp4", prompt) for prompt in PROMPTS]
    table = tiny_models.write_csv(tmp_path / "rows.csv", rows)
    encode(configure(table, model, tmp_path / "out", shard_size=16, max_failure_rate=1.0))
    assert [record.source.prompt for record in records(tmp_path / "out")] == [p for p in PROMPTS.values() if p]
    assert [row["reason"] for row in failures(tmp_path / "out")] == ["the prompt is empty"] * 3
