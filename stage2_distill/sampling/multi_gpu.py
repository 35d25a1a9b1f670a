"""Several ranks sample one video: the first rank is called like a single process, the others follow its requests.

Only the first rank needs the text encoder. Shapes: B batch, C channels, T latent frames, H W latent size.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from common.condition import Condition
from common.video import LATENT_CHANNELS
from shards.record import Record
from stage2_distill.sampling.student_sampler import StudentSampler

HEADER_SIZE = 7  # numbers sent before a request; all zero = no more


class LeaderSampler:
    """The first rank's sampler; leaving its context ends the other ranks."""

    def __init__(self, student: StudentSampler) -> None:
        self.student, self.has_sampled = student, False
        self.device = student.device  # where the other ranks wait, also while this rank's network is in host memory

    def __call__(self, records: Sequence[Record], seeds: Sequence[int], segment: int = 0) -> Tensor:
        """Latents (B C T H W) as from `StudentSampler`, computed by all ranks."""
        condition = self.student.build_condition(records)
        assert condition.given is None, "a batch of one kind"
        self.has_sampled = True
        broadcast_request(condition, seeds, segment)
        return self.student.sample_latents(condition, seeds, segment)

    def move_to(self, device: torch.device) -> None:
        """Move this rank's network to a device."""
        self.student.move_to(device)

    def __enter__(self) -> "LeaderSampler":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        # after an error the others may be in the middle of a call, or decode; torchrun ends them with this process
        if kind is None or not self.has_sampled:
            end = torch.zeros(HEADER_SIZE, dtype=torch.int64, device=self.device)  # no seeds
            dist.broadcast(end, 0)
            dist.destroy_process_group()


def broadcast_request(condition: Condition, seeds: Sequence[int], segment: int) -> None:
    """Send a condition, its seeds and its segment to all other ranks."""
    text, frame = condition.text, condition.first_frame
    # decides the shapes and the dtype of the rest
    size = (0, 0) if frame is None else tuple(frame.shape[-2:])
    header = (len(seeds), segment, text.shape[1], int(frame is not None), int(text.dtype == torch.float32), *size)
    numbers = (torch.tensor(values, device=text.device) for values in (header, list(seeds)))
    for tensor in (*numbers, text, frame):
        if tensor is not None:
            dist.broadcast(tensor.contiguous(), 0)


def receive_request(student: StudentSampler) -> tuple[Condition, list[int], int] | None:
    """Condition, seeds and segment of the first rank's next request; None = no more."""
    device = student.device
    header = torch.zeros(HEADER_SIZE, dtype=torch.int64, device=device)
    dist.broadcast(header, 0)
    count, segment, rows, with_frame, is_float32, height, width = header.tolist()
    if not count:
        return None
    seeds = torch.zeros(count, dtype=torch.int64, device=device)
    dtype = torch.float32 if is_float32 else torch.bfloat16
    text = torch.zeros(count, rows, student.net.config.text_dim, dtype=dtype, device=device)
    size = (count, LATENT_CHANNELS, 1, height, width)
    frame = torch.zeros(size, dtype=dtype, device=device) if with_frame else None
    for tensor in (seeds, text, frame):
        if tensor is not None:
            dist.broadcast(tensor, 0)
    return Condition(frame, text), seeds.tolist(), segment


def follow_requests(student: StudentSampler) -> Iterator[Tensor]:
    """Yield the latents (B C T H W) of each of the first rank's requests, computed with it, until it ends."""
    while (request := receive_request(student)) is not None:
        yield student.sample_latents(*request)
    dist.destroy_process_group()
