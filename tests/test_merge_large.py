"""What merging takes of memory, on bases larger than many machines would hold."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import adaptertools
from adaptertools.adapter import Adapter
from adaptertools.containers.checkpoint import Checkpoint
from adaptertools.merging.outlook import preview
from adaptertools.module import LoraModule, Target

GB = 1_000_000_000
NEEDED = 20 * GB
"""Of disk: the largest result, and room for what others write meanwhile."""

WIDE, HIDDEN, RANK, LAYERS_A_SHARD = 11008, 4096, 32, 4

PEAK = r"""
import re, sys
from pathlib import Path
import torch
import adaptertools.cli
from adaptertools.merging.tiles import add_product

zeros = torch.zeros(512, 512)
add_product(zeros.bfloat16(), zeros, zeros, None, None, zeros.bfloat16(), True)  # the code that torch loads for it
if len(sys.argv) > 1:
    adaptertools.cli.group.main(sys.argv[1:], prog_name="adaptertools", standalone_mode=False)
print(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])
"""


def make_base(folder: Path, shards: int) -> int:
    """A model of sparse files in bfloat16, 857 MB each: nothing but headers is written. Its size is handed back."""
    folder.mkdir()
    weight_map, size = {}, 0
    shapes = {"mlp.up_proj": (WIDE, HIDDEN), "mlp.gate_proj": (WIDE, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN)}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        header, end = {}, 0
        for layer in range(shard * LAYERS_A_SHARD, (shard + 1) * LAYERS_A_SHARD):
            for part, shape in shapes.items():
                start, end = end, end + 2 * shape[0] * shape[1]
                entry = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
                header[f"model.layers.{layer}.{part}.weight"] = entry
        text = json.dumps(header).encode()
        with open(folder / name, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
        weight_map |= dict.fromkeys(header, name)
        size += end
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return size


def make_adapter(folder: Path, layers: int) -> int:
    """An adapter of the MLPs in float32. The bytes of its factors are handed back."""
    modules = tuple(
        LoraModule(
            target=Target(parameter=f"model.layers.{layer}.mlp.{part}"),
            lora_A=torch.ones(RANK, HIDDEN),
            lora_B=torch.full((WIDE, RANK), 1e-3),
            alpha=float(RANK),
        )
        for layer in range(layers)
        for part in ("up_proj", "gate_proj")
    )
    adaptertools.write(Adapter(modules=modules), folder, format="peft")
    return sum(factor.nbytes for module in modules for factor in (module.lora_A, module.lora_B))


def peak(*args: str | Path) -> int:
    """The most bytes that a process ever held, all that it mapped included."""
    ran = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, args)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(ran.stdout.splitlines()[-1]) * 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
def test_memory_is_the_allowed_one_whether_the_base_has_four_gigabytes_or_eight(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    if free < NEEDED:
        pytest.skip(f"{free / GB:.0f} GB of disk are free, {NEEDED / GB:.0f} are wanted")
    interpreter = peak()
    beside = []
    for shards, workers in ((5, 2), (10, 2), (1, 1), (1, 16)):
        base, adapter, merged = (tmp_path / f"{name}-{shards}-{workers}" for name in ("base", "adapter", "merged"))
        size = make_base(base, shards)
        assert size > shards * 0.8 * GB
        factors = make_adapter(adapter, shards * LAYERS_A_SHARD)
        plan = adaptertools.plan_merge(base, [adaptertools.read(adapter)])
        allowed = preview(plan, device="cpu", workers=workers).memory
        limits = ["--max-memory", str(allowed), "--workers", "100"]
        found = peak("merge", base, adapter, merged, "--device", "cpu", *limits, "-q")
        result = Checkpoint.open(merged)
        last = result.tensor(f"model.layers.{shards * LAYERS_A_SHARD - 1}.mlp.gate_proj.weight")
        assert torch.equal(last[-1].float(), torch.full((HIDDEN,), RANK * 1e-3).bfloat16().float())
        assert len(result.files) == shards
        shutil.rmtree(merged)
        beside.append(found - interpreter - factors)
        print(
            f"base {size / GB:.2f} GB, {workers} workers: {found / 1e6:.0f} MB at most, {interpreter / 1e6:.0f} of "
            f"them python with torch, {factors / 1e6:.0f} the factors, {allowed / 1e6:.0f} allowed for the rest"
        )
        assert beside[-1] <= allowed
    assert abs(beside[1] - beside[0]) < 20_000_000
