"""What `check` and `fix` found and did."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from adaptertools.api.writing import WriteReport
from adaptertools.consumers.judge import Finding
from adaptertools.consumers.rule import UNCHECKED
from adaptertools.errors import count
from adaptertools.operations.difference import Difference
from adaptertools.operations.plain import Plain


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What the rules of a consumer say of an adapter. `version` is the one whose source was read.

    `unmended` are the rules that `fix` cannot mend, as far as the rules tell; `refused` says why it could not write the
    file that does. `asked` are the options that were given, as the command line spells them. `notes` are those of the
    version and of the reader.
    """

    label: str
    format: str
    consumer: str
    title: str
    version: str
    max_rank: int | None
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()
    unmended: tuple[str, ...] = ()
    refused: str = ""
    asked: tuple[str, ...] = ()

    @property
    def passes(self) -> bool:
        """Whether it loads there and means the same, as far as it was checked."""
        return not self.broken

    @property
    def unchecked(self) -> tuple[Finding, ...]:
        """The findings that say nothing."""
        return tuple(finding for finding in self.findings if finding.verdict is UNCHECKED)

    @property
    def broken(self) -> tuple[Finding, ...]:
        """The findings that stand in the way."""
        return tuple(finding for finding in self.findings if not finding.passes)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fixed:
    """The file that loads: how it was made, what it cost, and what the rules say of it.

    `plain` is None for what passed as it was: that is written as it was read, in its own format where that is written.
    `difference` is what sets it apart from the source; of DoRA that became LoRA it knows nothing, but
    `plain.decomposed` does. `relative_error` counts both: ‖ΔW' − ΔW‖ / ‖ΔW‖, at most; what was dropped counts in
    neither.
    """

    before: Check
    after: Check
    report: WriteReport
    plain: Plain | None
    difference: Difference
    widened: bool = False
    """Whether the factors were quantised and are written as they were read, in float32."""

    @property
    def unchanged(self) -> bool:
        """Whether it passed as it was and was written so: tensors, ranks and alphas are the same."""
        same_format = self.report.format == self.before.format
        return self.plain is None and self.exact and same_format and not self.widened

    @property
    def steps(self) -> tuple[str, ...]:
        """What was done, one line each."""
        return tuple(_steps(self.plain)) if self.plain is not None else ()

    @property
    def relative_error(self) -> float:
        apart = self.plain.decomposed if self.plain is not None else None
        if apart is None:
            return self.difference.relative_distance
        norm = math.hypot(self.difference.norm or 0.0, apart.error)  # what was cut off is orthogonal to what is left
        return (self.difference.distance + apart.error) / norm if norm else 0.0

    @property
    def dropped(self) -> tuple[str, ...]:
        """The features that were given up, which `relative_error` knows nothing of."""
        return tuple(dict.fromkeys(item.partition(": ")[0] for item in self.report.dropped))

    @property
    def exact(self) -> bool:
        """Whether the file means the very same: nothing was dropped, cut off or rounded."""
        return self.relative_error == 0 and not self.dropped and self.report.exact


_WERE = ("was", "were")


def _steps(done: Plain) -> Iterator[str]:
    if done.decomposed is not None:
        apart = done.decomposed
        yield (
            f"DoRA of {count(apart.modules, 'module')} became LoRA of rank {apart.rank}, which keeps its delta "
            f"weights up to a relative error of {apart.relative_error:.4g}"
        )
    if done.truncation is not None:
        lowered = sum(row.rank_after < row.rank_before for row in done.truncation.rows)
        yield f"{count(lowered, 'module', ('was', 'were'))} truncated to rank {done.rank}"
    if done.padded:
        yield f"{count(done.padded, 'module', ('was', 'were'))} filled up with zeros to rank {done.rank}"
    yield f"alpha is the rank, {done.rank}, and the scaling stands in the factors"
    if done.filled:
        more = " …" * (len(done.filled) > 1)
        yield f"zeros were added for {count(len(done.filled), 'module')}: {done.filled[0]}{more}"
    if done.left_out:
        yield f"left out, being untrained: {', '.join(done.left_out)}"
