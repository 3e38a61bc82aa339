"""What every container has in common: identity against its own library, laziness, and errors instead of crashes."""

import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import container_cases as cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adaptertools import containers
from adaptertools.containers import CONTAINERS
from adaptertools.errors import (
    AdapterToolsError,
    EmptyFileError,
    LfsPointerError,
    NonFiniteError,
    OptionError,
    SourceNotFoundError,
    UnknownFormatError,
    UnsafeFileError,
    UnsupportedFeatureError,
)
from adaptertools.tensors import Deferred

FILES = ("safetensors", "torch", "npz", "msgpack")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("containers")


@pytest.mark.parametrize("container", FILES)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_reading_gives_back_what_was_written_bit_for_bit(container: str, folder: Path, data: st.DataObject) -> None:
    tensors = data.draw(cases.named_tensors())
    path = cases.write(container, folder, tensors)
    read = containers.read(path)
    assert read.container == container
    assert cases.same(read.tensors, tensors)


@pytest.mark.parametrize("container", FILES)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_the_containers_own_library_reads_what_is_written(container: str, folder: Path, data: st.DataObject) -> None:
    tensors = data.draw(cases.named_tensors())
    path = cases.write(container, folder, tensors)
    assert cases.same(cases.REAL_READERS[container](path), tensors)


@pytest.mark.parametrize("container", FILES)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_what_the_containers_own_library_wrote_is_read(container: str, folder: Path, data: st.DataObject) -> None:
    tensors = data.draw(cases.named_tensors(dtypes=(*cases.FLOATS, *cases.INTEGERS, torch.bool)))
    path = folder / f"real{CONTAINERS[container].SUFFIX}"
    cases.REAL_WRITERS[container](tensors, path)
    read = containers.read(path)
    assert read.container == container
    assert cases.same(read.tensors, tensors)


@pytest.mark.parametrize("container", ["safetensors", "torch", "msgpack"])
def test_float8_survives(container: str, tmp_path: Path) -> None:
    tensors = {str(dtype): cases.random_tensor((3, 5), dtype) for dtype in cases.FLOAT8}
    path = cases.write(container, tmp_path, tensors)
    assert cases.same(containers.read(path).tensors, tensors)
    assert cases.same(cases.REAL_READERS[container](path), tensors)


def test_npz_refuses_float8_which_numpy_cannot_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFeatureError, match="npz cannot store x"):
        cases.write("npz", tmp_path, {"x": torch.zeros(2).to(torch.float8_e5m2)})


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_dtype_without_a_place_is_refused_by_name(container: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFeatureError, match="complex64"):
        cases.write(container, tmp_path, {"x": torch.zeros(2, dtype=torch.complex64)})


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_tensor_that_is_not_contiguous_is_written_in_c_order(container: str, tmp_path: Path) -> None:
    tensor = torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1)
    path = cases.write(container, tmp_path, {"x": tensor})
    assert torch.equal(containers.read(path).tensors["x"], tensor)


@pytest.mark.parametrize("container", CONTAINERS)
def test_deferred_tensors_are_computed_one_at_a_time_and_progress_is_told(container: str, tmp_path: Path) -> None:
    alive, most, told = 0, 0, []

    class Watched(Tensor):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def compute() -> Tensor:
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return torch.ones(3, 2).as_subclass(Watched)

    deferred = Deferred(shape=(3, 2), dtype=torch.float32, compute=compute)
    path = tmp_path / "file"
    CONTAINERS[container].write(path, {f"t{n}": deferred for n in range(5)}, {}, told.append)
    assert most <= 2  # the one being written, and the next while the last one's name still holds it
    assert sum(told) == 5 * 24
    assert all(torch.equal(tensor, torch.ones(3, 2)) for tensor in containers.read(path).tensors.values())


@pytest.mark.parametrize("container", CONTAINERS)
def test_an_error_while_computing_comes_through_as_it_is(container: str, tmp_path: Path) -> None:
    def fail() -> Tensor:
        raise NonFiniteError("x: 1 NaN")

    bad = Deferred(shape=(4,), dtype=torch.float32, compute=fail)
    with pytest.raises(NonFiniteError, match="1 NaN"):
        cases.write(container, tmp_path, {"good": torch.ones(2), "x": bad})


@pytest.mark.parametrize("container", CONTAINERS)
def test_the_same_tensors_give_the_same_bytes(container: str, tmp_path: Path) -> None:
    def written(name: str) -> dict[str, bytes]:
        tensors = {f"layer/{n}": torch.full((n + 1, 2), float(n)) for n in range(12)}
        path = cases.write(container, tmp_path, tensors, name)
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        return {str(file.relative_to(path)): file.read_bytes() for file in files}

    assert written("one") == written("two")


@pytest.mark.parametrize("container", FILES)
def test_tensors_are_aligned_in_the_file_where_the_container_allows_it(container: str, tmp_path: Path) -> None:
    tensors = {f"n{n}": cases.random_tensor((n + 1,), dtype) for n, dtype in enumerate(cases.DTYPES)}
    read = containers.read(cases.write(container, tmp_path, tensors)).tensors
    if container != "msgpack":
        assert all(tensor.data_ptr() % tensor.dtype.itemsize == 0 for tensor in read.values())
    assert cases.same(read, tensors)


@pytest.mark.parametrize("container", FILES)
def test_changing_a_read_tensor_leaves_the_file_as_it_was(container: str, tmp_path: Path) -> None:
    path = cases.write(container, tmp_path, {"x": torch.ones(64)})
    before = path.read_bytes()
    containers.read(path).tensors["x"].zero_()
    assert path.read_bytes() == before


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", ["a\nb", "a\x00b", "a\x7f", "\x1b[31m"])
def test_names_with_control_characters_are_not_written(container: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(UnsafeFileError, match="control characters"):
        cases.write(container, tmp_path, {name: torch.ones(2)})


@pytest.mark.parametrize("container", ["msgpack", "orbax"])
@pytest.mark.parametrize("names", [("a", "a/b"), ("a/b", "a"), ("a//b",), ("/a",)])
def test_names_that_form_no_tree_are_refused(container: str, names: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFeatureError, match="no place in a tree"):
        cases.write(container, tmp_path, {name: torch.ones(2) for name in names})


@pytest.mark.parametrize("container", FILES)
def test_a_container_is_told_by_content_and_not_by_suffix(container: str, tmp_path: Path) -> None:
    path = cases.write(container, tmp_path, {"x": torch.ones(2)})
    found = containers.identify(path.rename(tmp_path / "renamed.txt"))
    assert found is not None
    assert container == found.NAME


@pytest.mark.parametrize(
    "head",
    [
        b"{}",
        b"# Readme\n",
        b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x01\x00",
        b"\x89HDF\r\n\x1a\n",
        b"\x1f\x8b\x08\x00",
        b"\xff\xd8\xff\xe0\x00\x10JFIF",
        b"\x7fELF\x02\x01\x01",
        b"%PDF-1.7",
        b"\xef\xbb\xbftext",
        b"\x85",
        b"\x81\x01\x02",
        b"\x81\x91\x80\x01",
        b"\x81\x81\x80\x01\x02",
    ],
)
def test_other_files_are_no_container(head: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(head)
    assert containers.identify(path) is None
    with pytest.raises(UnknownFormatError, match="not a tensor file"):
        containers.read(path)


def test_an_empty_file_a_missing_file_and_a_git_lfs_pointer_are_named(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    with pytest.raises(SourceNotFoundError, match="no such file"):
        containers.read(path)
    path.touch()
    with pytest.raises(EmptyFileError, match="empty"):
        containers.read(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(LfsPointerError, match="git lfs pull"):
        containers.read(path)


def test_an_unknown_container_is_refused_with_the_known_ones() -> None:
    with pytest.raises(OptionError, match="safetensors"):
        containers.get("hdf5")


SAMPLE = {
    "layers/0/lora_a": torch.arange(6.0).reshape(2, 3),
    "layers/0/lora_b": torch.ones(3, 2, dtype=torch.bfloat16),
    "b": torch.tensor(3, dtype=torch.int64),
}


def sample(kind: str, folder: Path) -> bytes:
    path = folder / "sample"
    if kind == "torch legacy":
        torch.save({"model": SAMPLE}, path, _use_new_zipfile_serialization=False)
    elif kind == "torch save":
        torch.save({"model": SAMPLE, "epoch": 3}, path)
    else:
        cases.CONTAINERS[kind].write(path, SAMPLE, {}, lambda _: None)
    return path.read_bytes()


@pytest.mark.parametrize("kind", [*FILES, "torch legacy", "torch save"])
@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_damaged_bytes_raise_nothing_but_our_errors(kind: str, folder: Path, data: st.DataObject) -> None:
    path = folder / "damaged"
    path.write_bytes(data.draw(cases.damage(sample(kind, folder))))
    with suppress(AdapterToolsError):
        for tensor in containers.read(path).tensors.values():  # what can be read can be used
            assert tensor.numel() * tensor.dtype.itemsize <= 64 << 20
            tensor.clone()


@pytest.mark.parametrize("kind", [*FILES, "torch legacy", "torch save"])
def test_a_file_cut_off_anywhere_is_an_error(kind: str, tmp_path: Path) -> None:
    content = sample(kind, tmp_path)
    path = tmp_path / "cut"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(AdapterToolsError):
            containers.read(path)


@pytest.mark.parametrize("kind", [*FILES, "torch legacy", "torch save"])
def test_a_file_with_bytes_after_its_end_is_an_error(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "long"
    path.write_bytes(sample(kind, tmp_path) + b"\0" * 8)
    with pytest.raises(AdapterToolsError):
        containers.read(path)


_MEMORY_PROBE = """
import sys, torch
from pathlib import Path
from adaptertools import containers

def anonymous_and_mapped():
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return [int(lines[key].split()[0]) // 1024 for key in ("RssAnon", "RssFile")]

path, one = Path(sys.argv[1]), sys.argv[2]
containers.read(Path(sys.argv[3]))  # whatever is imported late
before = anonymous_and_mapped()
file = containers.read(path)
opened = [now - then for now, then in zip(anonymous_and_mapped(), before)]
total = float(file.tensors[one].sum())
touched = [now - then for now, then in zip(anonymous_and_mapped(), before)]
print(file.nbytes >> 20, total, *opened, *touched)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("container", FILES)
def test_reading_one_module_of_a_gigabyte_touches_only_its_bytes(container: str, tmp_path: Path) -> None:
    zeros = Deferred(shape=(8, 1 << 20), dtype=torch.float32, compute=lambda: torch.zeros(8, 1 << 20))
    ones = Deferred(shape=(8, 1 << 18), dtype=torch.float32, compute=lambda: torch.ones(8, 1 << 18))
    names = {f"layers/{n}": zeros for n in range(31)} | {"layers/31": ones}
    big = cases.write(container, tmp_path, names, "big")
    small = cases.write(container, tmp_path, {"x": torch.ones(2)}, "small")
    ran = subprocess.run(
        [sys.executable, "-c", _MEMORY_PROBE, big, "layers/31", small], capture_output=True, text=True, check=True
    )
    size, total, anon_opened, mapped_opened, anon_touched, mapped_touched = map(float, ran.stdout.split())
    big.unlink()
    assert size == 1000
    assert total == 1 << 21
    assert anon_opened < 20
    assert mapped_opened < 20
    assert anon_touched < 30
    assert mapped_touched < 40  # 8 MiB of numbers, and what the kernel reads around them
