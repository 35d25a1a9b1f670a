"""Several ranks at one video: the first is asked for latents as if it were alone, the others follow it.

Only the first rank needs the text encoder and the VAE. Shapes: B batch, C channels, T latent frames, H W latent size,
L text rows, D text width.
"""

from collections.abc import Sequence
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor

from common.condition import Condition
from common.video import LATENT_CHANNELS
from shards.record import Record
from stage2_distill.sampling.student_sampler import StudentSampler

DenoiseRequest = tuple[Condition, list[int], int]  # conditions, seeds and segment of a call


class LeaderSampler:
    """The student of the first rank; as a context it tells the others at its end that nothing more comes."""

    def __init__(self, student: StudentSampler) -> None:
        self.student, self.in_call = student, False

    def __call__(self, records: Sequence[Record], seeds: Sequence[int], segment: int = 0) -> Tensor:
        """What `Student` gives, computed by all ranks."""
        condition = self.student.build_condition(records)
        assert condition.given is None, "a batch of one kind"
        self.in_call = True  # if this fails, the others wait in vain, and torchrun ends them
        broadcast_request(condition, list(seeds), segment)
        x0 = self.student.sample_latents(condition, seeds, segment)
        self.in_call = False
        return x0

    def move_to(self, device: torch.device) -> None:
        """Bring the network of this rank to a device."""
        self.student.move_to(device)

    def __enter__(self) -> "LeaderSampler":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.in_call:
            dist.broadcast(torch.zeros(4, dtype=torch.int64, device=self.student.device), 0)
            dist.destroy_process_group()


def broadcast_request(condition: Condition, seeds: list[int], segment: int) -> None:
    """Send what is to be denoised to all other ranks."""
    text, frame = condition.text.contiguous(), condition.first_frame
    header = (len(seeds), segment, text.shape[1], int(frame is not None))
    dist.broadcast(torch.tensor(header, device=text.device), 0)
    dist.broadcast(torch.tensor(seeds, device=text.device), 0)
    dist.broadcast(text, 0)
    if frame is not None:
        dist.broadcast(frame.contiguous(), 0)


def receive_request(student: StudentSampler) -> DenoiseRequest | None:
    """What the first rank tells; None = nothing more."""
    device = student.device
    header = torch.zeros(4, dtype=torch.int64, device=device)
    dist.broadcast(header, 0)
    count, segment, rows, with_frame = header.tolist()
    if not count:
        return None
    seeds = torch.zeros(count, dtype=torch.int64, device=device)
    text = torch.zeros(count, rows, student.net.config.text_dim, dtype=torch.bfloat16, device=device)
    size = (count, LATENT_CHANNELS, 1, *student.spec.latent_shape[2:])
    frame = torch.zeros(size, dtype=torch.bfloat16, device=device) if with_frame else None
    for tensor in (seeds, text, frame):
        if tensor is not None:
            dist.broadcast(tensor, 0)
    return Condition(frame, text), seeds.tolist(), segment


def run_sampling_worker(student: StudentSampler) -> None:
    """Compute with the first rank all that it is asked for."""
    while (request := receive_request(student)) is not None:
        student.sample_latents(*request)
    dist.destroy_process_group()
