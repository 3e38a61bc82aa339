"""Time and memory of converting a 1 GB adapter, against `cp` of the same file, in one run.

    python tests/benchmarks/convert.py [--folder DIR] [--rank 96] [--alpha 192] [--repeat 5]

Needs about 5 GB of free disk in DIR (the system's temporary folder unless given). Prints one line a measurement with
its target; exits 1 if one is missed. Nothing is cached between runs.

`cp` leaves its bytes in the page cache, and a conversion flushes them to disk before it renames the result into place.
So both are measured: `cp` alone, and `cp` followed by an fsync of the copy, which does what the conversion does.
"""

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

LAYERS, HIDDEN, KEYS, MLP = 32, 4096, 1024, 14336
PROJECTIONS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, KEYS),
    "self_attn.v_proj": (HIDDEN, KEYS),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, MLP),
    "mlp.up_proj": (HIDDEN, MLP),
    "mlp.down_proj": (MLP, HIDDEN),
}
"""Llama-3.1-8B: (in, out) of every linear layer of a block."""

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
"""Compiled modules are kept, as on any machine where the program has run before."""

AT_ONCE = "; import os; os._exit(0)"
"""Leaves Python as the program does, without the third of a second that taking torch apart takes."""

TIME_TARGET, MEMORY_TARGET, HELP_TARGET = 2.5, 1.3, 2.0


@dataclass(frozen=True)
class Run:
    """What a process took."""

    seconds: float
    peak_bytes: int


def run(command: Sequence[str], exits_with: int = 0) -> Run:
    """Run a command to its end; peak memory is the largest resident set that the kernel saw."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=output, env=ENVIRONMENT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != exits_with:
            output.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{output.read().decode()}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Run(seconds, usage.ru_maxrss * unit)


def best(repeat: int, command: Sequence[str], clear: Path | None = None) -> Run:
    """The shortest time of several runs, which is the one least disturbed, and the largest memory.

    `clear` is removed before each run, outside the time.
    """
    runs = []
    for _ in range(repeat):
        if clear is not None:
            remove(clear)
        runs.append(run(command))
    return Run(min(r.seconds for r in runs), max(r.peak_bytes for r in runs))


def remove(path: Path) -> None:
    """Remove a file or a folder, and the sidecar beside it."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        for each in path.parent.glob(f"{path.name}*"):
            each.unlink()


def make_adapter(folder: Path, rank: int, alpha: float, layers: int = LAYERS, seed: int = 0) -> None:
    """A PEFT adapter of Llama-8B shapes in float32."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    torch.manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for name, (size_in, size_out) in PROJECTIONS.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, size_in)
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(size_out, rank)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(name.split(".")[-1] for name in PROJECTIONS),
        "base_model_name_or_path": "meta-llama/Llama-3.1-8B",
        "task_type": "CAUSAL_LM",
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


ONE_MODULE = """
import sys, resource
from adaptertools import read
def resident():
    with open("/proc/self/smaps") as maps:
        inside, total = False, 0
        for line in maps:
            if "-" in line.split(" ")[0] and ":" not in line.split(" ")[0]:
                inside = line.rstrip().endswith("adapter_model.safetensors")
            elif inside and line.startswith("Rss:"):
                total += int(line.split()[1]) * 1024
    return total
adapter = read(sys.argv[1])
before = resident()
module = adapter.modules[len(adapter.modules) // 2]
checksum = float(module.lora_A.sum() + module.lora_B.sum())
wanted = module.lora_A.nbytes + module.lora_B.nbytes
print(before, resident(), wanted)
"""


@contextmanager
def scratch(parent: str | None) -> Iterator[Path]:
    """A folder that is removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="adaptertools-benchmark-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


class Table:
    """Prints measurements and remembers whether one missed its target."""

    def __init__(self) -> None:
        self.missed = False

    def line(
        self, label: str, value: str, ratio: float | None = None, of: str = "", target: float | None = None
    ) -> None:
        text = f"{label:<30} {value:>9}"
        if ratio is not None:
            text += f"   {ratio:5.2f} x {of}"
        if ratio is not None and target is not None:
            text += f", allowed {target}{'' if ratio <= target else '   MISSED'}"
            self.missed |= ratio > target
        print(text.rstrip(), flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--folder")
    options.add_argument("--rank", type=int, default=96)
    options.add_argument("--alpha", type=float, default=192.0)
    options.add_argument("--repeat", type=int, default=5)
    given = options.parse_args()
    table = Table()
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {platform.system()}")
    with scratch(given.folder) as folder:
        weights = folder / "adapter" / "adapter_model.safetensors"
        # in a process of its own: the kernel counts what this one once held to the peak of every child
        maker = multiprocessing.get_context("spawn").Process(
            target=make_adapter, args=(weights.parent, given.rank, given.alpha)
        )
        maker.start()
        maker.join()
        conversions(table, folder, weights, given.repeat)
        one_module(table, weights)
    startup(table)
    sys.exit(table.missed)


def conversions(table: Table, folder: Path, weights: Path, repeat: int) -> None:
    """Time and memory of peft -> loralib and peft -> flax, against copying the file."""
    size, copy = weights.stat().st_size, folder / "copy"
    run(["cat", str(weights)])  # the page cache is warm for everyone alike
    bare = best(repeat, ["cp", str(weights), str(copy)], copy)
    synced = best(repeat, ["sh", "-c", f"cp '{weights}' '{copy}' && sync '{copy}'"], copy)
    remove(copy)
    run([sys.executable, "-c", "import adaptertools.api"])  # compiles what is not yet compiled
    torch = best(repeat, [sys.executable, "-c", f"import torch{AT_ONCE}"])
    table.line(f"cp of {size / 1e9:.2f} GB", f"{bare.seconds:.2f} s")
    table.line("cp and fsync", f"{synced.seconds:.2f} s")
    table.line("import torch", f"{torch.seconds:.2f} s")
    for to, name in (("loralib", "lora.pt"), ("flax", "lora_flax")):
        dst = folder / name
        command = [sys.executable, "-m", "adaptertools", "convert", str(weights.parent), str(dst), "--to", to, "-q"]
        took = best(repeat, command, dst)
        remove(dst)
        own = took.seconds - torch.seconds
        allowed = took.seconds / (bare.seconds + torch.seconds)
        table.line(f"peft -> {to}", f"{took.seconds:.2f} s", allowed, "cp + import torch", TIME_TARGET)
        table.line("  all but import torch", f"{own:.2f} s", own / bare.seconds, "cp")
        table.line("", "", own / synced.seconds, "cp and fsync")
        table.line(
            "  peak memory", f"{took.peak_bytes / 1e6:.0f} MB", took.peak_bytes / size, "the file", MEMORY_TARGET
        )


def one_module(table: Table, weights: Path) -> None:
    """Bytes of the file that become resident when one module is read."""
    command = [sys.executable, "-c", ONE_MODULE, str(weights.parent)]
    before, after, wanted = map(int, subprocess.check_output(command).split())
    table.line("resident after the headers", f"{before / 1e6:.1f} MB")
    table.line("one module's tensors", f"{wanted / 1e6:.1f} MB")
    table.line("resident after reading them", f"{(after - before) / 1e6:.1f} MB", (after - before) / wanted, "them")


def startup(table: Table, repeat: int = 30) -> None:
    """`adaptertools --help` against `import click`, in turns, so that both meet the same machine."""
    help_command = [shutil.which("adaptertools") or "adaptertools", "--help"]
    bare, shown = [], []
    for _ in range(repeat):
        bare.append(run([sys.executable, "-c", "import click"]).seconds)
        shown.append(run(help_command).seconds)
    ratio = statistics.median(shown) / statistics.median(bare)
    table.line("import click", f"{statistics.median(bare) * 1e3:.0f} ms")
    table.line("adaptertools --help", f"{statistics.median(shown) * 1e3:.0f} ms", ratio, "import click", HELP_TARGET)


if __name__ == "__main__":
    main()
