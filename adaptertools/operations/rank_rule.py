"""What the user asks for, as a rule that gives every ladder its rank."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adaptertools.errors import OptionError
from adaptertools.operations.ranks import Ladder, at_most, within_bytes, within_energy, within_error
from adaptertools.operations.sizes import parse_size

_CAP = "max_rank (--max-rank)"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRule:
    """How ranks are chosen: `name` is that of the option, `value` what it says."""

    name: str
    value: Any
    max_rank: int | None = None

    @classmethod
    def parse(cls, max_rank: int | None = None, **given: Any) -> "RankRule":
        """Raises: OptionError unless exactly one option is given, and makes sense"""
        stated = {name: value for name, value in given.items() if value is not None}
        if len(stated) != 1:
            found = " and ".join(stated) or ("none" if max_rank is None else f"{_CAP}, which only caps another one")
            advice = f". {_CAP} is what caps the rank that another one gives" if "rank" in stated else ""
            raise OptionError(f"expected one of rank, energy, error and size; found {found}{advice}")
        ((name, value),) = stated.items()
        for key, count in (("rank", value if name == "rank" else None), (_CAP, max_rank)):
            if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
                raise OptionError(f"{key} is {count!r:.40}, expected a whole number of at least 1")
        if name in ("energy", "error") and not _is_share(value, closed=name == "energy"):
            most = "up to 1" if name == "energy" else "below 1"
            raise OptionError(f"{name} is {value!r:.40}, expected a number above 0 and {most}")
        if name == "size":
            parse_size(value, 1 << 60)
        return cls(name=name, value=value, max_rank=max_rank)

    def __str__(self) -> str:
        return f"{self.name} {self.value}" + (f", at most rank {self.max_rank}" if self.max_rank is not None else "")

    @property
    def limit(self) -> int | None:
        """The rank that no module may exceed, where there is one."""
        limits = [rank for rank in (self.max_rank, self.value if self.name == "rank" else None) if rank is not None]
        return min(limits, default=None)

    def ranks(self, ladders: Sequence[Ladder]) -> list[int]:
        """The rank of every ladder; for a size that of so many bytes of factors."""
        match self.name:
            case "rank":
                return at_most(ladders, min(self.value, self.max_rank or self.value))
            case "energy":
                return within_energy(ladders, self.value, self.max_rank)
            case "error":
                return within_error(ladders, self.value, self.max_rank)
            case _:
                return within_bytes(ladders, self.value, self.max_rank)


def _is_share(value: Any, *, closed: bool) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and (0 < value < 1 or (closed and value == 1))
