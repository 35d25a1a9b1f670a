"""True clips as sets of an evaluation: their latents, their given first frames, and what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch

from common.video import VideoSpec
from shards import latent_store
from shards.record import Record, RecordSource
from stage1_encode.media.video_writer import write_video
from stage1_encode.media.whole_clip import read_clip
from stage1_encode.models import vae
from stage1_encode.video_metrics.evaluate_videos import decode_latents
from stage1_encode.video_metrics.true_clips import check_clips, clip_path, encode_clips, encode_true_clips

SPEC = VideoSpec(9, 32, 32, 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two clips."""
    clips = tmp_path_factory.mktemp("true")
    for number in range(2):
        frames = numpy.full((9, 32, 32, 3), 60 + 90 * number, dtype=numpy.uint8)
        write_video(clips / f"{number}.mp4", frames, fps=12)
    return clips


def make_record(number: int, first_frame: torch.Tensor | None) -> Record:
    source = RecordSource(f"prompt {number}", f"{number}.mp4", number + 2)
    return Record(f"{number:09d}", source, first_frame, torch.zeros(1, 8))


def test_sets_hold_the_clips_with_their_given_first_frames(folder: Path, model: Path, tmp_path: Path) -> None:
    loaded = vae.load_vae(model, dtype=torch.float32, device=torch.device("cpu"))
    clip = torch.from_numpy(read_clip(str(folder / "0.mp4"), SPEC))[None]
    given = encode_clips(loaded, clip)[0, :, :1].bfloat16()
    records, store = [make_record(0, given), make_record(1, None)], tmp_path / "latents.zarr"

    def encode() -> None:
        encode_true_clips(loaded, store, folder, records, SPEC, seeds=(0, 3), batch_size=2)

    encode()
    sets = [latent_store.read_latent_rows(store, f"true-seed-{seed}", 0, 2) for seed in (0, 3)]
    assert torch.equal(*sets)
    assert torch.equal(sets[0][0][:, :1], given.float()) and not torch.equal(sets[0][1][:, :1], given.float())
    assert latent_store.describe_group(store, "true-seed-0").prompts == ("prompt 0", "prompt 1")
    node = store / "true-seed-0" / "latents" / "zarr.json"
    before = node.stat().st_mtime_ns
    encode()
    assert node.stat().st_mtime_ns == before, "complete sets are kept"
    wrong = [make_record(0, given + 1)]
    with pytest.raises(ValueError, match=r"^true_clips=.*record 000000000: 0.mp4 begins with another picture; name"):
        encode_true_clips(loaded, tmp_path / "other.zarr", folder, wrong, SPEC, seeds=(0,), batch_size=2)
    write_video(folder / "1.mp4", numpy.full((9, 32, 32, 3), 240, dtype=numpy.uint8), fps=12)
    encode()
    assert not torch.equal(latent_store.read_latent_rows(store, "true-seed-0", 0, 2)[1], sets[0][1]), "another file"


def test_latents_are_what_the_decoder_reads(model: Path) -> None:
    """The first latent frame is that of `encode`, and the shape that of the set."""
    loaded = vae.load_vae(model, dtype=torch.float32, device=torch.device("cpu"))
    pixels = torch.randint(0, 256, (2, 9, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    latents = encode_clips(loaded, pixels)
    assert latents.shape[1:] == SPEC.latent_shape
    assert decode_latents(loaded, latents).shape == pixels.shape
    frames = vae.encode_frames(vae.make_frame_encoder(loaded), pixels[:, 0])  # modifies the VAE, so it comes last
    torch.testing.assert_close(latents[:, :, :1], frames, atol=1e-4, rtol=1e-4)


def test_a_record_without_a_clip_is_refused(folder: Path) -> None:
    record = make_record(7, None)
    with pytest.raises(ValueError, match="^true_clips=.*record 000000007: .*7.mp4: no such file; name the folder of"):
        clip_path(folder, record)
    with pytest.raises(ValueError, match="has a prompt alone"):
        clip_path(folder, replace(record, source=replace(record.source, path="")))


def test_mistakes_show_before_anything_is_sampled(folder: Path) -> None:
    records = [make_record(0, None), make_record(1, None)]
    with pytest.raises(ValueError, match="^true_clips=.*no.csv: no such file or folder; name the folder of the clips"):
        check_clips(folder / "no.csv", records, SPEC)
    check_clips(folder, records, SPEC)
    (folder / "clips.csv").touch()
    assert clip_path(folder / "clips.csv", records[0]) == clip_path(folder, records[0]) == str(folder / "0.mp4")
    elsewhere = replace(records[0], source=replace(records[0].source, path=str(folder / "1.mp4")))
    assert clip_path(Path("any"), elsewhere) == str(folder / "1.mp4"), "absolute paths of the CSV stay"
    with pytest.raises(ValueError, match="^true_clips=.*: .*0.mp4 shows 9 frames at 12 per second, 13 are"):
        check_clips(folder, records, replace(SPEC, num_frames=13))
    (folder / "7.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match="^true_clips=.*: .*7.mp4 .*; leave --true-clips out"):
        check_clips(folder, [make_record(7, None)], SPEC)
    (folder / "7.mp4").unlink()
