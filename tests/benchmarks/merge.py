"""Time and memory of a merge, file to file: `cp -r` of the base, PEFT and adaptertools in turn, in one run.

    python tests/benchmarks/merge.py [--folder DIR] [--size 2.2] [--rank 32] [--repeat 3] [--gpu] [--skip-peft]

Makes a base of the shape of Llama with random bf16 weights of about so many GB in several shards, and four rank-32
float32 adapters on all seven projections. Needs four times its size of free disk in DIR (the system's temporary folder
unless given). Prints one line a measurement with its target; exits 1 if one is missed.

The base is in the page cache for everyone alike. A merge flushes its result to disk before it renames it into place,
which neither `cp` nor PEFT does: so everything is measured twice, like with like. With fsync, `cp -r` and PEFT are
followed by `sync` of their files; without, a merge runs with os.fsync taken out, and with os.posix_fadvise, by which it
has the disk begin early.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from convert import AT_ONCE, PROJECTIONS, Run, Table, remove, run, scratch

if TYPE_CHECKING:
    import torch

SHAPES = {
    8.0: {"hidden_size": 4096, "intermediate_size": 14336, "keys": 1024, "vocab_size": 128256, "heads": 32},
    1.0: {"hidden_size": 2048, "intermediate_size": 5632, "keys": 256, "vocab_size": 32000, "heads": 32},
    0.1: {"hidden_size": 768, "intermediate_size": 2048, "keys": 256, "vocab_size": 16000, "heads": 12},
    0.0: {"hidden_size": 128, "intermediate_size": 384, "keys": 64, "vocab_size": 1000, "heads": 4},
}
"""From so many GB on: Llama-3-8B, TinyLlama, and smaller ones to try this file with."""

ADAPTERS = 4
CPU_TARGETS = {"copy": 3.0, "peft": 5.0}
GPU_TARGETS = {"copy": 0.4, "peft": 8.0}
FOUR_TARGET = 1.3

MERGE = """
import os, sys
if sys.argv[1] == "bare":
    os.fsync = os.fdatasync = os.posix_fadvise = lambda *_: None
from adaptertools.cli import main
sys.argv = ["adaptertools", *sys.argv[2:]]
main()
"""

PEFT = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, dst, device = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, device_map={"": device})
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(dst)
"""

IMPORT_PEFT = "import torch, peft; from transformers import LlamaForCausalLM"


# ---------------------------------------------------------------------------------------------------------- the inputs


def make_inputs(folder: Path, gigabytes: float, rank: int) -> None:
    """A base of this size, and adapters for it."""
    shape = next(shape for least, shape in SHAPES.items() if gigabytes >= least)
    tables = 2 * shape["vocab_size"] * shape["hidden_size"] * 2
    layer = 2 * sum(n_in * n_out for n_in, n_out in projections(shape).values())
    layers = max(1, round((gigabytes * 1e9 - tables) / layer))
    make_base(folder / "base", shape, layers, shard=max(1, int(gigabytes * 1e9 / 4)))
    for index in range(ADAPTERS):
        make_adapter(folder / f"adapter{index}", shape, layers, rank, seed=index)


def projections(shape: dict[str, int]) -> dict[str, tuple[int, int]]:
    """(in, out) of every linear layer of a block."""
    hidden, keys, mlp = shape["hidden_size"], shape["keys"], shape["intermediate_size"]
    sizes = (
        (hidden, hidden),
        (hidden, keys),
        (hidden, keys),
        (hidden, hidden),
        (hidden, mlp),
        (hidden, mlp),
        (mlp, hidden),
    )
    return dict(zip(PROJECTIONS, sizes, strict=True))


def make_base(folder: Path, shape: dict[str, int], layers: int, shard: int) -> None:
    """A checkpoint that transformers loads, in shards of about so many bytes."""
    hidden, vocab = shape["hidden_size"], shape["vocab_size"]
    sizes = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        sizes |= {f"{prefix}.{name}.weight": (n_out, n_in) for name, (n_in, n_out) in projections(shape).items()}
        sizes |= {f"{prefix}.{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
    folder.mkdir()
    write_shards(folder, sizes, shard)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": shape["intermediate_size"],
        "num_hidden_layers": layers,
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["heads"] * shape["keys"] // hidden,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def write_shards(folder: Path, sizes: dict[str, tuple[int, ...]], limit: int) -> None:
    """Random tensors, cut from a pool at changing places: drawing every number anew would take minutes."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    largest = max(map(math.prod, sizes.values()))
    pool = (torch.randn(min(largest, 1 << 26)) * 0.02).bfloat16()
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for name, size in sizes.items():
        if held > limit:
            groups.append({})
            held = 0
        groups[-1][name] = size
        held += 2 * math.prod(size)
    weight_map = {}
    for index, group in enumerate(groups):
        file = f"model-{index + 1:05}-of-{len(groups):05}.safetensors"
        weight_map |= dict.fromkeys(group, file)
        shard = {name: random_tensor(pool, size, 7919 * place) for place, (name, size) in enumerate(group.items())}
        save_file(shard, folder / file, metadata={"format": "pt"})
    total = sum(2 * math.prod(size) for size in sizes.values())
    index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))


def random_tensor(pool: "torch.Tensor", size: tuple[int, ...], start: int) -> "torch.Tensor":
    count = math.prod(size)
    rolled = pool.roll(start)
    return rolled.repeat(-(-count // len(rolled)))[:count].reshape(size)


def make_adapter(folder: Path, shape: dict[str, int], layers: int, rank: int, seed: int) -> None:
    """What PEFT saves of a trained adapter, in float32."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for name, (n_in, n_out) in projections(shape).items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, n_in) * 0.02
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(n_out, rank) * 0.02
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted(name.split(".")[-1] for name in PROJECTIONS),
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


# ------------------------------------------------------------------------------------------------------- file to file


def in_turns(repeat: int, dst: Path, commands: dict[str, Sequence[str]]) -> dict[str, Run]:
    """The shortest time and the largest memory of each command, which take turns, so that all meet the same machine.

    The result of the one before is removed, and its removal flushed, outside the time.
    """
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(repeat):
        for name, command in commands.items():
            clear(dst)
            runs[name].append(run(command))
            print(f"{name}: {runs[name][-1].seconds:.2f} s", file=sys.stderr, flush=True)
    clear(dst)
    return {name: Run(min(r.seconds for r in its), max(r.peak_bytes for r in its)) for name, its in runs.items()}


def clear(dst: Path) -> None:
    if dst.exists():
        remove(dst)
    os.sync()


def shell(command: Sequence[str], then_sync: Path | None = None) -> list[str]:
    """The command, followed by an fsync of every file of a folder."""
    if then_sync is None:
        return list(command)
    return ["sh", "-c", '"$@" && sync "$0"/*', str(then_sync), *command]


def merge_command(folder: Path, dst: Path, adapters: int, device: str, *, fsync: bool) -> list[str]:
    names = [str(folder / f"adapter{index}") for index in range(adapters)]
    start = [sys.executable, "-c", MERGE, "fsync" if fsync else "bare", "merge", "-q", "--device", device]
    return [*start, str(folder / "base"), *names, str(dst)]


def file_to_file(table: Table, folder: Path, repeat: int, device: str, *, with_peft: bool) -> None:
    base, dst = folder / "base", folder / "merged"
    weights = sorted(base.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in weights)
    targets = CPU_TARGETS if device == "cpu" else GPU_TARGETS
    run(["cat", *map(str, weights)])
    run([sys.executable, "-c", MERGE, "bare", "--version"])  # compiles what is not yet compiled
    copy = ["cp", "-r", str(base), str(dst)]
    peft = [sys.executable, "-c", PEFT, str(base), str(folder / "adapter0"), str(dst), device]
    commands: dict[str, Sequence[str]] = {"import torch": [sys.executable, "-c", import_torch(device)]}
    for fsync in (False, True):
        label = " + fsync" if fsync else ""
        commands[f"cp{label}"] = shell(copy, dst if fsync else None)
        for adapters in (1, ADAPTERS):
            commands[f"merge {adapters}{label}"] = merge_command(folder, dst, adapters, device, fsync=fsync)
        if with_peft:
            commands[f"peft{label}"] = shell(peft, dst if fsync else None)
    if with_peft:
        commands["import peft"] = [sys.executable, "-c", IMPORT_PEFT]
    took = in_turns(repeat, dst, commands)
    bare = took["import torch"].seconds
    table.line(f"base, {len(weights)} shards", f"{size / 1e9:.2f} GB")
    table.line("import torch", f"{bare:.2f} s")
    for fsync in (False, True):
        label = " + fsync" if fsync else ""
        merge, four, cp = took[f"merge 1{label}"], took[f"merge {ADAPTERS}{label}"], took[f"cp{label}"]
        own = merge.seconds - bare
        table.line(f"cp -r{label}", f"{cp.seconds:.2f} s")
        table.line(f"merge{label}", f"{merge.seconds:.2f} s")
        table.line("  all but import torch", f"{own:.2f} s", own / cp.seconds, f"cp -r{label}", targets["copy"])
        table.line("  peak memory", f"{merge.peak_bytes / 1e6:.0f} MB")
        table.line(f"merge of {ADAPTERS}{label}", f"{four.seconds:.2f} s")
        table.line(
            "  all but import torch", f"{four.seconds - bare:.2f} s", (four.seconds - bare) / own, "one", FOUR_TARGET
        )
        if with_peft:
            theirs = took[f"peft{label}"]
            table.line(f"peft{label}", f"{theirs.seconds:.2f} s")
            table.line("  peak memory", f"{theirs.peak_bytes / 1e6:.0f} MB")
            at_least(table, "  against merge", theirs.seconds / merge.seconds, targets["peft"])
            without = (theirs.seconds - took["import peft"].seconds) / own
            at_least(table, "  both without their imports", without, None)


def at_least(table: Table, label: str, ratio: float, target: float | None) -> None:
    """One line for a ratio that is better the larger it is."""
    missed = target is not None and ratio < target
    text = f"{label:<30} {ratio:>7.2f} x" + (f"   wanted {target}" if target is not None else "")
    print(text + ("   MISSED" if missed else ""), flush=True)
    table.missed |= missed


def import_torch(device: str) -> str:
    """A bare import; on a GPU, with the start of CUDA that comes with it."""
    started = "import torch" if device == "cpu" else f"import torch; torch.zeros(1, device={device!r})"
    return started + AT_ONCE


def proven(folder: Path, device: str) -> None:
    """The merge that was measured is right, by `adaptertools verify`."""
    dst = folder / "merged"
    clear(dst)
    run(merge_command(folder, dst, ADAPTERS, device, fsync=False))
    names = [str(folder / f"adapter{index}") for index in range(ADAPTERS)]
    started = time.perf_counter()
    run([sys.executable, "-m", "adaptertools", "verify", "-q", str(folder / "base"), *names, str(dst)])
    print(f"{'verify: the merge is right':<30} {time.perf_counter() - started:>7.2f} s", flush=True)
    clear(dst)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--folder", help="where the models are made, and removed afterwards")
    options.add_argument("--size", type=float, default=2.2, help="of the base, in GB")
    options.add_argument("--rank", type=int, default=32)
    options.add_argument("--repeat", type=int, default=3)
    options.add_argument("--gpu", action="store_true", help="merge and PEFT on CUDA")
    options.add_argument("--skip-peft", action="store_true")
    given = options.parse_args()
    table = Table()
    device = "cuda" if given.gpu else "cpu"
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {platform.system()}")
    with scratch(given.folder) as folder:
        # in a process of its own: the kernel counts what this one once held to the peak of every child
        maker = multiprocessing.get_context("spawn").Process(target=make_inputs, args=(folder, given.size, given.rank))
        maker.start()
        maker.join()
        if maker.exitcode:
            sys.exit(maker.exitcode)
        file_to_file(table, folder, given.repeat, device, with_peft=not given.skip_peft)
        proven(folder, device)
    sys.exit(table.missed)


if __name__ == "__main__":
    main()
