"""How far a file is from the adapter that was written to it: what its factors and its scale come to, read back."""

from contextlib import suppress
from pathlib import Path

from adaptertools.adapter import Adapter, expect_adapter
from adaptertools.api.places import Given
from adaptertools.api.reading import read
from adaptertools.api.writing import WriteReport
from adaptertools.errors import AdapterToolsError
from adaptertools.operations.diff import diff


def delta_error_of(
    report: WriteReport, adapter: Adapter, *, base: Given | None = None, token: str | None = None
) -> float | None:
    """The largest ‖ΔW' − ΔW‖ / ‖ΔW‖ of a module, of what `report` says was written beside the adapter itself.

    0 where writing lost no bit. None where the two cannot be compared: what went to the Hub, and names that the format
    gives back in another form only with a base model. `base` is the one that the adapter was written with.

    Memory: a few float64 copies of one parameter's factors a core
    """
    expect_adapter(adapter)
    if report.exact:
        return 0.0
    if isinstance(report.path, Path):
        with suppress(AdapterToolsError):  # the file is whole; that we cannot measure it is no fault of its
            found = diff(adapter, read(report.path, format=report.format, base=base, token=token)).modules
            if not any(module.only_in for module in found):
                return max((module.relative_distance for module in found if not module.identical), default=0.0)
    return None
