"""The engine of a merge: the bytes of its result, whatever the base is stored as and however it is run."""

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_plans import COLUMNS, ROWS, assert_rounded_once, contents, dense, edit, make_base, make_plan, update
from safetensors import safe_open
from safetensors.torch import load_file

from adaptertools.containers.checkpoint import Checkpoint
from adaptertools.errors import DamagedFileError, NonFiniteError, OptionError
from adaptertools.merging import blocks, shards
from adaptertools.merging.edits import Edit, Renormalization
from adaptertools.merging.outlook import preview
from adaptertools.merging.plan import MergePlan, OutputShard
from adaptertools.merging.run import run_merge

WEIGHTS = "model.safetensors.index.json"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of several blocks, copies of several chunks."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", {"cpu": 5 * COLUMNS * 2 + 1})
    monkeypatch.setattr(shards, "CHUNK_BYTES", 100)


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_result(folder: Path, plan: MergePlan, made: Mapping[str, torch.Tensor] | None = None) -> None:
    """Every tensor is the base's own, bit for bit, or the dense sum in float64 rounded once.

    `made` are those that do not begin with the base's own values.
    """
    found = weights_in(folder)
    assert set(found) == {name for shard in plan.shards for name in shard.tensors}
    for name, tensor in found.items():
        each = plan.edits.get(name)
        if each is None:
            assert tensor.dtype == plan.base.dtypes[name]
            assert torch.equal(tensor, plan.base.tensor(name))
        else:
            before = (made or {}).get(name, plan.base.mapped.get(each.source or ""))
            assert before is not None
            assert_rounded_once(tensor, dense(before.clone(), each), each.dtype)


@pytest.mark.usefixtures("small_blocks")
def test_every_tensor_is_the_dense_sum_rounded_once(base: Path, tmp_path: Path) -> None:
    plan = make_plan(base)
    report = run_merge(plan, tmp_path / "merged", device="cpu")
    assert_result(tmp_path / "merged", plan)
    assert report.path == tmp_path / "merged"
    assert report.nbytes == sum(path.stat().st_size for path in base.glob("*.safetensors"))
    assert set(report.tensors) == set(plan.edits)


def test_bytes_differ_from_the_base_only_within_planned_tensors(base: Path, tmp_path: Path) -> None:
    plan = make_plan(base)
    run_merge(plan, tmp_path / "merged", device="cpu")
    for path in base.glob("*.safetensors"):
        old, new = path.read_bytes(), (tmp_path / "merged" / path.name).read_bytes()
        assert len(old) == len(new)
        planned = {
            place
            for name in plan.edits
            if (span := plan.base.places[name]) is not None and span.path == path
            for place in range(span.offset, span.offset + span.nbytes)
        }
        assert planned
        assert {place for place, (a, b) in enumerate(zip(old, new, strict=True)) if a != b} <= planned
    for name in ("config.json", "tokenizer.json", WEIGHTS):
        assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes()


@pytest.mark.usefixtures("small_blocks")
def test_neither_workers_nor_memory_nor_flushing_change_a_byte(base: Path, tmp_path: Path) -> None:
    plan = make_plan(base)
    options: list[dict[str, Any]] = [
        {"workers": 1},
        {"workers": 7},
        {"max_memory": 54 << 20, "workers": 7},
        {"flush": False},
        {},
    ]
    for place, option in enumerate(options):
        run_merge(plan, tmp_path / str(place), device="cpu", **option)
    results = [contents(tmp_path / str(place)) for place in range(len(options))]
    assert results[0]
    assert all(result == results[0] for result in results)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system has no posix_fadvise")
@pytest.mark.parametrize("flush", [True, False])
@pytest.mark.usefixtures("small_blocks")
def test_every_byte_is_on_its_way_to_disk_as_soon_as_it_is_written(
    flush: bool, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[tuple[int, int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda handle, *span: begun.append((os.fstat(handle).st_ino, *span[:2])))
    run_merge(make_plan(base), tmp_path / "merged", device="cpu", flush=flush)
    files = {(path.stat().st_ino, path.stat().st_size) for path in (tmp_path / "merged").glob("*.safetensors")}
    for inode, size in files:
        spans = sorted(span for each, *span in begun if each == inode)
        ends = [0, *(offset + nbytes for offset, nbytes in spans)]
        assert [offset for offset, _ in spans] == (ends[:-1] if flush else [])
        assert ends[-1] == (size if flush else 0)


def test_a_second_merge_elsewhere_and_later_is_the_same_to_the_byte(base: Path, tmp_path: Path) -> None:
    run_merge(make_plan(base), tmp_path / "one", device="cpu")
    for path in base.iterdir():
        os.utime(path, (1, 1))
    run_merge(make_plan(base), tmp_path / "far" / "away", device="cpu")
    assert contents(tmp_path / "one") == contents(tmp_path / "far" / "away")


def test_the_statistics_are_those_of_the_files(base: Path, tmp_path: Path) -> None:
    plan = make_plan(base)
    report = run_merge(plan, tmp_path / "merged", device="cpu")
    record = json.loads((tmp_path / "merged" / "adaptertools_merge.json").read_text())
    merged = weights_in(tmp_path / "merged")
    for name, made in plan.edits.items():
        old, new = plan.base.tensor(name).double(), merged[name].double()
        delta = sum(each.scale * each.left.double() @ each.right.double() for each in made.updates)
        assert report.tensors[name].relative_delta == pytest.approx(float(delta.norm() / old.norm()), rel=1e-5)
        lost = float((new - old - delta).norm() / delta.norm())
        assert report.tensors[name].relative_error == pytest.approx(lost, rel=1e-3)
        assert record["tensors"][name]["rounding_error"] == report.tensors[name].relative_error
        assert record["tensors"][name]["unchanged"] == float((new == old).double().mean())
    assert record["total"]["elements"] == ROWS * COLUMNS * len(plan.edits)
    took = f"rounding took {report.total.relative_error:.4g} of the delta"
    assert repr(report) == f"<MergeReport of {report.path}: {len(plan.edits)} tensors changed on cpu, {took}>"


def test_the_record_names_the_inputs_and_the_files(base: Path, tmp_path: Path) -> None:
    plan = replace(make_plan(base), notes=("a note",), left_out=("a module",))
    run_merge(plan, tmp_path / "merged", device="cpu", hash=True)
    record = json.loads((tmp_path / "merged" / "adaptertools_merge.json").read_text())
    assert set(record["files"]) == {path.name for path in (tmp_path / "merged").iterdir()}
    assert [entry["name"] for entry in record["base"]["files"]] == [path.name for path in plan.base.files]
    for entry in record["base"]["files"]:
        assert entry["sha256"] == hashlib.sha256((base / entry["name"]).read_bytes()).hexdigest()
    assert record["adapters"][0]["name"] == "adapter"
    assert record["notes"] == ["a note"]
    assert record["left_out"] == ["a module"]
    assert "time" not in json.dumps(record)


def test_a_hash_that_the_hubs_cache_knows_comes_for_free(base: Path, tmp_path: Path) -> None:
    commit, sha = "c" * 40, "a" * 64
    snapshot = tmp_path / "models--org--name" / "snapshots" / commit
    blobs = tmp_path / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.parent.mkdir()
    base.rename(snapshot)
    first = snapshot / "model-00001-of-00003.safetensors"
    first.rename(blobs / sha)
    first.symlink_to(Path("..") / ".." / "blobs" / sha)
    run_merge(make_plan(snapshot), tmp_path / "merged", device="cpu")
    record = json.loads((tmp_path / "merged" / "adaptertools_merge.json").read_text())
    assert record["base"]["commit"] == commit
    assert [entry.get("sha256") for entry in record["base"]["files"]] == [sha, None, None]
    assert not (tmp_path / "merged" / first.name).is_symlink()


def test_progress_counts_every_byte(base: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = run_merge(make_plan(base), tmp_path / "merged", device="cpu", on_progress=lambda *at: seen.append(at))
    assert seen[-1] == (report.nbytes, report.nbytes)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_the_preview_says_what_is_read_and_written(base: Path) -> None:
    plan = make_plan(base)
    outlook = preview(plan, device="cpu", workers=3)
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    tensors = sum(tensor.nbytes for tensor in weights_in(base).values())
    assert (outlook.bytes_read, outlook.bytes_written) == (tensors, size)
    assert (outlook.tensors, outlook.changed, outlook.replaced, outlook.files) == (12, 6, 0, 3)
    assert (outlook.workers, outlook.device) == (3, "cpu")
    for memory, workers in ((outlook.memory, 3), (outlook.memory - 1, 2)):
        assert preview(plan, device="cpu", max_memory=memory, workers=3).workers == workers


@pytest.mark.parametrize("options", [{"max_memory": 1000}, {"workers": 0}, {"device": "toaster"}])
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], base: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError):
        run_merge(make_plan(base), tmp_path / "merged", **{"device": "cpu", **options})
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


def new_header(plan: MergePlan, name: str, edits: dict[str, Edit], *more: str, **changes: Any) -> MergePlan:
    """The plan with all in one file that has a header of its own."""
    tensors = (*(tensor for shard in plan.shards for tensor in shard.tensors), *more)
    made = OutputShard(name=name, tensors=tuple(dict.fromkeys(tensors)), patches=False)
    return replace(plan, shards=(made,), edits={**plan.edits, **edits}, **changes)


@pytest.mark.usefixtures("small_blocks")
def test_tensors_are_added_resized_and_cast_in_a_new_header(base: Path, tmp_path: Path) -> None:
    (base / "config.json").write_text('{"model_type": "tiny", "vocab_size": 7, "id2label": {"0": "X", "1": "Y"}}')
    plan = make_plan(base)
    name = "model.layers.0.mlp.weight"
    resized = torch.randn(ROWS + 5, COLUMNS)
    rows = torch.randn(2, COLUMNS)
    grown = Edit(
        name=name,
        source=None,
        shape=(ROWS + 5, COLUMNS),
        matrix=(ROWS + 5, COLUMNS),
        dtype=torch.bfloat16,
        replacement=resized,
        rows=(((3, ROWS + 4), rows), ((3,), rows[1:])),
        updates=(update(ROWS + 5, COLUMNS, seed=7),),
    )
    head = torch.randn(4, COLUMNS)
    added = Edit(
        name="head.weight", source=None, shape=(4, COLUMNS), matrix=(4, COLUMNS), dtype=torch.float32, replacement=head
    )
    norm = "model.layers.1.norm.weight"
    cast = Edit(name=norm, source=norm, shape=(COLUMNS + 1,), matrix=(COLUMNS + 1, 1), dtype=torch.float16)
    plan = new_header(
        plan, "model.safetensors", {name: grown, "head.weight": added, norm: cast}, "head.weight",
        config={"vocab_size": ROWS + 5, "id2label": {"0": "A"}},
    )  # fmt: skip
    report = run_merge(plan, tmp_path / "merged", device="cpu")
    resized[3], resized[ROWS + 4] = rows[1], rows[1]
    assert_result(tmp_path / "merged", plan, {name: resized, "head.weight": head})
    found = weights_in(tmp_path / "merged")
    assert torch.equal(found["head.weight"], head)
    assert torch.equal(found[norm], plan.base.tensor(norm).half())
    assert set(report.replaced) == {"head.weight", norm}
    record = json.loads((tmp_path / "merged" / "adaptertools_merge.json").read_text())
    assert set(record["whole_weights_sha256"]) == {"head.weight", name}
    assert not list((tmp_path / "merged").glob("*.index.json"))
    assert json.loads((tmp_path / "merged" / "config.json").read_text()) == {
        "model_type": "tiny", "vocab_size": ROWS + 5, "id2label": {"0": "A"},
    }  # fmt: skip
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_trained_rows_are_rounded_once_even_where_a_delta_is_added(base: Path, tmp_path: Path) -> None:
    opened = Checkpoint.open(base)
    name = "model.layers.0.mlp.weight"
    trained = torch.randn(1, COLUMNS, generator=torch.Generator().manual_seed(3))
    made = replace(edit(opened, name, update(ROWS, COLUMNS, seed=1)), rows=(((5,), trained),))
    run_merge(make_plan(base, edits={name: made}), tmp_path / "merged", device="cpu")
    start = opened.tensor(name).double()
    start[5] = trained[0].double()
    assert_rounded_once(weights_in(tmp_path / "merged")[name], dense(start, made), made.dtype)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("axis", ["row", "column"])
def test_dora_over_blocks_is_that_of_the_whole_matrix(axis: Any, base: Path, tmp_path: Path) -> None:
    opened = Checkpoint.open(base)
    name = "model.layers.0.mlp.weight"
    change = update(ROWS, COLUMNS, seed=1)
    magnitude = torch.rand(ROWS if axis == "row" else COLUMNS) + 1
    made = replace(
        edit(opened, name),
        renormalizations=(Renormalization(update=change, weight=0.5, magnitude=magnitude, axis=axis),),
    )
    run_merge(make_plan(base, edits={name: made}), tmp_path / "merged", device="cpu")
    old = opened.tensor(name).double()
    value = old + change.scale * change.left.double() @ change.right.double()
    across = 1 if axis == "row" else 0
    gain = magnitude.double().unsqueeze(across) / value.norm(dim=across, keepdim=True)
    wanted = (old + 0.5 * (gain * value - old)).bfloat16()
    found = weights_in(tmp_path / "merged")[name]
    assert (found == wanted).double().mean() > 0.99
    assert torch.allclose(found.float(), wanted.float(), rtol=2**-7)


def save_torch_base(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A model in two torch files with their index."""
    folder.mkdir()
    names = list(tensors)
    half = len(names) // 2
    files = {"pytorch_model-00001-of-00002.bin": names[:half], "pytorch_model-00002-of-00002.bin": names[half:]}
    for name, held in files.items():
        torch.save({key: tensors[key] for key in held}, folder / name)
    weight_map = {key: name for name, held in files.items() for key in held}
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    )
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.usefixtures("small_blocks")
def test_a_torch_base_becomes_safetensors_with_an_index(base: Path, tmp_path: Path) -> None:
    tensors = weights_in(base)
    tensors["transposed.weight"] = torch.randn(4, 6).T
    opened = Checkpoint.open(save_torch_base(tmp_path / "bin", tensors))
    plan = make_plan(base)
    names = [tuple(opened.tensors_of[path.name]) for path in opened.files]
    made = tuple(
        OutputShard(name=f"model-{place:05d}-of-00002.safetensors", tensors=held, patches=False)
        for place, held in enumerate(names, 1)
    )
    plan = replace(plan, base=opened, shards=made, copied=("config.json",))
    run_merge(plan, tmp_path / "merged", device="cpu")
    assert_result(tmp_path / "merged", plan)
    index = json.loads((tmp_path / "merged" / WEIGHTS).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"] == {name: shard.name for shard in made for name in shard.tensors}
    again = Checkpoint.open(tmp_path / "merged")
    assert set(again.shapes) == set(tensors)
    assert not list((tmp_path / "merged").glob("*.bin*"))


def test_a_wrong_total_size_in_the_index_is_set_right(base: Path, tmp_path: Path) -> None:
    index = json.loads((base / WEIGHTS).read_text())
    right = index["metadata"]["total_size"]
    (base / WEIGHTS).write_text(json.dumps({**index, "metadata": {"total_size": 5, "made_by": "x"}}))
    run_merge(make_plan(base), tmp_path / "merged", device="cpu")
    written = json.loads((tmp_path / "merged" / WEIGHTS).read_text())
    assert written["metadata"] == {"total_size": right, "made_by": "x"}
    assert written["weight_map"] == index["weight_map"]


@pytest.mark.parametrize(
    ("scale", "dtype"), [(float("nan"), torch.bfloat16), (1e30, torch.float16)], ids=["nan", "overflow"]
)
def test_a_result_that_is_not_finite_is_refused_and_nothing_is_left(
    scale: float, dtype: torch.dtype, base: Path, tmp_path: Path
) -> None:
    opened = Checkpoint.open(base)
    name = "model.layers.0.mlp.weight"
    plan = make_plan(base, edits={name: edit(opened, name, update(ROWS, COLUMNS, seed=0, scale=scale), dtype=dtype)})
    shard = OutputShard(name="model.safetensors", tensors=tuple(opened.shapes), patches=False)
    with pytest.raises(NonFiniteError, match=r"model\.layers\.0\.mlp|target 0"):
        run_merge(replace(plan, shards=(shard,)), tmp_path / "merged", device="cpu")
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


def test_what_was_finished_is_not_kept_where_the_same_call_would_fail_again(base: Path, tmp_path: Path) -> None:
    plan = make_plan(base)
    name = "model.layers.5.mlp.weight"
    bad = edit(plan.base, name, update(ROWS, COLUMNS, seed=0, scale=float("inf")))
    with pytest.raises(NonFiniteError):
        run_merge(replace(plan, edits={**plan.edits, name: bad}), tmp_path / "merged", device="cpu", workers=1)
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


def test_a_cast_that_overflows_is_refused(base: Path, tmp_path: Path) -> None:
    opened = Checkpoint.open(base)
    big = torch.full((2, 2), 1e30)
    made = Edit(name="head", source=None, shape=(2, 2), matrix=(2, 2), dtype=torch.float16, replacement=big)
    shard = OutputShard(name="model.safetensors", tensors=(*opened.shapes, "head"), patches=False)
    with pytest.raises(NonFiniteError, match=r"head.*f16"):
        run_merge(replace(make_plan(base, edits={"head": made}), shards=(shard,)), tmp_path / "merged", device="cpu")


def test_a_base_that_changed_since_the_plan_is_refused(base: Path, tmp_path: Path) -> None:
    plan = make_plan(base)
    (base / WEIGHTS).unlink()
    for path in base.glob("*.safetensors"):
        path.unlink()
    other = make_base(tmp_path / "other", rows=ROWS + 1)
    for path in other.iterdir():
        path.rename(base / path.name)
    with pytest.raises(DamagedFileError, match="changed since"):
        run_merge(plan, tmp_path / "merged", device="cpu")


def test_a_base_that_changes_during_the_merge_is_refused(base: Path, tmp_path: Path) -> None:
    def touch(done: int, total: int) -> None:
        os.utime(base / "model-00001-of-00003.safetensors", (done, total))

    with pytest.raises(DamagedFileError, match="changed while"):
        run_merge(make_plan(base), tmp_path / "merged", device="cpu", on_progress=touch)
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


def test_four_adapters_are_rounded_once(base: Path, tmp_path: Path) -> None:
    opened = Checkpoint.open(base)
    name = "model.layers.0.mlp.weight"
    many = edit(opened, name, *(update(ROWS, COLUMNS, seed=seed, source=seed, scale=1e-3) for seed in range(4)))
    plan = make_plan(base, edits={name: many}, sources=("a", "b", "c", "d"))
    run_merge(plan, tmp_path / "merged", device="cpu")
    assert_result(tmp_path / "merged", plan)


def test_the_files_of_the_result_honour_the_umask(base: Path, tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        run_merge(make_plan(base), tmp_path / "merged", device="cpu")
    finally:
        os.umask(previous)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "merged").iterdir()}
    assert modes == {0o640}


def test_bytes_are_copied_where_the_system_cannot_do_it_itself(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EXDEV, "another file system")

    run_merge(make_plan(base), tmp_path / "one", device="cpu")
    monkeypatch.setattr(os, "copy_file_range", refuse)
    run_merge(make_plan(base), tmp_path / "two", device="cpu")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_cpus_result_up_to_summation_order(base: Path, tmp_path: Path) -> None:
    plan = make_plan(base)
    run_merge(plan, tmp_path / "cpu", device="cpu")
    report = run_merge(plan, tmp_path / "gpu", device="cuda")
    assert report.device == torch.cuda.get_device_name()
    one, other = weights_in(tmp_path / "cpu"), weights_in(tmp_path / "gpu")
    for name, tensor in one.items():
        if name not in plan.edits:
            assert torch.equal(tensor, other[name])
        assert (tensor == other[name]).double().mean() > 0.999
        assert torch.allclose(tensor.float(), other[name].float(), rtol=2**-7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("workers", [1, 4])
def test_workers_change_no_byte_on_a_gpu(
    workers: int, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", {"cpu": 1000, "cuda": 5 * COLUMNS * 2})
    plan = make_plan(base)
    run_merge(plan, tmp_path / "one", device="cuda", workers=2)
    run_merge(plan, tmp_path / "other", device="cuda", workers=workers)
    assert contents(tmp_path / "one") == contents(tmp_path / "other")


def test_a_merge_leaves_torch_its_threads(base: Path, tmp_path: Path) -> None:
    """A thread that begins later would take over what workers set for themselves."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        run_merge(make_plan(base), tmp_path / "merged", device="cpu")
        assert _threads_of_a_new_one() == torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def _threads_of_a_new_one() -> int:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"plan": "base"}, "plan is str, expected what plan_merge gives"),
        ({"dst": None}, "found NoneType, expected a path"),
        ({"dst": ""}, "an empty path is given"),
        ({"overwrite": "no"}, "overwrite is 'no', expected True or False"),
        ({"hash": 1}, "hash is 1, expected True or False"),
        ({"max_memory": "2GiB"}, "'2GiB', expected a number"),
        ({"max_memory": True}, "True, expected a number"),
        ({"workers": "2"}, "workers is '2', expected a number"),
        ({"workers": True}, "workers is True, expected a number"),
        ({"device": None}, "^device None: expected auto"),
    ],
)
def test_what_is_of_another_type_is_an_error_of_ours(change: Any, said: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=said):
        run_merge(**{"plan": make_plan(base), "dst": tmp_path / "merged", "device": "cpu", **change})
