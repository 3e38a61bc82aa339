"""The merge kernel alone, over the 224 projections of an 8B Llama in bfloat16, beside torch.clone of the same weights.

    python tests/benchmarks/merge_kernel.py [--layers 32]

Each line is the best of several replays of a CUDA graph, so that no launch is waited for. PEFT's arithmetic is its
merge's: the product and its scaling in float32 (TF32 off), added to the weight in place. Exits 1 if a target is missed.
"""

import argparse
import platform
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from adaptertools.merging.kernels import full_precision
from adaptertools.merging.triton_kernel import add_product, split

SHAPES = ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336))
REPLAYS = 7
TARGETS = {32: 0.75, 128: 0.60}
"""By rank, the least share of the bandwidth of torch.clone."""


def milliseconds(work: Callable[[], object]) -> float:
    """The best time of a CUDA graph of the work."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(REPLAYS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    del graph
    torch.cuda.empty_cache()
    return min(times)


def factors(weights: list[Tensor], rank: int) -> list[tuple[Tensor, Tensor]]:
    return [
        (torch.randn(len(w), rank, device="cuda") * 1e-5, torch.randn(rank, w.shape[1], device="cuda")) for w in weights
    ]


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--layers", type=int, default=32)
    layers = options.parse_args().layers
    torch.manual_seed(0)
    weights = [(torch.randn(s, device="cuda") * 0.02).bfloat16() for _ in range(layers) for s in SHAPES]
    moved = 2 * sum(w.nbytes for w in weights)

    def report(name: str, time: float, clone: float, target: float = 0.0) -> bool:
        """Whether it is fast enough."""
        met = clone / time >= target
        wanted = (f"   at least {target:.0%}" if target else "") + ("" if met else "   MISSED")
        print(f"{name:<44} {time:8.2f} ms {moved / time / 1e6:8.0f} GB/s {clone / time:7.1%}{wanted}", flush=True)
        return met

    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {platform.python_version()}; "
        f"{len(weights)} tensors, {moved / 2e9:.1f} GB in bfloat16"
    )
    clone = milliseconds(lambda: [w.clone() for w in weights])
    report("torch.clone", clone, clone)
    met = True
    for rank in (16, 32, 64, 128, 256):
        pairs = factors(weights, rank)
        ready = [split(*pair) for pair in pairs]
        for has_statistics in (False, True):
            time = milliseconds(
                lambda ready=ready, has=has_statistics: [
                    add_product(w, s, None, None, w, has) for w, s in zip(weights, ready, strict=True)
                ]
            )
            label = f"ours, rank {rank}{', with statistics' if has_statistics else ''}"
            met &= report(label, time, clone, 0.0 if has_statistics else TARGETS.get(rank, 0.0))
        if rank in (32, 128):
            report(
                f"ours, rank {rank}: factors made ready", milliseconds(lambda p=pairs: [split(*x) for x in p]), clone
            )
            with full_precision():
                peft = milliseconds(
                    lambda p=pairs: [w.add_((b @ a) * 0.5) for w, (b, a) in zip(weights, p, strict=True)]
                )
            report(f"PEFT's arithmetic, rank {rank}", peft, clone)
        del pairs, ready
    sys.exit(not met)


if __name__ == "__main__":
    main()
