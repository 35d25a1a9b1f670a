"""Ranks that share a decode give the frames of one process, and do not wait for a rank that has ended."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from stage1_encode.models.vae import WanVae, decode_video
from tests.forked import run_python
from tests.stage1_encode.models.test_vae_decoder import draw_normal, make_vae

ROOT = Path(__file__).parents[3]
SIZES = ((4, 2, 9), (2, 5, 1))  # T H W of two videos, one after another: wide and high, neither side a multiple of 4
PROGRAM = """
import os, sys
import torch
import torch.distributed as dist
from stage1_encode.decoders.split_decoder import decode_own_parts, share_decoder
from tests.stage1_encode.decoders.test_split_decoder import make_own_vae, make_videos

def be_rank(rank, world, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{world}", rank=rank, world_size=world)
    own, (*videos, last) = share_decoder(make_own_vae(), rank, world), make_videos()
    if rank:
        for video in videos:
            decode_own_parts(own, video[None])
        next(own.decoder.decode_stream(last))
        os._exit(9)  # as if killed, in the middle of the last video
    torch.save([list(own.decoder.decode_stream(video)) for video in videos], f"{folder}/{world}.pt")
    try:
        list(own.decoder.decode_stream(last))
    except ConnectionError as error:
        print(error, flush=True)
    os._exit(0)

torch.set_num_threads(1)
for world in (2, 4):
    children = []
    for rank in range(world):
        child = os.fork()
        if not child:
            be_rank(rank, world, sys.argv[1])
        children.append(child)
    print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children], flush=True)
"""


def make_own_vae() -> WanVae:
    mean, std = draw_normal(1, 48, 1, 1, 1), draw_normal(1, 48, 1, 1, 1, seed=1).abs()
    return WanVae(make_vae(blocks=1), mean, std)


def make_videos() -> list[Tensor]:
    """Latents (C T H W): those that are decoded to their end, and one more."""
    return [draw_normal(48, *size, seed=index) for index, size in enumerate((*SIZES, SIZES[0]))]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """What two and four gloo ranks decoded, and what they printed."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "program.py").write_text(PROGRAM)
    done = run_python(folder / "program.py", folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, done.stdout.splitlines()


@pytest.mark.parametrize("world", [2, 4])
def test_frames_are_those_of_one_process(ranks: tuple[Path, list[str]], world: int) -> None:
    """In the same chunks; a rounding of another sum may move a byte by one."""
    own = make_own_vae()
    for video, chunks in zip(make_videos(), torch.load(ranks[0] / f"{world}.pt"), strict=False):
        assert [len(chunk) for chunk in chunks] == [len(chunk) for chunk in own.decoder.decode_stream(video)]
        difference = (torch.cat(chunks).int() - decode_video(own, video).int()).abs()
        assert difference.max() <= 1
        assert difference.float().mean() < 1e-3


def test_a_rank_that_ends_ends_the_first_with_one_line(ranks: tuple[Path, list[str]]) -> None:
    message = "another process ended during the decode; its own message says why"
    assert ranks[1] == [message, "[0, 9]", message, "[0, 9, 9, 9]"]
