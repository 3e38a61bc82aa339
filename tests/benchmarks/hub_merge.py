"""A merge from Hub to Hub over a loopback server, against its three stages alone; and what looking at a header moves.

    python tests/benchmarks/hub_merge.py [--folder DIR] [--size 1.0] [--shards 8] [--rank 32] [--repeat 3]
                                         [--megabytes-per-second N]

Makes a base of the shape of Llama with random bf16 weights of about so many GB, and an adapter on all seven
projections. Needs five times its size of free disk in DIR (the system's temporary folder unless given). The server is
another process, and shares the machine's cores; a rate makes it as slow as a network in either direction. The ways take
turns, each with an empty cache and an empty repository, and the fastest of each counts. The stages are `pull` of the
base into the cache, `merge` from folder to folder, and `push` of the result. Prints one line a measurement with its
target; exits 1 if one is missed.
"""

import argparse
import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

os.environ["HF_HUB_DISABLE_XET"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

from convert import Table, scratch
from merge import SHAPES, make_adapter, make_base, projections

OVERLAP_TARGETS = {"sum": 0.8, "slowest": 1.5}
CORES_FOR_SLOWEST = 8
INSPECT_TARGET = 1.0
MEGABYTE = 1e6


def serve(base: Path, rate: float | None, caller: Connection) -> None:
    """A server with the base, which tells the bytes that it has sent since it was last asked."""
    from hub_server import HubServer

    with HubServer() as hub:
        hub.throttle = rate
        hub.create_repo("org/base", {path.name: path for path in base.iterdir()})
        caller.send(hub.endpoint)
        while caller.recv():
            caller.send(hub.sent())
            hub.requests.clear()
            hub.repositories = {"org/base": hub.repositories["org/base"]}


def stages(base: Path, adapter: Path, merged: Path) -> dict[str, Callable[[Path], object]]:
    """Each stage alone, and all of them as one merge."""
    from adaptertools import api
    from adaptertools.hub.stream import Way
    from adaptertools.merging.run import run_merge

    def streamed(place: Path, *, low_disk: bool) -> None:
        way = Way.parse("hf://me/merged", low_disk=low_disk, work_dir=str(place / "work"))
        plan = api.plan_merge(way.open_base("hf://org/base"), [api.read(adapter)])
        way.run(plan, device="cpu")

    return {
        "download alone": lambda place: api.localize("hf://org/base", "model"),
        "merge alone": lambda place: run_merge(api.plan_merge(base, [api.read(adapter)]), place / "dst", device="cpu"),
        "upload alone": lambda place: api.push(merged, "me/pushed"),
        "Hub to Hub": lambda place: streamed(place, low_disk=False),
        "Hub to Hub, --low-disk": lambda place: streamed(place, low_disk=True),
    }


def measure(
    folder: Path, ways: dict[str, Callable[[Path], object]], repeat: int, ask: Callable[[], int]
) -> dict[str, float]:
    """The fastest of each way, in seconds."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(repeat):
        for name, way in ways.items():
            place = Path(tempfile.mkdtemp(dir=folder))
            os.environ["HF_HUB_CACHE"] = str(place / "cache")
            began = time.perf_counter()
            way(place)
            best[name] = min(best[name], time.perf_counter() - began)
            shutil.rmtree(place)
            ask()  # the server forgets what was pushed
    return best


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--folder")
    options.add_argument("--size", type=float, default=1.0)
    options.add_argument("--shards", type=int, default=8)
    options.add_argument("--rank", type=int, default=32)
    options.add_argument("--repeat", type=int, default=3)
    options.add_argument("--megabytes-per-second", type=float)
    given = options.parse_args()
    rate = given.megabytes_per_second * MEGABYTE if given.megabytes_per_second else None
    cores = len(os.sched_getaffinity(0))
    print(f"{platform.machine()}, {cores} cores, Python {platform.python_version()}, {platform.system()}")
    with scratch(given.folder) as folder:
        base, adapter, merged = folder / "base", folder / "adapter", folder / "merged"
        shape = SHAPES[max(size for size in SHAPES if size <= given.size)]
        layer = 2 * sum(n_in * n_out for n_in, n_out in projections(shape).values())
        layers = max(1, round((given.size * 1e9 - 4 * shape["vocab_size"] * shape["hidden_size"]) / layer))
        make_base(base, shape, layers, int(given.size * 1e9 / given.shards))
        make_adapter(adapter, shape, layers, given.rank, seed=0)
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        server = context.Process(target=serve, args=(base, rate, there), daemon=True)
        server.start()
        os.environ |= {"HF_ENDPOINT": here.recv(), "HF_TOKEN": "hf_writer", "HF_HUB_CACHE": str(folder / "cache")}

        def ask() -> int:
            here.send(True)
            return int(here.recv())

        table = Table()
        measurements(table, folder, given.repeat, cores, stages(base, adapter, merged), ask)
        here.send(False)
        server.join()
    sys.exit(table.missed)


def measurements(
    table: Table,
    folder: Path,
    repeat: int,
    cores: int,
    ways: dict[str, Callable[[Path], object]],
    ask: Callable[[], int],
) -> None:
    from adaptertools import api

    ways["merge alone"](folder / "first")  # imports, warms up, and makes what is pushed
    (folder / "first" / "dst").rename(folder / "merged")
    ask()
    api.localize("hf://org/base", "model", headers=True)
    moved = ask() / MEGABYTE
    size = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors")) / MEGABYTE
    table.line(f"headers of {size:,.0f} MB", f"{moved:.3f} MB", moved, "1 MB", INSPECT_TARGET)
    best = measure(folder, ways, repeat, ask)
    alone = [seconds for name, seconds in best.items() if name.endswith("alone")]
    for name, seconds in best.items():
        if name.endswith("alone"):
            table.line(name, f"{seconds:.2f} s")
            continue
        many = cores >= CORES_FOR_SLOWEST
        table.line(name, f"{seconds:.2f} s", seconds / sum(alone), "the sum", None if many else OVERLAP_TARGETS["sum"])
        if many:
            table.line("", "", seconds / max(alone), "the slowest", OVERLAP_TARGETS["slowest"])


if __name__ == "__main__":
    main()
