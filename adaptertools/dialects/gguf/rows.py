"""The rows of q and k: transformers has the halves of a head one after the other, llama.cpp's `llama` interleaved."""

from torch import Tensor

from adaptertools.errors import ShapeError


def interleaved(name: str, lora_B: Tensor, heads: int) -> Tensor:
    """The rows as llama.cpp has them.

    Shapes: lora_B (heads · 2 · half, r), the same with the two inner axes of its rows swapped
    Raises: ShapeError if the rows are not those of so many heads
    """
    return _swapped(name, lora_B, heads, (2, -1))


def in_halves(name: str, lora_B: Tensor, heads: int) -> Tensor:
    """The rows as transformers has them: the reverse of `interleaved`.

    Raises: ShapeError if the rows are not those of so many heads
    """
    return _swapped(name, lora_B, heads, (-1, 2))


def _swapped(name: str, lora_B: Tensor, heads: int, axes: tuple[int, int]) -> Tensor:
    rows, rank = lora_B.shape
    check_heads(name, rows, heads)
    return lora_B.reshape(heads, *axes, rank).transpose(1, 2).reshape(rows, rank)


def check_heads(name: str, rows: int, heads: int) -> None:
    """Raises: ShapeError if the rows are not those of so many heads"""
    if rows % (2 * heads):
        raise ShapeError(
            f"{name}: lora_B has {rows} rows, which are not those of {heads} heads of even size. Is it the right base "
            "model?"
        )
