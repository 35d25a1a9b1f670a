"""Which shape each sample has, and how the samples of an update become micro-batches of one shape each.

A record has its size from the data set, and a sample draws its number of frames. Neither depends on the ranks, nor does
the order of the records: an update takes the next `global_batch` records, whatever their sizes, and only then are those
of one shape put together. So no record waits for others of its size, and none is lost or read twice in an epoch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from common.seed import derive_seed
from common.video import VideoSpec
from stage2_distill.config import LengthShare


@dataclass(frozen=True)
class SampleShapes:
    """The shapes of a run's samples: pure functions of the seed and the stream of records, equal on all ranks."""

    seed: int
    lengths: tuple[LengthShare, ...]
    record_spec: Callable[[int], VideoSpec]  # of a position in the stream; its number of frames does not count

    def draw_length(self, iteration: int, role: str, sample: int) -> int:
        """The number of frames of a sample."""
        if len(self.lengths) == 1:
            return self.lengths[0].num_frames
        drawn = derive_seed(self.seed, iteration, sample, f"{role} length") / 2**63  # uniform in [0, 1)
        for length in self.lengths[:-1]:
            drawn -= length.share
            if drawn < 0:
                return length.num_frames
        return self.lengths[-1].num_frames

    def sample_spec(self, iteration: int, role: str, sample: int, position: int) -> VideoSpec:
        """The shape of a sample, whose record is at `position` of the stream."""
        return replace(self.record_spec(position), num_frames=self.draw_length(iteration, role, sample))


def pack_samples(specs: Sequence[VideoSpec], *, batch_size: int, world: int) -> list[tuple[int, ...]]:
    """Micro-batches of the samples of one update: at most `batch_size` of one shape, the largest shapes first.

    Their number is a multiple of `world`, as the ranks of a sharded network compute together: micro-batch k is that of
    rank k % world. For that, some are halved. The number of samples must be a multiple of batch_size x world.
    """
    samples_of: dict[VideoSpec, list[int]] = {}
    for sample, spec in enumerate(specs):
        samples_of.setdefault(spec, []).append(sample)
    # The largest first: if it does not fit into memory, that shows at once. Ranks that compute at the same time mostly
    # have the same shape, so that none waits for another.
    shapes = sorted(samples_of, key=lambda spec: (-spec.num_tokens, spec.num_frames, spec.height))
    packed = [
        tuple(samples_of[spec][start : start + batch_size])
        for spec in shapes
        for start in range(0, len(samples_of[spec]), batch_size)
    ]
    while len(packed) % world:  # ends at single samples at the latest, whose number is a multiple
        index = max(range(len(packed)), key=lambda one: len(packed[one]))
        whole, middle = packed[index], len(packed[index]) // 2
        packed[index : index + 1] = [whole[:middle], whole[middle:]]
    return packed
