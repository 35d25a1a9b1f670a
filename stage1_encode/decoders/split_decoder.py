"""The decode of one video on several GPUs: each rank decodes a part of every frame, and the first one joins the pixels.

A frame is split along its longer side. Each rank computes `begin` (conv_in, two residual blocks, attention) completely,
and then its own columns with the halo that the remaining convolutions need, see `column_decoder`. What that costs at
121 x 704 x 1280, where one H200 takes 3.1 to 3.3 s for 1.86 PFLOP, is predicted as follows; two took 1.86 s:

    ranks   columns computed per level, of those of a frame   FLOPs of the busiest rank   decode
    2       66, 58, 53, 51 %                                  54 %                        1.7 s
    4       58, 40, 31, 27 %                                  33 %                        1.0 s
    8       45, 28, 19, 15 %                                  21 %                        0.6 s

The alternative is to exchange a column with each neighbour before every convolution: 28 exchanges for each of 17
chunks, in lockstep, to save 0.1 s of computing at two ranks, of which their latency takes back a quarter; and
normalizations would have to write between received columns. Here ranks meet once per chunk, to send bytes (164 MB for
a video on two ranks) while the next chunk is decoded. Splitting in time is not exact: through 30 causal convolutions
one after another a frame depends on nearly all frames before it.
Shapes: C channels, T latent frames, H W latent size, F frames, X Y pixel height and width, x y those of one part.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from stage1_encode.models.column_decoder import ColumnDecoder, join_parts
from stage1_encode.models.vae import FullDecoder, WanVae
from stage1_encode.models.vae_decoder import stream_frames


@dataclass(frozen=True)
class PendingFrames:
    """Frames of one chunk on their way to the first rank."""

    work: dist.Work
    own: Tensor  # (F x y 3), kept until it is sent
    parts: list[Tensor]  # (F x y 3) of all ranks; empty on other ranks than the first

    def wait(self) -> None:
        """Return when the frames have arrived; on a GPU its stream waits, not the program."""
        with report_lost_rank():
            self.work.wait()


@dataclass(frozen=True)
class SplitDecoder:
    """This rank's part of a decoder; all ranks of the process group decode the same videos, one after another."""

    whole: FullDecoder
    rank: int
    ranks: int

    @cached_property
    def network(self) -> ColumnDecoder:
        """Return what decodes this rank's columns."""
        return ColumnDecoder(self.whole.network, self.rank, self.ranks)

    @torch.inference_mode()
    def decode_stream(self, latents: Tensor) -> Iterator[Tensor]:
        """Yield the pixels of one video, see `LatentDecoder`, on the first rank; on the others their own parts.

        Frames come a chunk late: while they travel, the next ones are decoded.
        """
        z = self.whole.denormalize(latents[None])[0]
        previous: PendingFrames | None = None
        for pixels in stream_frames(self.network, z, max_frames=self.whole.chunk_frames):
            pending = self.send_pixels(pixels.contiguous())
            if previous:
                yield self.receive_frames(previous, z)
            previous = pending
        assert previous is not None
        yield self.receive_frames(previous, z)

    def send_pixels(self, pixels: Tensor) -> PendingFrames:
        """Begin to send this rank's pixels (F x y 3) to the first rank."""
        parts = [torch.empty_like(pixels) for _ in range(self.ranks)] if self.rank == 0 else []
        with report_lost_rank():
            work = dist.gather(pixels, parts or None, dst=0, async_op=True)
        assert work is not None
        return PendingFrames(work, pixels, parts)

    def receive_frames(self, pending: PendingFrames, z: Tensor) -> Tensor:
        """Return frames of a video with latents z (C T H W): whole ones on the first rank, else its part of them."""
        pending.wait()
        return join_parts(pending.parts, *z.shape[2:]) if self.rank == 0 else pending.own

    def decode_batch(self, latents: Tensor) -> Tensor:
        """Return the pixels of several small videos, decoded by this rank alone."""
        return self.whole.decode_batch(latents)

    def free_memory(self) -> None:
        """Release cache and workspace until the next video."""
        self.whole.free_memory()


def share_decoder(vae: WanVae, rank: int, ranks: int) -> WanVae:
    """Return the VAE with a decoder that all ranks of the process group share.

    A tiny decoder stays as it is: it takes a fifth of a second, and the first rank decodes alone.
    """
    decoder = vae.decoder
    return replace(vae, other_decoder=SplitDecoder(decoder, rank, ranks)) if isinstance(decoder, FullDecoder) else vae


def decode_own_parts(vae: WanVae, latents: Tensor) -> None:
    """Decode this rank's part of videos (B C T H W) for the first rank, if the decoder is shared."""
    if isinstance(vae.decoder, SplitDecoder):
        for video in latents:
            for _ in vae.decoder.decode_stream(video):
                pass


@contextmanager
def report_lost_rank() -> Iterator[None]:
    """Turn the failure of a transfer into one line; what ended the other process has a line of its own."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError("another process ended during the decode; its own message says why") from error
