"""Parts of frames decoded by themselves are the same parts of whole frames."""

import pytest
import torch

from common.planning.codec_cost import decode_share
from stage1_encode.models.column_decoder import ColumnDecoder, Reach, join_parts, own_columns, plan_columns
from stage1_encode.models.vae_decoder import VideoDecoder
from tests.stage1_encode.models.test_vae_decoder import decode_frames, draw_normal, make_vae

TRUE = [Reach(6, 2, 1), Reach(6, 2, 1), Reach(6, 2, 1), Reach(6), Reach(1, 2)]  # of Wan2.2's decoder


@pytest.fixture(scope="module")
def decoder() -> VideoDecoder:
    """One residual block per level less than in the real model, whose halo at the latents' size is 9 columns."""
    return VideoDecoder(make_vae(blocks=1))


@pytest.mark.parametrize(
    ("height", "width", "parts"),
    [(1, 24, 2), (1, 22, 3), (1, 6, 3), (21, 1, 2), (2, 5, 4), (1, 2, 3)],
    ids=["even", "uneven", "narrower than the halo", "portrait", "overlapping", "more parts than columns"],
)
def test_parts_are_those_of_whole_frames(decoder: VideoDecoder, height: int, width: int, parts: int) -> None:
    """Three latent frames, so that the remembered ones count. CPU kernels add in another order for other heights."""
    z = draw_normal(48, 3, height, width)
    frames = [decode_frames(ColumnDecoder(decoder, part, parts), z, 2) for part in range(parts)]
    assert len({part.shape for part in frames}) == 1
    joined = join_parts([part.permute(1, 2, 3, 0) for part in frames], height, width).permute(3, 0, 1, 2)
    assert (joined - decode_frames(decoder, z, 2)).abs().max() < 5e-6


def test_reach_is_that_of_the_convolutions() -> None:
    """What is not a number in one column spreads to those output columns that need it, and to no other."""
    decoder = VideoDecoder(make_vae())
    assert decoder.reaches == TRUE
    x, size, column = decoder.begin(draw_normal(1, 1, 24, 48)), 24, 11
    for stage, reach in zip(decoder.stages, decoder.reaches, strict=True):
        spoiled = x[:, :, :size].clone()
        spoiled[:, :, column] = torch.nan
        outputs = stage(spoiled, first=True).isnan().any(dim=3)[0, 0]
        needs = [column in reach.input_columns(range(out, out + 1), size) for out in range(len(outputs))]
        assert outputs.tolist() == needs
        decoder.reset_cache()
        x = stage(x, first=True)


def test_columns_of_a_part_of_the_real_model() -> None:
    """704 x 1280 has 80 latent columns. A halo is 13, 12, 10, 7 and 1 columns, at the picture's border none."""
    starts, stops = zip(*((part.start, part.stop) for part in plan_columns(range(20, 40), 80, TRUE)), strict=True)
    assert starts == (20 - 13, 40 - 12, 80 - 10, 160 - 7, 160 - 1, 320)
    assert stops == (40 + 13, 80 + 12, 160 + 10, 320 + 7, 320 + 1, 640)
    assert plan_columns(range(80), 80, TRUE) == [range(80 * scale) for scale in (1, 2, 4, 8, 8, 16)]


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_predicted_share_of_operations(gpus: int) -> None:
    """What `plan` takes the busiest GPU's work for, against the columns of each stage."""
    operations = (46, 360, 740, 682, 6)  # TFLOP of the stages at 121 x 704 x 1280; 28 more have whole frames
    frame, busiest = plan_columns(range(80), 80, TRUE), 0.0
    for part in range(gpus):
        columns = plan_columns(own_columns(80, part, gpus), 80, TRUE)
        stages = zip(operations, columns, frame, strict=False)
        busiest = max(busiest, 28 + sum(work * len(own) / len(whole) for work, own, whole in stages))
    assert busiest / (28 + sum(operations)) == pytest.approx(decode_share(gpus), abs=0.005)


@pytest.mark.parametrize(("size", "parts"), [(80, 2), (80, 7), (3, 2), (2, 4), (1, 8)])
def test_every_column_has_a_part_and_all_parts_are_equally_wide(size: int, parts: int) -> None:
    owned = [own_columns(size, part, parts) for part in range(parts)]
    assert {column for part in owned for column in part} == set(range(size))
    assert {len(part) for part in owned} == {-(-size // parts)}
    assert torch.tensor([part.start for part in owned]).diff().ge(0).all()
