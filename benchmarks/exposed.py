"""How much of an update is communication, and how much of that nothing hides, from the kernels of this rank."""

from collections import Counter
from collections.abc import Callable, Iterable

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.device import Case, synchronize

Row = tuple[str, str]
Span = tuple[float, float]  # microseconds
TALKS = ("nccl", "gloo", "c10d")


def union(spans: Iterable[Span]) -> list[Span]:
    """The same time in spans that do not overlap."""
    joined: list[Span] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((start, end))
    return joined


def length(spans: Iterable[Span]) -> float:
    """Time in any of the spans."""
    return sum(end - start for start, end in union(spans))


def communication(run: Callable[[], object], chosen: Case, name: str) -> list[Row]:
    """Communication of one update: all of it, what no arithmetic runs beside, and by kind."""
    cuda = chosen.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
        run()
        synchronize(chosen)
    talk, work, kinds = list[Span](), list[Span](), Counter[str]()
    for event in found.events():
        if cuda and event.device_type != DeviceType.CUDA:
            continue
        span = event.time_range.start, event.time_range.end
        if any(word in event.name.lower() for word in TALKS):
            talk.append(span)
            kinds[event.name.split("(")[0][-60:]] += span[1] - span[0]
        else:
            work.append(span)
    whole = max(end for _, end in talk + work) - min(start for start, _ in talk + work)
    hidden, both = length(work), length(talk + work)
    seconds = ", ".join(f"{kind} {spent / 1e6:.3f} s" for kind, spent in kinds.most_common(4))
    return [
        (f"{name}, communication", f"{length(talk) / 1e6:.3f} s of {whole / 1e6:.2f} s ({seconds})"),
        (f"{name}, communication beside no arithmetic", f"{(both - hidden) / whole:.2%}"),
        (f"{name}, GPU idle", f"{1 - both / whole:.2%}"),
    ]
