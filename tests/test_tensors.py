"""Tensors by name: dtype names, finiteness, bytes, order."""

import math
from concurrent.futures import ThreadPoolExecutor

import container_cases as cases
import pytest
import torch

from adaptertools.errors import NonFiniteError, OptionError
from adaptertools.tensors import (
    DTYPES,
    Deferred,
    all_finite,
    check_finite,
    combine,
    dtype_name,
    in_parallel,
    materialize,
    natural_order,
    parse_dtype,
    tensor_bytes,
)


def test_dtype_names_are_the_inverse_of_parsing() -> None:
    assert all(dtype_name(parse_dtype(name)) == name for name in DTYPES)
    assert dtype_name(torch.int64) == "int64"
    with pytest.raises(OptionError, match="unknown dtype 'f8': expected one of f64, f32, f16, bf16"):
        parse_dtype("f8")


@pytest.mark.parametrize("dtype", [*cases.FLOATS, torch.float8_e5m2])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_one_value_that_is_not_finite_is_found_anywhere(dtype: torch.dtype, bad: float, size: int) -> None:
    tensor = torch.ones(size, dtype=torch.float32)
    assert all_finite(tensor.to(dtype))
    for position in {0, size // 2, size - 1}:
        tensor[position] = bad
        assert not all_finite(tensor.to(dtype))
        tensor[position] = 1.0


def test_whole_numbers_and_empty_tensors_are_finite() -> None:
    assert all_finite(torch.arange(3))
    assert all_finite(torch.ones(2, dtype=torch.bool))
    assert all_finite(torch.empty(0))
    assert all_finite(torch.tensor(torch.finfo(torch.float32).max))


def test_the_error_counts_the_bad_values() -> None:
    with pytest.raises(NonFiniteError, match=r"q_proj: 1 NaN and 2 infinite of 4 values\..*--allow-nonfinite"):
        check_finite("q_proj", torch.tensor([math.nan, math.inf, -math.inf, 0.0]))
    check_finite("q_proj", torch.zeros(2))


@pytest.mark.parametrize("dtype", [*cases.DTYPES, *cases.FLOAT8])
def test_the_bytes_of_a_tensor_stand_in_c_order(dtype: torch.dtype) -> None:
    tensor = cases.random_tensor((3, 4), dtype)
    raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    assert bytes(tensor_bytes(tensor)) == raw
    assert bytes(tensor_bytes(tensor.t().contiguous().t())) == raw
    assert bytes(tensor_bytes(tensor.reshape(-1)[0])) == raw[: dtype.itemsize]
    assert bytes(tensor_bytes(tensor[:0])) == b""


def test_the_bytes_of_a_contiguous_tensor_are_not_copied() -> None:
    tensor = torch.zeros(4, requires_grad=True)
    view = tensor_bytes(tensor)
    with torch.no_grad():
        tensor.fill_(1.0)
    assert bytes(view) == bytes(tensor_bytes(torch.ones(4)))


def test_numbers_within_names_sort_as_numbers() -> None:
    names = ["layers.10.a", "layers.2.b", "layers.2.a", "embed", "layers"]
    assert sorted(names, key=natural_order) == ["embed", "layers", "layers.2.a", "layers.2.b", "layers.10.a"]


def test_combining_tensors_takes_the_widest_dtype_and_waits() -> None:
    called = []

    def compute() -> torch.Tensor:
        called.append(1)
        return torch.ones(2).half()

    deferred = Deferred(shape=(2,), dtype=torch.float16, compute=compute)
    joined = combine([deferred, torch.zeros(2).bfloat16()], (4,), torch.cat)
    assert (joined.dtype, joined.shape, joined.nbytes, called) == (torch.float32, (4,), 16, [])
    assert materialize(joined).tolist() == [1, 1, 0, 0]
    assert called == [1]


def test_work_in_parallel_leaves_torch_its_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert set(in_parallel(lambda _: torch.get_num_threads(), range(9))) == {1}
        next(iter(in_parallel(str, range(99))))  # and where not all of it is wanted
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
