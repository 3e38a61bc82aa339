"""The arithmetic of a merge on a block of rows: W + Σ s·B·A in float32, rounded once to the dtype of the result.

Factors of whatever dtype are widened first; where they or the weight are float64, so is the arithmetic. The error of a
sum is that of a float32 product and of one addition. On CUDA Triton's kernel does it in one pass over W for results in
bfloat16 and float32; else torch does, tile by tile. With MPS, which is untested, the CPU does all but the products.
"""

import contextlib
import functools
import importlib.util
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adaptertools.errors import NonFiniteError
from adaptertools.merging import tiles
from adaptertools.merging.cells import Cell, cut
from adaptertools.merging.edits import Edit
from adaptertools.merging.renorm import Norm
from adaptertools.merging.tiles import Sums

if TYPE_CHECKING:
    from adaptertools.merging.triton_kernel import Split


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """Sums over the elements of a tensor: what the merge added, and what rounding took of it."""

    delta: float
    """Σ δ², with δ the delta weight before rounding"""
    weight: float
    """Σ W²"""
    lost: float
    """Σ (W' − W − δ)²"""
    unchanged: int
    """the elements that are bit for bit what they would be if nothing were added"""
    elements: int

    @property
    def relative_delta(self) -> float:
        """‖δ‖ / ‖W‖"""
        return math.sqrt(self.delta / self.weight) if self.weight else math.inf if self.delta else 0.0

    @property
    def relative_error(self) -> float:
        """‖W' − W − δ‖ / ‖δ‖: the share of the delta weight that rounding took."""
        return math.sqrt(self.lost / self.delta) if self.delta else 0.0

    @property
    def relative_loss(self) -> float:
        """‖W' − W − δ‖ / ‖W‖: where nothing is added, what a cast took."""
        return math.sqrt(self.lost / self.weight) if self.weight else 0.0

    @property
    def share_unchanged(self) -> float:
        return self.unchanged / self.elements if self.elements else 0.0


class Prepared:
    """An edit whose factors lie on a device, ready for any block of rows, from any thread.

    Where `wants_norms`, `measure` is called for every block, then `settle`, and only then `merged`.
    """

    def __init__(self, edit: Edit, device: torch.device, sources: Sequence[str], has_statistics: bool) -> None:
        self.edit = edit
        self._multiplier = device
        self.device = device = torch.device("cpu") if device.type == "mps" else device  # it has no float64
        self.wants_norms = any(each.axis == "column" for each in edit.renormalizations)
        self._sources = sources
        self._has_statistics = has_statistics
        self._arithmetic = _arithmetic(edit)
        self._cells = cut(edit, self._arithmetic, device)
        self._norms = [Norm(each, self._arithmetic, device) for each in edit.renormalizations]
        self._column_gains: dict[int, Tensor] = {}
        self._squares: dict[int, dict[int, Tensor]] = {}
        self._sums: dict[int, list[Sums | Tensor]] = {}
        self._elements: dict[int, int] = {}
        self._lock = threading.Lock()
        # the kernel's factors have 22 bits, too few for 99.99 % of float16's eleven to come out as the nearest
        exact_enough = self._arithmetic == torch.float32 and edit.dtype != torch.float16
        self._is_fused = device.type == "cuda" and exact_enough and has_triton()
        self._splits: list[Split | None] = []
        self._packed: list[list[Tensor] | None] = []
        self._is_ready: torch.cuda.Event | None = None
        self._make_ready()

    def measure(self, weight: Tensor, start: int) -> None:
        """First pass, over all blocks, where norms run over the rows."""
        self._wait()
        squares = {
            place: norm.column_squares(weight, start) for place, norm in enumerate(self._norms) if norm.axis == "column"
        }
        with self._lock:
            self._squares[start] = squares

    def settle(self) -> None:
        """The end of the first pass. Sums are taken from top to bottom, in whatever order the blocks came."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # blocks may have been measured on any stream
        blocks = [self._squares[start] for start in sorted(self._squares)]
        for place, norm in enumerate(self._norms):
            if norm.axis == "column":
                total = torch.stack([squares[place] for squares in blocks]).sum(dim=0)
                self._column_gains[place] = norm.column_gains(total, self.edit.matrix[1])
        self._cells = [self._settled(cell) for cell in self._cells]
        self._make_ready()

    def merged(self, weight: Tensor, start: int, out: Tensor | None = None) -> Tensor:
        """Rows `start` … of the result, from those of the source; `out` may be `weight` itself.

        Shapes: weight (n, columns) -> (n, columns)
        Memory: on the CPU two tiles of 1 MiB a thread; on CUDA nothing but the result
        Raises: NonFiniteError on the CPU at once, on CUDA by `statistics`, naming the adapter or the weight at fault
        """
        if out is None:
            out = torch.empty(weight.shape, dtype=self.edit.dtype, device=weight.device)
        self._wait()
        gains = {place: norm.row_gains(weight, start) for place, norm in enumerate(self._norms) if norm.axis == "row"}
        sums = []
        for place, cell in enumerate(self._cells):
            first, stop = max(cell.rows.start - start, 0), min(cell.rows.stop - start, len(weight))
            if first < stop:
                here = (slice(first, stop), cell.columns)
                sums.append(self._add(place, weight[here], out[here], slice(first, stop), start, gains))
        with self._lock:
            self._sums[start] = sums
            self._elements[start] = weight.numel()
        if weight.device.type == "cpu" and not all(math.isfinite(value) for each in sums for value in each):
            raise self.fault(weight)
        return out

    @property
    def statistics(self) -> Statistics:
        """Of all blocks so far, whatever their order.

        Raises: NonFiniteError
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found = [_floats(each) for sums in self._sums.values() for each in sums]
        if not all(math.isfinite(value) for each in found for value in each):
            raise self.fault()
        return Statistics(
            delta=math.fsum(each[0] for each in found),
            weight=math.fsum(each[1] for each in found),
            lost=math.fsum(each[2] for each in found),
            unchanged=sum(int(each[3]) for each in found),
            elements=sum(self._elements.values()),
        )

    def _settled(self, cell: Cell) -> Cell:
        """The cell with the gains of its columns in the right factor."""
        right = cell.right.clone()
        for place, ranks in cell.renormalized:
            if place in self._column_gains:
                right[ranks] *= self._column_gains[place][cell.columns]
        return replace(cell, right=right)

    def _add(
        self, place: int, weight: Tensor, out: Tensor, here: slice, start: int, gains: dict[int, Tensor]
    ) -> Sums | Tensor:
        cell = self._cells[place]
        left = cell.left[here.start + start - cell.rows.start : here.stop + start - cell.rows.start]
        row: Tensor | None = None
        column: Tensor | None = None
        for index, ranks in cell.renormalized:
            share = self._norms[index].weight
            if index in gains:
                gain = gains[index][here]
                left = left.clone() if row is None else left
                left[:, ranks] *= gain.unsqueeze(1)
                row = share * (gain - 1) + (0 if row is None else row)
            else:
                gain = self._column_gains[index][cell.columns]
                column = share * (gain - 1) + (0 if column is None else column)
        row, column = (None if each is None else each.to(self._arithmetic) for each in (row, column))
        split = self._splits[place]
        if split is None:
            return tiles.add_product(
                weight, left, cell.right, row, column, out, self._has_statistics, self._packed[place]
            )
        from adaptertools.merging import triton_kernel

        if row is not None:
            split = triton_kernel.split(left, cell.right)
        else:
            split = split.rows(here.start + start - cell.rows.start, len(weight))
        return triton_kernel.add_product(weight, split, row, column, out, self._has_statistics)

    def _make_ready(self) -> None:
        """Split the factors for the kernel, or pack them for oneDNN, and let other streams wait for that."""
        self._splits = [None] * len(self._cells)
        self._packed = [tiles.pack(cell.right, self.edit.dtype, self._multiplier) for cell in self._cells]
        if self._is_fused:
            from adaptertools.merging import triton_kernel

            self._splits = [
                triton_kernel.split(cell.left, cell.right) if cell.left.shape[1] else None for cell in self._cells
            ]
        if self.device.type == "cuda":
            self._is_ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._is_ready.record(torch.cuda.current_stream(self.device))

    def _wait(self) -> None:
        if self._is_ready is not None:
            torch.cuda.current_stream(self.device).wait_event(self._is_ready)

    def fault(self, weight: Tensor | None = None) -> NonFiniteError:
        """The error that names what is not finite: a factor, a magnitude, the weight, or the sum of them."""
        for update in (*self.edit.updates, *(each.update for each in self.edit.renormalizations)):
            if not (_is_finite(update.left) and _is_finite(update.right) and math.isfinite(update.scale)):
                return NonFiniteError(
                    f"{self._label(update.source)}: {update.target}: its factors hold NaN or infinity"
                )
        for each in self.edit.renormalizations:
            if not _is_finite(each.magnitude):
                label = self._label(each.update.source)
                return NonFiniteError(f"{label}: {each.update.target}: its magnitudes hold NaN or infinity")
        if weight is not None and not _is_finite(weight):
            return NonFiniteError(
                f"{self.edit.name}: the base weight holds NaN or infinity. Download the base model again, or check it"
            )
        where = "" if weight is not None else " the base weight holds NaN or infinity, or"
        zero = " a row or column has norm 0 (DoRA divides by it), or" if self.edit.renormalizations else ""
        return NonFiniteError(
            f"{self.edit.name}:{where}{zero} the merged weight leaves the range of {self.edit.dtype}, which a smaller "
            "weight or a wider dtype (--dtype) avoids"
        )

    def _label(self, source: int) -> str:
        return self._sources[source] if source < len(self._sources) else f"adapter {source + 1}"


def prepare(edit: Edit, device: torch.device, *, sources: Sequence[str] = (), has_statistics: bool = True) -> Prepared:
    """The edit with its factors on the device. `sources` are what error messages call the adapters.

    Without statistics nothing is summed, and what is not finite passes.

    Memory: the factors in float32 (twice on CUDA)
    """
    return Prepared(edit, device, sources, has_statistics)


def cast_statistics(block: Tensor, cast: Tensor) -> Statistics:
    """What a cast took. NaN and infinity stay what they are, and count as 0.

    Memory: two copies of the block in float32, or in float64 if it is
    """
    wide = block.to(torch.promote_types(block.dtype, torch.float32)).nan_to_num(0.0, 0.0, 0.0)
    lost = cast.to(wide.dtype).nan_to_num(0.0, 0.0, 0.0).sub_(wide)
    weight, off = (float(torch.linalg.vector_norm(each, dtype=torch.float64)) ** 2 for each in (wide, lost))
    return Statistics(delta=0.0, weight=weight, lost=off, unchanged=int((lost == 0).sum()), elements=block.numel())


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 in float32, whatever TF32 or bfloat16 the process allows itself elsewhere."""
    torch_backends: Any = torch.backends
    backends = (torch_backends.cuda.matmul, torch_backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed and can compile here, for which it wants a C compiler."""
    if importlib.util.find_spec("triton") is None:
        return False
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except Exception:  # whatever it is that its compiler, or the driver, lacks
        return False
    return True


def _arithmetic(edit: Edit) -> torch.dtype:
    updates = (*edit.updates, *(each.update for each in edit.renormalizations))
    factors = [factor.dtype for update in updates for factor in (update.left, update.right)]
    return torch.float64 if torch.float64 in (edit.dtype, *factors) else torch.float32


def _floats(sums: Sums | Tensor) -> Sequence[float]:
    return [float(value) for value in sums.tolist()] if isinstance(sums, Tensor) else sums


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
