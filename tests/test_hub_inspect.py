"""Looking at what is on the Hub by its headers: how little is moved, and that no zero passes for a value."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from safetensors.torch import save_file

import adaptertools
from adaptertools import api
from adaptertools.adapter import Adapter
from adaptertools.containers import safetensors
from adaptertools.containers.source import Source
from adaptertools.errors import DamagedFileError, EmptyFileError, HubError, UnsafeFileError
from adaptertools.hub import client

WEIGHTS = "adapter_model.safetensors"
GIGABYTE = 1 << 30


@dataclass(frozen=True)
class Blank:
    """A tensor of which only the place in a file is wanted."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def put(hub: HubServer, name: str, files: Mapping[str, bytes | Mapping[str, Blank]]) -> str:
    """A repository with safetensors files of any size, which take no room on disk.

    They stand in the server's storage under a hash of their headers: to hash gigabytes takes longer than all tests.
    """
    hub.create_repo(name)
    blobs = {}
    for path, content in files.items():
        if isinstance(content, bytes):
            blobs[path] = hub.storage.keep(content, path)
            continue
        header, _ = safetensors.lay_out(path, content, {"format": "pt"})
        sha256 = hashlib.sha256(header).hexdigest()
        with (hub.storage.folder / sha256).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(tensor.nbytes for tensor in content.values()))
        blobs[path] = hub.storage.blob(sha256, large=True)
    sha = hub.repositories[name].add("refs/heads/main", blobs).sha
    hub.requests.clear()
    return sha


def width(hub: HubServer) -> int:
    """Of large weights; with Xet the server cuts every file into chunks, which takes long."""
    return 256 if hub.xet else 4096


def adapter_tensors(layers: int, rank: int, width: int) -> dict[str, Blank]:
    prefix = "base_model.model.model.layers"
    return {
        f"{prefix}.{layer}.self_attn.{name}.lora_{side}.weight": Blank((rank, width) if side == "A" else (width, rank))
        for layer in range(layers)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        for side in "AB"
    }


CONFIG = {
    "peft_type": "LORA",
    "r": 512,
    "lora_alpha": 1024,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "base_model_name_or_path": "org/base",
}


@pytest.fixture
def large(hub: HubServer) -> str:
    """`org/large`: an adapter of a gigabyte, beside the optimizer's state and a second copy of the weights."""
    weights = adapter_tensors(layers=32, rank=512, width=width(hub))
    assert hub.xet or sum(tensor.nbytes for tensor in weights.values()) >= GIGABYTE
    files = {WEIGHTS: weights, "adapter_config.json": json.dumps(CONFIG).encode()}
    return put(hub, "org/large", {**files, "optimizer.pt": b"\0" * 5000, "adapter_model.bin": b"\0" * 5000})


def test_inspecting_an_adapter_of_a_gigabyte_moves_less_than_a_tenth_of_a_megabyte(
    large: str, hub: HubServer, run: Callable[..., Any], tmp_path: Path
) -> None:
    ran = run("inspect", "org/large", "--json")
    assert ran.code == 0, ran.err
    assert hub.sent() < 100_000
    found = ran.json
    assert (found["modules"], found["ranks"], found["alphas"]) == (128, {"512": 128}, {"1024": 128})
    assert found["nbytes"] == 128 * 2 * 512 * width(hub) * 2
    assert found["values_checked"] is False
    assert found["source"] == f"hf://org/large@{large[:12]}"
    assert hub.logged("optimizer|adapter_model.bin") == []
    blobs = [path.stat().st_size for path in (tmp_path / "hub-cache").rglob("*") if path.is_file()]
    assert sum(blobs) < 100_000


def test_the_text_says_that_values_were_not_checked(large: str, run: Callable[..., Any]) -> None:
    assert (
        "values       not checked: the headers alone were fetched. --modules looks at them"
        in run("inspect", "org/large").out
    )


@pytest.mark.parametrize("shards", [1, 12])
def test_estimating_from_a_model_of_many_gigabytes_moves_a_few_hundred_kilobytes(
    shards: int, hub: HubServer, run: Callable[..., Any]
) -> None:
    files: dict[str, Any] = {"config.json": b'{"model_type": "llama"}', "tokenizer.json": b" " * 3_000_000}
    weight_map, size = {}, width(hub)
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        tensors = {
            f"model.layers.{layer}.{part}.weight": Blank((2 * size, 2 * size))
            for layer in range(4 * shard, 4 * shard + 4)
            for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
        }
        files[name] = tensors
        weight_map |= dict.fromkeys(tensors, name)
    if shards > 1:
        files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    put(hub, "org/big", files)
    ran = run("estimate", "org/big", "--rank", "16", "--json")
    assert ran.code == 0, ran.err
    assert hub.sent() < 300_000
    assert hub.logged("tokenizer") == []
    assert ran.json["base"]["parameters"] == shards * 16 * (2 * size) ** 2
    assert ran.json["total"]["ranks"][0]["parameters"] == shards * 16 * 16 * 4 * size


def test_a_local_base_and_the_same_base_on_the_hub_give_one_estimate(hub: HubServer, run: Callable[..., Any]) -> None:
    folder = Path(__file__).parents[1] / "fixtures" / "base" / "llama_tiny"
    hub.create_repo("org/base", {path.name: path for path in folder.iterdir()})
    here, there = (run("estimate", src, "--rank", "4,8", "--json").json for src in (folder, "org/base"))
    assert here.pop("base")["parameters"] == there.pop("base")["parameters"]
    assert here == there


def test_modules_fetches_the_values_and_looks_at_them(
    hub: HubServer, plain: Adapter, tmp_path: Path, run: Callable[..., Any]
) -> None:
    tensors, config = adaptertools.read(adaptertools.write(plain, tmp_path / "x", format="peft").path).to_state_dict(
        "peft"
    )
    next(iter(tensors.values()))[0, 0] = math.nan
    save_file(tensors, tmp_path / WEIGHTS)
    hub.create_repo("org/odd", {WEIGHTS: tmp_path / WEIGHTS, "adapter_config.json": json.dumps(config).encode()})
    unseen, seen = (run("inspect", "org/odd", *args, "--json").json for args in ((), ("--modules",)))
    assert (unseen["values_checked"], seen["values_checked"]) == (False, True)
    assert unseen["oddities"] == []
    assert any("NaN" in oddity for oddity in seen["oddities"])
    assert len(seen["rows"]) == len(plain.modules)


def test_what_is_in_the_cache_is_looked_at_whole(
    hub: HubServer, plain: Adapter, tmp_path: Path, run: Callable[..., Any]
) -> None:
    folder = adaptertools.write(plain, tmp_path / "x", format="peft").path
    hub.create_repo("org/lora", {path.name: path for path in folder.iterdir()})
    assert run("pull", "org/lora", "-q").code == 0
    hub.requests.clear()
    assert run("inspect", "org/lora", "--json").json["values_checked"] is True
    assert hub.logged("resolve|storage") == []


def test_using_a_value_that_was_not_fetched_is_an_error(large: str) -> None:
    source = Source(api.localize("org/large", headers=True))
    for tensor in source.tensors(WEIGHTS).tensors.values():
        assert tensor.is_meta
    adapter = adaptertools.from_state_dict(source.tensors(WEIGHTS).tensors, CONFIG, format="peft")
    with pytest.raises(RuntimeError, match="meta"):
        adapter.modules[0].lora_B[0, 0].item()
    with pytest.raises(RuntimeError, match="meta"):
        adapter.modules[0].lora_A.tolist()


def test_tensors_of_a_few_bytes_are_fetched_with_their_values(hub: HubServer, tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(40):
        tensors[f"unet_{layer:02d}.alpha"] = torch.tensor(float(layer) + 0.5)
        tensors[f"unet_{layer:02d}.lora_down.weight"] = torch.ones(64, 640)
        tensors[f"unet_{layer:02d}.lora_up.weight"] = torch.ones(640, 64)
    tensors["steps"] = torch.tensor([1, 2, 3])
    save_file(tensors, tmp_path / "lora.safetensors")
    hub.create_repo("org/kohya", {"lora.safetensors": tmp_path / "lora.safetensors"})
    found = Source(api.localize("org/kohya", headers=True)).tensors("lora.safetensors").tensors
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        if tensor.numel() <= 3:
            assert torch.equal(found[name], tensor)
        else:
            assert found[name].is_meta
            assert found[name].shape == tensor.shape
    assert hub.sent() < 100_000


def test_a_header_longer_than_the_first_request_is_fetched_to_its_end(hub: HubServer, run: Callable[..., Any]) -> None:
    weights = adapter_tensors(layers=200, rank=4, width=16)
    start = len(safetensors.lay_out(WEIGHTS, weights, {"format": "pt"})[0])
    assert start > 100_000
    put(hub, "org/long", {WEIGHTS: weights, "adapter_config.json": json.dumps(CONFIG).encode()})
    assert run("inspect", "org/long", "--json").json["modules"] == 800
    assert hub.sent("storage") == start


@pytest.mark.parametrize(
    ("start", "error"),
    [
        ((100 << 30).to_bytes(8, "little") + b"{}", DamagedFileError),
        ((30 << 20).to_bytes(8, "little") + b"{}", UnsafeFileError),
        ((40).to_bytes(8, "little") + b'{"a": {"dtype": "F32", "shape": [1],    ', DamagedFileError),
        ((2).to_bytes(8, "little") + b"{}", EmptyFileError),
    ],
    ids=["100 GB of header in a small file", "30 MB of header", "no JSON", "no tensor for the data"],
)
def test_a_hostile_header_is_refused_before_much_is_moved(
    start: bytes, error: type[Exception], hub: HubServer, tmp_path: Path
) -> None:
    weights = tmp_path / WEIGHTS
    with weights.open("wb") as file:
        file.write(start)
        file.truncate(40 << 20)
    hub.create_repo("org/bad", {WEIGHTS: weights, "adapter_config.json": json.dumps(CONFIG).encode()})
    with pytest.raises(error):
        adaptertools.estimate("hf://org/bad/" + WEIGHTS, ranks=4)
    with pytest.raises(error, match=r"^hf://org/bad@"):
        Source(api.localize("org/bad", headers=True)).tensors(WEIGHTS)
    assert hub.sent() < 100_000


@pytest.mark.parametrize("fault", [{"status": 503}, {"cut": 100}, {"status": 429, "headers": {"Retry-After": "0"}}])
def test_a_passing_fault_is_ridden_out(
    fault: dict[str, Any], large: str, hub: HubServer, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT", 0.01)
    hub.faults.add("GET", "storage", times=2, **fault)
    assert run("inspect", "org/large", "-q").code == 0
    assert [each.times for each in hub.faults.pending] in ([], [0])


def test_a_lasting_fault_is_one_line_and_exit_code_3(
    large: str, hub: HubServer, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(client, "PATIENCE", 0.05)
    hub.faults.add("GET", "storage", status=503, times=1000)
    ran = run("inspect", "org/large")
    assert ran.code == 3
    assert ran.err.count("\n") == 1


def test_a_gated_repository_is_not_looked_into(hub: HubServer, run: Callable[..., Any]) -> None:
    put(hub, "org/gated", {WEIGHTS: adapter_tensors(1, 4, 16), "adapter_config.json": json.dumps(CONFIG).encode()})
    hub.repositories["org/gated"].gated = True
    with pytest.raises(HubError, match="gated"):
        api.localize("org/gated", headers=True)
    assert run("inspect", "org/gated").code == 1


def test_the_sparse_files_are_removed_with_what_was_read_from_them(
    large: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    place = api.localize("org/large", headers=True)
    source = Source(place)
    assert source.tensors(WEIGHTS).tensors
    assert len(list((tmp_path / "temporary").iterdir())) == 1
    del place, source
    assert list((tmp_path / "temporary").iterdir()) == []


def test_other_containers_are_fetched_whole_and_looked_at(
    hub: HubServer, plain: Adapter, tmp_path: Path, run: Callable[..., Any]
) -> None:
    folder = adaptertools.write(plain, tmp_path / "x", format="flax", container="npz").path
    hub.create_repo("org/flax", {path.name: path for path in folder.iterdir()})
    assert run("inspect", "org/flax", "--json").json["values_checked"] is True
