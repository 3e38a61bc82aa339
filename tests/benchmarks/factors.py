"""Speed and memory of truncate, stack and diff on adapters of Llama-8B shapes: 224 modules, rank 64, float32.

    python tests/benchmarks/factors.py [--folder DIR] [--layers 32] [--cores 2] [--gpu] [--skip-dense] [--only NAME …]

Prints one line a measurement with its target; exits 1 if one is missed. With fewer layers, targets for the whole model
are shown and not judged. `stack` needs about 17 GB of free disk in DIR (the system's temporary folder unless given).

On the CPU, this process and the commands that it runs keep to so many cores; the GPU part may use all of them.
"""

import argparse
import multiprocessing
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from convert import LAYERS, PROJECTIONS, Table, best, make_adapter, remove, run, scratch

if TYPE_CHECKING:
    import torch

    from adaptertools import Adapter, LoraModule
    from adaptertools.operations.truncate import Truncation

RANK, LOWER, ALPHA, SOURCES = 64, 16, 128.0, 8
"""Ranks before and after truncation; adapters in a stack."""

TRUNCATE_SECONDS, DENSE_RATIO, SAME_ERROR = 5.0, 500.0, 1e-6
GPU_SECONDS = 0.060
STACK_RATIO, DIFF_SECONDS = 3.0, 10.0

Result = TypeVar("Result")


class Judged(Table):
    """A table whose lines may have a target of their own. `whole` says that all layers are measured."""

    def __init__(self, *, whole: bool) -> None:
        super().__init__()
        self.whole = whole

    def goal(self, label: str, value: str, target: str, *, met: bool, of_the_model: bool = True) -> None:
        """One line; a target for the whole model is judged only where the whole model was measured."""
        judged = self.whole or not of_the_model
        verdict = "" if met else "   MISSED"
        print(f"{label:<44} {value:>12}   {target}{verdict if judged else ' for all layers'}", flush=True)
        self.missed |= judged and not met

    def show(self, label: str, value: str, remark: str = "") -> None:
        """One line without a target."""
        print(f"{label:<44} {value:>12}   {remark}".rstrip(), flush=True)


@contextmanager
def few_cores(count: int) -> Iterator[None]:
    """Keep this process, and those that it starts, to the first cores that it has."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, set(sorted(before)[:count]))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def shortest(
    repeat: int, work: Callable[[], Result], settle: Callable[[], None] = lambda: None
) -> tuple[float, Result]:
    """The shortest time of several calls, the one least disturbed, and what the last gave."""
    times = []
    for _ in range(repeat):
        settle()
        start = time.perf_counter()
        result = work()
        settle()
        times.append(time.perf_counter() - start)
    return min(times), result


def in_memory(layers: int, device: str = "cpu") -> "Adapter":
    """The adapter with its factors on a device already."""
    import torch

    from adaptertools import Adapter, LoraModule, Target

    generator = torch.Generator().manual_seed(0)
    return Adapter(
        modules=tuple(
            LoraModule(
                target=Target(parameter=f"model.layers.{layer}.{name}"),
                lora_A=torch.randn(RANK, size_in, generator=generator).to(device),
                lora_B=torch.randn(size_out, RANK, generator=generator).to(device),
                alpha=ALPHA,
            )
            for layer in range(layers)
            for name, (size_in, size_out) in PROJECTIONS.items()
        )
    )


def distance(one: "LoraModule", other: "LoraModule") -> float:
    """‖ΔW − ΔW'‖ / ‖ΔW‖ of two modules, from their factors."""
    import torch

    from adaptertools.linalg import product_norm

    A, B = one.lora_A.cpu().double(), one.lora_B.cpu().double() * one.scaling
    other_A, other_B = other.lora_A.cpu().double(), other.lora_B.cpu().double() * other.scaling
    difference = product_norm(torch.cat([A, other_A]), torch.cat([B, -other_B], dim=1))
    return float(difference / product_norm(A, B))


def dense_error(before: "LoraModule", near: "torch.Tensor") -> float:
    """‖ΔW − ΔW'‖ / ‖ΔW‖ by the dense matrices, in float64."""
    import torch

    delta = before.delta_weight(dtype=torch.float64)
    return float((delta - near.to(delta)).norm() / delta.norm())


def truncate_by_command(table: Judged, given: argparse.Namespace, folder: Path) -> None:
    """The whole command, from the start of Python to the file on disk."""
    (source,) = make_sources(folder, 1, given.layers)
    dst = folder / "truncated"
    command = [*ADAPTERTOOLS, "truncate", str(source), str(dst), "--rank", str(LOWER), "--device", "cpu", "-q"]
    took = best(given.repeat, command, dst)
    table.show(f"truncate {RANK} -> {LOWER}, the whole command", f"{took.seconds:.2f} s")
    table.show("", "", memory(took.peak_bytes, source))
    remove(dst)
    remove(source)


def truncate_on_cpu(table: Judged, given: argparse.Namespace, folder: Path) -> None:
    """The whole adapter by the command and in this process; one module against a dense SVD."""
    truncate_by_command(table, given, folder)  # first: children inherit the peak of a process that computes

    import torch

    from adaptertools import Adapter, truncate

    torch.set_num_threads(given.cores)
    adapter = in_memory(given.layers)
    seconds, done = shortest(given.repeat, lambda: truncate(adapter, rank=LOWER, device="cpu"))
    table.goal(
        f"truncate {len(adapter.modules)} modules in memory",
        f"{seconds:.2f} s",
        f"at most {TRUNCATE_SECONDS:g} s",
        met=seconds <= TRUNCATE_SECONDS,
    )
    table.show("  relative error, and that of rounding", f"{done.relative_error:.6f}", f"{done.rounding_error:.1e}")
    square = next(module for module in adapter.modules if module.target.parameter.endswith("q_proj"))
    alone = Adapter(modules=(square,))
    seconds, one = shortest(5 * given.repeat, lambda: truncate(alone, rank=LOWER, device="cpu"))
    shape = "x".join(map(str, square.weight_shape))
    table.show(f"truncate one module of {shape}", f"{seconds * 1e3:.1f} ms")
    if not given.skip_dense:
        against_dense(table, square, one, seconds)


def against_dense(table: Judged, square: "LoraModule", one: "Truncation", seconds: float) -> None:
    """One module's truncation beside torch.linalg.svd of its ΔW, which is done once."""
    import torch

    delta = square.delta_weight()
    start = time.perf_counter()
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    taken = time.perf_counter() - start
    ratio = taken / seconds
    ours = dense_error(square, one.adapter.modules[0].delta_weight(dtype=torch.float64))
    theirs = dense_error(square, (U[:, :LOWER].double() * S[:LOWER].double()) @ Vh[:LOWER].double())
    table.goal(
        "  torch.linalg.svd of its delta weight",
        f"{taken:.2f} s",
        f"{ratio:.0f} x, at least {DENSE_RATIO:g} x",
        met=ratio >= DENSE_RATIO,
        of_the_model=False,
    )
    table.goal(
        "  error, and that of the dense SVD",
        f"{ours:.8f}",
        f"{theirs:.8f}, the same within {SAME_ERROR:g}",
        met=ours <= theirs + SAME_ERROR,
        of_the_model=False,
    )


def truncate_on_gpu(table: Judged, given: argparse.Namespace, folder: Path) -> None:
    """The whole adapter with its factors on the device, beside the unbatched loop and one dense SVD."""
    import torch

    from adaptertools import truncate
    from adaptertools.linalg import svd_of_product
    from adaptertools.operations.spectra import decompose, rebuild

    if not torch.cuda.is_available():
        raise SystemExit("--gpu: there is no CUDA device")
    adapter, settle, device = in_memory(given.layers, "cuda"), torch.cuda.synchronize, torch.device("cuda")
    modules, count = adapter.modules, len(adapter.modules)

    def decompose_and_rebuild() -> None:
        rebuild(modules, decompose(modules, device), [LOWER] * count, device)

    def one_by_one() -> None:
        for module in modules:
            svd_of_product(module.lora_A, module.lora_B).factors(module.lora_A, module.lora_B, LOWER)

    truncate(adapter, rank=LOWER, device="cuda")  # the first call loads kernels
    repeat = 4 * given.repeat
    table.show("device", "", torch.cuda.get_device_name())
    seconds, done = shortest(repeat, lambda: truncate(adapter, rank=LOWER, device="cuda"), settle)
    table.goal(
        f"truncate {count} modules, {RANK} -> {LOWER}",
        f"{seconds * 1e3:.1f} ms",
        f"at most {GPU_SECONDS * 1e3:g} ms",
        met=seconds <= GPU_SECONDS,
    )
    times = statistics.median(
        shortest(1, lambda: truncate(adapter, rank=LOWER, device="cuda"), settle)[0] for _ in range(repeat)
    )
    table.show("  its median", f"{times * 1e3:.1f} ms")
    factors, _ = shortest(repeat, decompose_and_rebuild, settle)
    table.show("  its factor algebra alone", f"{factors * 1e3:.1f} ms")
    loop, _ = shortest(given.repeat, one_by_one, settle)
    table.show("  module by module", f"{loop * 1e3:.1f} ms", f"{loop / factors:.1f} x")
    here = truncate(in_memory(given.layers), rank=LOWER, device="cpu")
    off = max(map(distance, here.adapter.modules, done.adapter.modules))
    table.goal(
        "  largest distance from what the CPU gives",
        f"{off:.1e}",
        f"at most {SAME_ERROR:g}",
        met=off <= SAME_ERROR,
        of_the_model=False,
    )
    table.show("  relative error, and that of the CPU", f"{done.relative_error:.8f}", f"{here.relative_error:.8f}")
    if not given.skip_dense:
        square = next(module for module in modules if module.target.parameter.endswith("q_proj"))
        delta = square.delta_weight()
        torch.linalg.svd(delta[:64, :64])
        dense, _ = shortest(1, lambda: torch.linalg.svd(delta, full_matrices=False), settle)
        shape = "x".join(map(str, square.weight_shape))
        table.show(f"one dense SVD of {shape} on the device", f"{dense:.2f} s", f"{dense / seconds:.0f} x all of them")


ADAPTERTOOLS = [sys.executable, "-m", "adaptertools"]


def make_sources(folder: Path, count: int, layers: int) -> list[Path]:
    """Adapters that differ in every value, each made in a process of its own, which gives its memory back."""
    places = [folder / f"source{seed}" for seed in range(count)]
    for seed, place in enumerate(places):
        maker = multiprocessing.get_context("spawn").Process(
            target=make_adapter, args=(place, RANK, ALPHA, layers, seed)
        )
        maker.start()
        maker.join()
        if maker.exitcode:
            raise SystemExit(f"{place} could not be written")
    return places


def weights_of(folder: Path) -> Path:
    return folder / "adapter_model.safetensors"


def memory(peak_bytes: int, *adapters: Path) -> str:
    """The peak, and how many times the size of the files that is."""
    size = sum(weights_of(adapter).stat().st_size for adapter in adapters)
    return f"peak {peak_bytes / 1e6:.0f} MB, {peak_bytes / size:.2f} x the {size / 1e6:.0f} MB that are read"


def stack_and_diff(table: Judged, given: argparse.Namespace, folder: Path) -> None:
    """Eight adapters summed, against copying the result; two of them compared, and one with a copy of itself."""
    sources = make_sources(folder, SOURCES, given.layers)
    for source in sources:
        run(["cat", str(weights_of(source))])  # as warm as the machine's memory allows, for all alike
    dst, copy = folder / "stacked", folder / "copy"
    command = [*ADAPTERTOOLS, "stack", *map(str, sources), str(dst), "--device", "cpu", "-q"]
    took = best(given.repeat, command, dst)
    size = weights_of(dst).stat().st_size
    bare = best(given.repeat, ["cp", str(weights_of(dst)), str(copy)], copy)
    synced = best(given.repeat, ["sh", "-c", f"cp '{weights_of(dst)}' '{copy}' && sync '{copy}'"], copy)
    remove(copy)
    remove(dst)
    table.show(f"cp of {size / 1e9:.2f} GB, the stack's output", f"{bare.seconds:.2f} s")
    table.show("  with fsync", f"{synced.seconds:.2f} s")
    ratio = took.seconds / bare.seconds
    table.goal(
        f"stack of {SOURCES}, the whole command",
        f"{took.seconds:.2f} s",
        f"{ratio:.2f} x cp, at most {STACK_RATIO:g} x",
        met=ratio <= STACK_RATIO,
    )
    table.show("  against cp with fsync, which it does too", f"{took.seconds / synced.seconds:.2f} x")
    table.show("", "", memory(took.peak_bytes, *sources))
    for other in sources[2:]:
        remove(other)
    one, another = sources[:2]
    same = folder / "same"
    shutil.copytree(one, same)
    for label, b, code in (("two different ones", another, 4), ("two equal ones", same, 0)):
        command = [*ADAPTERTOOLS, "diff", str(one), str(b), "-q"]
        runs = [run(command, exits_with=code) for _ in range(given.repeat)]
        seconds, peak = min(r.seconds for r in runs), max(r.peak_bytes for r in runs)
        table.goal(
            f"diff of {label}, the whole command",
            f"{seconds:.2f} s",
            f"at most {DIFF_SECONDS:g} s",
            met=seconds <= DIFF_SECONDS,
        )
        table.show("", "", memory(peak, one, b))


def check_room(folder: str | None, parts: Sequence[str], layers: int) -> None:
    """Leave before anything is written if the disk is too small."""
    import tempfile

    adapter = 4 * RANK * layers * sum(size_in + size_out for size_in, size_out in PROJECTIONS.values())
    needed = 3 * SOURCES * adapter if "stack" in parts else 2 * adapter if "truncate" in parts else 0
    place = folder or tempfile.gettempdir()
    free = shutil.disk_usage(place).free
    if free < 1.05 * needed:
        raise SystemExit(
            f"{place} has {free / 1e9:.1f} GB free, {1.05 * needed / 1e9:.1f} GB are needed: name another folder with "
            "--folder, or take fewer --layers"
        )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--folder", help="where scratch files go; they are removed afterwards")
    options.add_argument("--layers", type=int, default=LAYERS)
    options.add_argument("--cores", type=int, default=2)
    options.add_argument("--repeat", type=int, default=3)
    options.add_argument("--gpu", action="store_true", help="measure on a CUDA device too")
    options.add_argument(
        "--skip-dense", action="store_true", help="leave out the dense SVDs, which take up to a minute"
    )
    options.add_argument("--only", nargs="+", choices=("stack", "truncate", "gpu"), help="measure these alone")
    given = options.parse_args()
    wanted = given.only or ["stack", "truncate", *(["gpu"] if given.gpu else [])]
    parts = [part for part in ("stack", "truncate", "gpu") if part in wanted]
    check_room(given.folder, parts, given.layers)
    table = Judged(whole=given.layers == LAYERS)
    work: dict[str, Callable[[Judged, argparse.Namespace, Path], None]] = {
        "stack": stack_and_diff,
        "truncate": truncate_on_cpu,
        "gpu": truncate_on_gpu,
    }
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {platform.system()}")
    run([sys.executable, "-c", "import adaptertools.api"])  # compiles what is not yet compiled
    for part in parts:
        with scratch(given.folder) as folder:
            if part == "gpu":
                work[part](table, given, folder)
                continue
            print(f"On {given.cores} cores:", flush=True)
            with few_cores(given.cores):
                work[part](table, given, folder)
    sys.exit(table.missed)


if __name__ == "__main__":
    main()
