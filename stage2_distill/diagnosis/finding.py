"""What one check of `doctor` found."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

OK, WARN, FAIL, SKIP = "ok", "warn", "fail", "skip"


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    check: str
    state: str  # OK, WARN, FAIL or SKIP
    text: str
    cure: str = ""  # what to do, unless the state is OK or SKIP

    @property
    def is_failure(self) -> bool:
        """Whether a run cannot succeed before this is cured."""
        return self.state == FAIL

    def __str__(self) -> str:
        return f"{self.state:5}{self.check:11}{self.text}{f'; {self.cure}' if self.cure else ''}"


def report_errors(check: str, find: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Yield a check's findings; an error of the kinds that users see becomes a failure with its own words."""
    try:
        yield from find()
    except (ValueError, OSError, RuntimeError) as error:
        problem, _, cure = " ".join(str(error).split()).partition("; ")
        yield Finding(check, FAIL, problem, cure)
