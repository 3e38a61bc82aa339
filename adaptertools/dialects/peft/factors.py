"""LoraModule -> what PEFT stores for one layer: fused rows joined, scalings settled, convolutions refactored."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from adaptertools.encoding import Encoder, Loss
from adaptertools.errors import UnsupportedFeatureError
from adaptertools.module import Kind, LoraModule, ScaleRule
from adaptertools.tensors import Deferred, combine


@dataclass(slots=True)
class Layer:
    """One pair of factors on its way into a PEFT file.

    `lora_B` takes a factor that is folded in. `alpha` is known where rank and rule are those that the module has
    already. `extra` are the vectors beside the pair, by their leaf.
    """

    parameter: str
    kind: Kind
    rank: int
    scaling: float
    alpha: float | None
    lora_A: Deferred
    lora_B: Callable[[float], Deferred]
    extra: dict[str, Deferred] = field(default_factory=dict)
    experts: bool = False

    def widened(self, rank: int) -> "Layer":
        """The layer at a higher rank, filled up with zeros."""
        more = rank - self.rank
        if not more:
            return self
        A, B = self.lora_A, self.lora_B
        columns = A.shape[1]

        def widen(factor: float) -> Deferred:
            part = B(factor)
            return combine([part], (part.shape[0], rank), lambda ts: torch.nn.functional.pad(ts[0], (0, more)))

        wide_A = combine([A], (rank, columns), lambda ts: torch.nn.functional.pad(ts[0], (0, 0, 0, more)))
        return replace(self, rank=rank, alpha=None, lora_A=wide_A, lora_B=widen)


def layers(modules: Sequence[LoraModule], encoder: Encoder, rule: ScaleRule, conv: str | None) -> list[Layer]:
    """One layer for every parameter.

    Raises: UnsupportedFeatureError for what no PEFT layer can be
    """
    by_parameter: dict[str, list[LoraModule]] = {}
    for module in modules:
        by_parameter.setdefault(module.target.parameter, []).append(module)
    return [
        _join_rows(members, encoder, rule) if members[0].target.rows else _layer(members[0], encoder, rule, conv)
        for members in by_parameter.values()
    ]


def settle_alpha(name: str, scaling: float, rank: int, rule: ScaleRule, encoder: Encoder) -> float:
    """The alpha that gives this scaling under this rule; where no float does, the nearest, and the encoder knows."""
    alpha = rule.alpha(scaling, rank)
    got = rule.scaling(alpha, rank)
    if got != scaling:
        error = abs(got - scaling) / abs(scaling)
        encoder.losses.append(
            Loss(tensor=f"{name}.alpha", factor=1.0, dtype="f64", exact=False, max_relative_error=error)
        )
    return alpha


def _layer(module: LoraModule, encoder: Encoder, rule: ScaleRule, conv: str | None) -> Layer:
    if module.kernel_fold > 1:
        module = _refactored(module, encoder, conv)
    name = str(module.target)
    lora_A, lora_B, axis = module.lora_A, module.lora_B, module.magnitude_axis
    if _is_turned(module):
        lora_A, lora_B, axis = lora_B.transpose(-1, -2), lora_A.transpose(-1, -2), "in" if axis == "out" else "out"
    if module.magnitude is not None and axis != "out":
        raise UnsupportedFeatureError(
            f"{name}: its DoRA magnitude has a value for each input; PEFT has one for each output. "
            "Give it up with --drop dora"
        )
    A, B = _file_shapes(module, lora_A, lora_B)

    def fold(factor: float) -> Deferred:
        return _reshaped(encoder.fold(f"{name}.lora_B", lora_B, factor), B, _expert_minor if module.experts else None)

    layer = Layer(
        parameter=module.target.parameter,
        kind=module.kind,
        rank=module.rank,
        scaling=module.scaling,
        alpha=module.alpha if module.scale_rule is rule else None,
        lora_A=_reshaped(encoder.keep(f"{name}.lora_A", lora_A), A),
        lora_B=fold,
        experts=module.experts is not None,
    )
    if module.lora_bias is not None:
        layer.extra["lora_bias"] = encoder.keep(f"{name}.lora_bias", module.lora_bias)
    if module.magnitude is not None:
        layer.extra["magnitude"] = _magnitude(module, encoder)
    return layer


def _is_turned(module: LoraModule) -> bool:
    """Whether PEFT's A and B are our B and A, transposed: embeddings and bare matrices held the other way round."""
    if module.kind is Kind.EMBEDDING:
        return module.transposed is False
    return module.kind is Kind.PARAMETER and module.experts is None and bool(module.transposed)


def _file_shapes(module: LoraModule, lora_A: Tensor, lora_B: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if module.experts is not None:
        return (module.experts * module.rank, lora_A.shape[2]), (lora_B.shape[1], module.rank * module.experts)
    if module.kind is Kind.CONV:
        if module.shape is None or module.shape[0] != lora_B.shape[0]:
            raise UnsupportedFeatureError(f"{module.target}: a convolution whose kernel is not known cannot be written")
        return (module.rank, *module.shape[1:]), (lora_B.shape[0], module.rank, *[1] * (len(module.shape) - 2))
    if module.kind is Kind.PARAMETER and module.shape is not None and len(module.shape) != 2:
        raise UnsupportedFeatureError(
            f"{module.target}: a bare parameter of shape {module.shape}; PEFT adapts matrices and stacks of matrices"
        )
    return tuple(lora_A.shape), tuple(lora_B.shape)


def _magnitude(module: LoraModule, encoder: Encoder) -> Deferred:
    assert module.magnitude is not None
    kept = encoder.keep(f"{module.target}.magnitude", module.magnitude)
    if module.kind is not Kind.CONV or module.shape is None:
        return kept
    return _reshaped(kept, (1, module.shape[0], *[1] * (len(module.shape) - 2)))


def _expert_minor(lora_B: Tensor) -> Tensor:
    return lora_B.permute(1, 2, 0)


def _reshaped(part: Deferred, shape: tuple[int, ...], before: Callable[[Tensor], Tensor] | None = None) -> Deferred:
    if part.shape == shape and before is None:
        return part
    return combine([part], shape, lambda ts: (before(ts[0]) if before else ts[0]).reshape(shape))


def _join_rows(members: Sequence[LoraModule], encoder: Encoder, rule: ScaleRule) -> Layer:
    """The slices of a fused projection as one block-diagonal pair; slices that share their lora_A keep sharing it.

    The rank becomes n·r and alpha n·α, so that the scaling stays what it was.
    """
    first = members[0]
    rows = first.target.rows
    assert rows is not None
    name = first.target.parameter
    distinct: list[Tensor] = []
    columns: list[int] = []
    for module in members:
        if module.in_features != first.in_features or module.experts is not None:
            raise UnsupportedFeatureError(
                f"{name}: its slices take {module.in_features} and {first.in_features} inputs"
            )
        place = next((i for i, seen in enumerate(distinct) if same_tensor(seen, module.lora_A)), None)
        if place is None:
            place = len(distinct)
            distinct.append(module.lora_A)
        columns.append(sum(A.shape[0] for A in distinct[:place]))
    rank = sum(A.shape[0] for A in distinct)
    scaling = first.scaling
    if any(module.scaling != scaling for module in members):
        scaling = max((module.scaling for module in members), key=abs)
    spans = [(m.target.rows.start, m.target.rows.stop) for m in members if m.target.rows]

    def fold(factor: float) -> Deferred:
        parts = [
            encoder.fold(f"{m.target}.lora_B", m.lora_B, factor * (m.scaling / scaling if scaling else 1.0))
            for m in members
        ]
        return combine(parts, (rows.total, rank), place_blocks)

    def place_blocks(blocks: list[Tensor]) -> Tensor:
        whole = blocks[0].new_zeros(rows.total, rank)
        for block, (start, stop), column in zip(blocks, spans, columns, strict=True):
            whole[start:stop, column : column + block.shape[1]] = block
        return whole

    parts = [encoder.keep(f"{name}.lora_A", A) for A in distinct]
    unchanged = rank == first.rank and first.scale_rule is rule and scaling == first.scaling
    layer = Layer(
        parameter=name,
        kind=first.kind,
        rank=rank,
        scaling=scaling,
        alpha=first.alpha if unchanged else None,
        lora_A=combine(parts, (rank, first.in_features), torch.cat),
        lora_B=fold,
    )
    _join_vectors(layer, members, rows.total, encoder, scaling)
    return layer


def _join_vectors(layer: Layer, members: Sequence[LoraModule], total: int, encoder: Encoder, scaling: float) -> None:
    spans = [m.target.rows for m in members if m.target.rows]
    covered = sum(span.stop - span.start for span in spans) == total

    def place(pieces: list[Tensor], where: Sequence[int]) -> Tensor:
        whole = pieces[0].new_zeros(total)
        for piece, index in zip(pieces, where, strict=True):
            whole[spans[index].start : spans[index].stop] = piece
        return whole

    with_magnitude = [i for i, module in enumerate(members) if module.magnitude is not None]
    if with_magnitude and (len(with_magnitude) < len(members) or not covered or members[0].magnitude_axis != "out"):
        raise UnsupportedFeatureError(
            f"{layer.parameter}: DoRA on a part of its rows; PEFT has a magnitude for all rows or none. "
            "Give it up with --drop dora"
        )
    biases = [(i, module.lora_bias) for i, module in enumerate(members) if module.lora_bias is not None]
    if biases:
        kept = [
            encoder.fold(f"{members[i].target}.lora_bias", bias, members[i].scaling / scaling if scaling else 1.0)
            for i, bias in biases
        ]
        layer.extra["lora_bias"] = combine(kept, (total,), lambda ts: place(ts, [i for i, _ in biases]))
    if with_magnitude:
        kept = [encoder.keep(f"{m.target}.magnitude", m.magnitude) for m in members if m.magnitude is not None]
        layer.extra["magnitude"] = combine(kept, (total,), lambda ts: place(ts, with_magnitude))


def same_tensor(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same stretch of memory, read alike."""
    views = ((tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) for tensor in (one, other))
    return one is other or len(set(views)) == 1


def _refactored(module: LoraModule, encoder: Encoder, conv: str | None) -> LoraModule:
    """loralib's convolution as one of PEFT's: the delta weight as out x (in·k·k), factored by SVD.

    Memory: one delta weight in float64
    """
    assert module.shape is not None
    if conv != "svd":
        raise UnsupportedFeatureError(
            f"{module.target}: loralib's convolution is a low-rank matrix of another shape than PEFT's. "
            'Written with the option conv="svd" (--out conv=svd) it is factored anew, at a rank up to '
            f"{min(module.shape[0], math.prod(module.shape[1:]))}"
        )
    if module.magnitude is not None:
        raise UnsupportedFeatureError(f"{module.target}: loralib's convolution with DoRA cannot be factored anew")
    delta = module.delta_weight(dtype=torch.float64).reshape(module.shape[0], -1)
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    noise = S[0] * max(delta.shape) * torch.finfo(torch.float64).eps
    rank = max(1, int(S.gt(noise).sum()))
    root = S[:rank].sqrt()
    dtype = torch.promote_types(module.lora_B.dtype, torch.float32)
    lora_A, lora_B = (root[:, None] * Vh[:rank]).to(dtype), (U[:, :rank] * root).to(dtype)
    error = (lora_B.double() @ lora_A.double() - delta).abs().max() / delta.abs().max().clamp_min(1e-300)
    encoder.losses.append(
        Loss(
            tensor=f"{module.target} (refactored)",
            factor=1.0,
            dtype=str(dtype).removeprefix("torch."),
            exact=False,
            max_relative_error=float(error),
        )
    )
    return replace(module, lora_A=lora_A, lora_B=lora_B, alpha=float(rank), scale_rule=ScaleRule.ALPHA_OVER_RANK)
