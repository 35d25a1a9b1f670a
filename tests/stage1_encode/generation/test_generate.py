"""Generation in one process: the same records as `encode`, segments that continue, offload that changes nothing."""

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import av
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from common.planning.cards import find_card
from common.video import VideoSpec
from shards import latent_store
from shards.dataset import open_data_set
from shards.latent_store import describe_group, read_latents
from shards.record import Record
from stage1_encode.config import EncodeConfig
from stage1_encode.encode import encode
from stage1_encode.generation import generate
from stage1_encode.generation.condition_encoder import (
    ConditionEncoder,
    encode_conditions,
    encode_picture,
    load_condition_encoder,
)
from stage1_encode.generation.generate import GenerationRequest, choose_vram, describe_time, generate_videos
from stage1_encode.media.rows import read_shard_rows
from stage1_encode.models import vae
from tests import tiny_models

CPU = torch.device("cpu")
SPEC = VideoSpec(9, 64, 96, fps=12)


class NoiseSampler:
    """A sampler whose latents are noise behind the given first frame; it records where it was moved."""

    def __init__(self) -> None:
        self.moves: list[str] = []

    def __call__(self, records: list[Record], seeds: list[int], segment: int) -> Tensor:
        videos = [
            torch.randn(SPEC.latent_shape, generator=torch.Generator().manual_seed(10 * seed + segment))
            for seed in seeds
        ]
        for video, record in zip(videos, records, strict=True):
            if record.first_frame is not None:
                video[:, :1] = record.first_frame.float()
        return torch.stack(videos)

    def move_to(self, device: torch.device) -> None:
        self.moves.append(device.type)


@pytest.fixture(scope="module")
def models(model: Path) -> ConditionEncoder:
    return load_condition_encoder(str(model), precision="auto", device=CPU)


@pytest.fixture
def video_request(tmp_path: Path) -> GenerationRequest:
    Image.fromarray(tiny_models.picture(90, 160, seed=3)).save(tmp_path / "first.png")
    rows = [("a &amp; b", "first.png", 1), ("c", "", 2)]
    table = tiny_models.write_csv(tmp_path / "p.csv", rows, ("prompt", "image", "seed"))
    (tmp_path / "out").mkdir()
    return GenerationRequest(table, tmp_path / "out", tmp_path / "x.zarr", SPEC, 0)


def test_predicted_time(video_request: GenerationRequest) -> None:
    """Measured on one H200: 3.44 s of denoising, 6.95 s in all (benchmarks/results/rebuild-*)."""
    request = replace(video_request, spec=VideoSpec(), denoising_seconds=3.44)
    text = describe_time(request, 10, find_card("NVIDIA H200, 139.8 GiB"))
    assert text == "about 6.9 s per video once the models are loaded, 1 min in all"
    assert describe_time(replace(request, gpus_per_video=2), 1, find_card("h200")).startswith("about 5.4 s")
    assert "not measured" in describe_time(replace(request, segments=2, world=2), 10, find_card("a100"))
    assert describe_time(request, 10, None).startswith("this device is not in the table of speeds, so watch")
    tiny = describe_time(replace(request, decoder="tae.pth", segments=2), 10, find_card("h200"))
    assert tiny == "about 6.9 s of denoising per video; no time is predicted for decoder=tae.pth"
    unknown = describe_time(replace(request, denoising_seconds=None), 10, find_card("h200"))  # of fp8, say
    assert unknown == "no time is predicted for these options, so watch the progress"


def count_frames(path: Path) -> int:
    with av.open(str(path)) as file:
        return len(list(file.decode(video=0)))


def test_records_are_those_of_encode(
    video_request: GenerationRequest, model: Path, models: ConditionEncoder, tmp_path: Path
) -> None:
    (rows,) = read_shard_rows(video_request.csv_path, shard_size=9, text_only=True)
    result = encode_conditions(models, rows, video_request.csv_path, SPEC, keep_text_on_device=True)
    encode(
        EncodeConfig(
            str(video_request.csv_path), str(model), str(tmp_path / "data"), 9, 64, 96, 12,
            text_only=True, vae_dtype="float32", device="cpu", workers=1,
        )
    )  # fmt: skip
    data = open_data_set(str(tmp_path / "data"))
    for number, record in enumerate(result):
        expected = data.read_record(number)
        assert (record.key, record.source.prompt, record.source.seed) == (
            expected.key,
            expected.source.prompt,
            expected.source.seed,
        )
        assert torch.allclose(record.text.float(), expected.text.float(), atol=0.02)  # prompts are batched otherwise
    assert torch.equal(result[0].first_frame, data.read_record(0).first_frame)
    assert result[1].first_frame is None


def test_segments_go_on_from_the_last_frame(video_request: GenerationRequest, models: ConditionEncoder) -> None:
    longer = GenerationRequest(
        video_request.csv_path, video_request.out, video_request.store, SPEC, 0, segments=2, batch_size=2
    )
    outputs = generate_videos(longer, models, NoiseSampler())
    assert [path.name for path in outputs] == ["000000000.mp4", "000000001.mp4", "contact.png"]
    assert [count_frames(path) for path in outputs[:2]] == [1 + 2 * 8] * 2
    assert describe_group(video_request.store, "sample").keys[:3] == ("000000000-0", "000000000-1", "000000001-0")
    for row in (0, 2):
        last = vae.decode_video(models.vae, read_latents(video_request.store, "sample", row))[-1]
        assert torch.equal(
            read_latents(video_request.store, "sample", row + 1)[:, :1], encode_picture(models, last).float()
        )
    assert not torch.equal(
        read_latents(video_request.store, "sample", 0)[:, 1:], read_latents(video_request.store, "sample", 1)[:, 1:]
    )


def test_memory_does_not_grow_with_segments(
    video_request: GenerationRequest, models: ConditionEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When latents are asked for, those before the last ones are gone, on a slow disk too."""
    alive: list[int] = []
    write = latent_store.write_latents

    def slow(*given: object) -> None:
        time.sleep(0.3)
        write(*given)

    monkeypatch.setattr(latent_store, "write_latents", slow)

    class WatchedSampler(NoiseSampler):
        def __init__(self) -> None:
            super().__init__()
            self.sampled: list[weakref.ref[Tensor]] = []

        def __call__(self, records: list[Record], seeds: list[int], segment: int) -> Tensor:
            alive.append(sum(latents() is not None for latents in self.sampled))
            x0 = super().__call__(records, seeds, segment)
            self.sampled.append(weakref.ref(x0))
            return x0

    generate_videos(replace(video_request, segments=6), models, WatchedSampler())
    assert len(alive) == 12
    assert max(alive) <= 1


def test_only_what_the_contact_sheet_shows_is_kept(
    video_request: GenerationRequest, models: ConditionEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[generate.VideoJob] = []
    remember = generate.VideoJob.__init__

    def init(self: generate.VideoJob, *given: object, **options: object) -> None:
        remember(self, *given, **options)
        jobs.append(self)

    monkeypatch.setattr(generate.VideoJob, "__init__", init)
    monkeypatch.setattr(generate, "MAX_SHEET_ROWS", 1)
    outputs = generate_videos(video_request, models, NoiseSampler())
    assert Image.open(outputs[-1]).height == 64
    assert [len(job.sheet_frames) for job in jobs] == [generate.SHEET_COLUMNS, 0]
    assert all(frame.untyped_storage().nbytes() == frame.nbytes for frame in jobs[0].sheet_frames), (
        "not a view of a video"
    )


def test_offload_gives_the_same_files(video_request: GenerationRequest, models: ConditionEncoder) -> None:
    files, moves = [], []
    for vram in ("full", "16gb", "12gb"):
        sampler = NoiseSampler()
        paths = generate_videos(video_request, models, sampler, vram=vram)
        files.append([path.read_bytes() for path in paths])
        moves.append(sampler.moves)
    assert files[0] == files[1] == files[2]
    # with offload: away while texts are embedded, then there and away for each of two batches
    assert moves == [["cpu"] * 2, ["cpu"] * 5, ["cpu"] * 5]


@dataclass(frozen=True)
class HookedDecoder:
    """The VAE's own decoder, with a function that is called before each chunk of pixels."""

    inner: vae.FullDecoder
    before_chunk: Callable[[], object]

    @property
    def network(self) -> nn.Module:
        return self.inner.network

    def decode_stream(self, latents: Tensor) -> Iterator[Tensor]:
        for frames in self.inner.decode_stream(latents):
            self.before_chunk()
            yield frames

    def free_memory(self) -> None:
        self.inner.free_memory()


def hooked(models: ConditionEncoder, before_chunk: Callable[[], object]) -> ConditionEncoder:
    own = HookedDecoder(models.vae.full_decoder, before_chunk)
    return replace(models, vae=replace(models.vae, other_decoder=own))


def test_a_video_is_decoded_while_the_next_is_denoised(
    video_request: GenerationRequest, models: ConditionEncoder
) -> None:
    """The first decode waits for the second denoising, which has not begun where memory is short."""
    second_begins, begun, files = threading.Event(), list[bool](), list[list[bytes]]()

    class WatchedSampler(NoiseSampler):
        calls = 0

        def __call__(self, records: list[Record], seeds: list[int], segment: int) -> Tensor:
            self.calls += 1
            if self.calls == 2:
                second_begins.set()
            return super().__call__(records, seeds, segment)

    for vram, look in (("full", lambda: begun.append(second_begins.wait(60))),
                       ("16gb", lambda: begun.append(second_begins.is_set()))):  # fmt: skip
        second_begins.clear()
        begun.clear()
        paths = generate_videos(video_request, hooked(models, look), WatchedSampler(), vram=vram)
        files.append([path.read_bytes() for path in paths])
        assert begun[0] is (vram == "full")
    assert files[0] == files[1]


def test_all_videos_of_a_process_are_decoded_in_one_thread(
    video_request: GenerationRequest, models: ConditionEncoder
) -> None:
    """In a new thread cuDNN chooses its algorithms again: 3 s of each video on an H200 where it tries them."""
    threads = set[int]()
    for _ in range(2):
        generate_videos(video_request, hooked(models, lambda: threads.add(threading.get_ident())), NoiseSampler())
    assert len(threads) == 1
    assert threads != {threading.get_ident()}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_two_streams_give_the_files_of_one(model: Path, video_request: GenerationRequest) -> None:
    """Latents that are late, and memory that the other stream would overwrite, would change a video."""
    device = torch.device("cuda", torch.cuda.current_device())
    models = load_condition_encoder(str(model), precision="float32", device=device)
    rows = [("a", number) for number in range(8)]
    table = tiny_models.write_csv(video_request.out.parent / "many.csv", rows, ("prompt", "seed"))
    load = torch.randn(4096, 4096, device=device) / 64

    class LateSampler(NoiseSampler):
        def __call__(self, records: list[Record], seeds: list[int], segment: int) -> Tensor:
            x0 = super().__call__(records, seeds, segment).to(device)
            late = load
            for _ in range(20):
                late = late @ load
            scratch = torch.full_like(x0, 7.0)  # memory that the last latents may have had
            return x0 + scratch * 0 + 0 * late.sum().nan_to_num()

    files = []
    for vram in ("16gb", "full"):
        outputs = generate_videos(replace(video_request, csv_path=table), models, LateSampler(), vram=vram)
        files.append([path.read_bytes() for path in outputs])
    assert len(files[0]) == 9
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("decoder=x.pth: broken"), "decoder=x.pth: broken"),
        (torch.OutOfMemoryError("CUDA out of memory"), "batch_size=1: videos of 9 x 64 x 96 do not fit"),
    ],
)
def test_an_error_while_decoding_ends_the_run(
    video_request: GenerationRequest, models: ConditionEncoder, error: Exception, expected: str
) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(ValueError, match=expected):
        generate_videos(video_request, hooked(models, fail), NoiseSampler())
    assert not list(video_request.out.iterdir())


def test_ctrl_c_beside_a_decode_leaves_no_video(video_request: GenerationRequest, models: ConditionEncoder) -> None:
    class StoppedSampler(NoiseSampler):
        calls = 0

        def __call__(self, records: list[Record], seeds: list[int], segment: int) -> Tensor:
            self.calls += 1
            if self.calls == 2:
                raise KeyboardInterrupt
            return super().__call__(records, seeds, segment)

    with pytest.raises(KeyboardInterrupt):
        generate_videos(video_request, hooked(models, lambda: time.sleep(0.3)), StoppedSampler())
    assert not list(video_request.out.iterdir())


@pytest.mark.parametrize(
    ("gib", "vram", "mode"),
    [
        *((79, "auto", "full"), (23.6, "auto", "16gb"), (15.7, "auto", "16gb"), (11.6, "auto", "12gb")),
        *((79, "16gb", "16gb"), (79, "12gb", "12gb"), (79, "full", "full")),
    ],
)
def test_the_card_decides_on_the_mode(monkeypatch: pytest.MonkeyPatch, gib: float, vram: str, mode: str) -> None:
    card = SimpleNamespace(total_memory=int(gib * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    assert choose_vram(vram, torch.device("cuda", 0)) == mode
    assert choose_vram(vram, CPU) == ("full" if vram == "auto" else vram)


def test_a_card_that_is_too_small_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(total_memory=int(23.6 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    with pytest.raises(ValueError, match=r"vram=full: needs 36 GiB and the card has 24; give --vram 16gb"):
        choose_vram("full", torch.device("cuda", 0))
    card.total_memory = 12 * 2**30
    with pytest.raises(ValueError, match=r"vram=16gb: needs 15 GiB and the card has 12; give --vram 12gb"):
        choose_vram("16gb", torch.device("cuda", 0))
    card.total_memory = 8 * 2**30
    for vram, required in (("auto", 11), ("full", 36), ("16gb", 15), ("12gb", 11)):
        with pytest.raises(ValueError, match=f"vram={vram}: needs {required} GiB and the card has 8; nothing fits"):
            choose_vram(vram, torch.device("cuda", 0))


def test_latents_that_are_not_finite_leave_no_video(video_request: GenerationRequest, models: ConditionEncoder) -> None:
    class BrokenSampler(NoiseSampler):
        def __call__(self, records: list[Record], seeds: list[int], segment: int) -> Tensor:
            return super().__call__(records, seeds, segment) / 0

    with pytest.raises(ValueError, match="not finite"):
        generate_videos(video_request, models, BrokenSampler())
    assert not list(video_request.out.glob("*.partial"))


def test_ranks_share_the_rows(video_request: GenerationRequest, models: ConditionEncoder, tmp_path: Path) -> None:
    """Two processes make what one makes, file by file."""
    expected = {path.name: path.read_bytes() for path in generate_videos(video_request, models, NoiseSampler())[:2]}
    (tmp_path / "share").mkdir()
    for rank in (0, 1):
        part = replace(video_request, out=tmp_path / "share", store=tmp_path / f"{rank}.zarr", rank=rank, world=2)
        assert [path.name for path in generate_videos(part, models, NoiseSampler())] == [
            f"00000000{rank}.mp4",
            f"contact-{rank}.png",
        ]
        assert torch.equal(read_latents(part.store, "sample", 0), read_latents(video_request.store, "sample", rank))
    assert {path.name: path.read_bytes() for path in (tmp_path / "share").glob("*.mp4")} == expected
    assert generate_videos(replace(video_request, rank=2, world=3), models, NoiseSampler()) == []


def test_too_little_memory_says_what_would_fit(video_request: GenerationRequest, models: ConditionEncoder) -> None:
    class LargeSampler(NoiseSampler):
        def __call__(self, records: list[Record], seeds: list[int], segment: int) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    smaller_video = "a smaller --batch-size, --height or --width"
    for vram, remedy in (("full", "--vram 16gb"), ("16gb", "--vram 12gb"), ("12gb", smaller_video)):
        with pytest.raises(ValueError, match=f"batch_size=1: videos of 9 x 64 x 96 do not fit .*; give {remedy}"):
            generate_videos(video_request, models, LargeSampler(), vram=vram)
    assert not list(video_request.out.glob("*.mp4*"))
