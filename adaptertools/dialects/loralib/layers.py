"""One loralib layer: its two factors cut into modules, and modules joined into the two factors."""

from collections.abc import Sequence

from torch import Tensor

from adaptertools.adapter import Kind, LoraModule, RowSlice, ScaleRule, Target
from adaptertools.dialects.loralib.layout import Layout
from adaptertools.errors import ShapeError, UnsupportedFeatureError


def cut(
    name: str, lora_A: Tensor, lora_B: Tensor, layout: Layout, alpha: float, scale_rule: ScaleRule
) -> tuple[LoraModule, ...]:
    """The modules of a layer: one, or one for each adapted slot of a fused projection.

    Raises: ShapeError, UnsupportedFeatureError
    """
    if layout.slots is not None and len(layout.slots) > 1:
        return _cut_slots(name, lora_A, lora_B, layout, layout.slots, alpha, scale_rule)
    shape = _conv_shape(name, lora_A, lora_B, layout) if layout.kind is Kind.CONV else layout.shape
    module = LoraModule(
        target=Target(parameter=name),
        lora_A=lora_A,
        lora_B=lora_B,
        alpha=alpha,
        scale_rule=scale_rule,
        kind=layout.kind,
        shape=shape,
        transposed=layout.transposed,
    )
    return (module,)


def _cut_slots(
    name: str,
    lora_A: Tensor,
    lora_B: Tensor,
    layout: Layout,
    slots: tuple[bool, ...],
    alpha: float,
    scale_rule: ScaleRule,
) -> tuple[LoraModule, ...]:
    rank, size = lora_B.shape[1], lora_B.shape[0] // sum(slots)
    places = [place for place, adapted in enumerate(slots) if adapted]
    return tuple(
        LoraModule(
            target=Target(
                parameter=name, rows=RowSlice(start=place * size, stop=(place + 1) * size, total=len(slots) * size)
            ),
            lora_A=lora_A[group * rank : (group + 1) * rank],
            lora_B=lora_B[group * size : (group + 1) * size],
            alpha=alpha,
            scale_rule=scale_rule,
            transposed=layout.transposed,
        )
        for group, place in enumerate(places)
    )


def _conv_shape(name: str, lora_A: Tensor, lora_B: Tensor, layout: Layout) -> tuple[int, ...]:
    kernel = layout.kernel or 1
    (rank, columns), rows = lora_A.shape, lora_B.shape[0]
    if rank % kernel or columns % kernel or rows % kernel:
        raise ShapeError(
            f"{name}: lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)} are not of a convolution with "
            f"kernel {kernel}: (k·r, k·in) and (k·out, k·r) were expected"
        )
    shape = layout.shape or (rows // kernel, columns // kernel, kernel, kernel)
    n_out, n_in, height, width = shape
    if height != width:
        raise ShapeError(f"{name}: loralib has square kernels alone, the base weight has shape {shape}")
    if rows < n_out * kernel and n_out * kernel % rows == 0 and n_in < columns // kernel:
        raise UnsupportedFeatureError(
            f"{name}: a grouped convolution, which is not read; the base weight has shape {shape}"
        )
    if (rows, columns) != (n_out * kernel, n_in * kernel):
        raise ShapeError(
            f"{name}: lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)} do not give a weight of shape "
            f"{shape}"
        )
    return shape


def slots_of(name: str, modules: Sequence[LoraModule]) -> tuple[bool, ...] | None:
    """The slots of MergedLinear that these modules fill; None for a layer that is not fused.

    Raises: UnsupportedFeatureError if they are no equal slots of one layer, or no layer of loralib at all
    """
    first = modules[0]
    if first.target.rows is None:
        _check_layer(name, first)
        return None
    size, total = first.out_features, first.target.rows.total
    starts = [module.target.rows.start for module in modules if module.target.rows]
    if total % size or any(module.out_features != size for module in modules) or any(start % size for start in starts):
        slices = ", ".join(str(module.target) for module in modules)
        raise UnsupportedFeatureError(
            f"{slices}: loralib's MergedLinear has slots of equal size alone, and these are not; --drop fused-rows "
            "gives them up"
        )
    alike = {(module.rank, module.scaling, module.transposed) for module in modules}
    if len(alike) > 1:
        raise UnsupportedFeatureError(
            f"{name}: loralib's MergedLinear has one rank, one scaling and one orientation for all slots; here are "
            + ", ".join(f"rank {rank} with scaling {scaling:g}" for rank, scaling, _ in sorted(alike, key=str))
        )
    return tuple(place * size in starts for place in range(total // size))


def _check_layer(name: str, module: LoraModule) -> None:
    if module.kind is not Kind.CONV:
        return
    shape = module.shape or ()
    square = len(shape) == 4 and shape[2] == shape[3]
    laid_out = square and (module.out_features, module.in_features) == (shape[0] * shape[3], shape[1] * shape[3])
    if not laid_out or module.rank % shape[3]:
        raise UnsupportedFeatureError(
            f"{name}: loralib's Conv2d has factors (k·r, k·in) and (k·out, k·r) for a square kernel k, which cannot "
            f"hold a rank-{module.rank} update of the weight {shape}, {module.out_features} by {module.in_features}; "
            "--drop conv gives it up"
        )
