"""The options of the Flax readers and writers. One that cannot apply is an error: it would be ignored otherwise."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from adaptertools.dialects.flax.names import LLAMA31, NAMINGS, Naming
from adaptertools.dialects.flax.sidecar import Sidecar
from adaptertools.dialects.flax.tree import Dialect
from adaptertools.errors import OptionError

DEFAULT_SCAN_AT = "layers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The options of the Flax readers; the formats say what they mean."""

    format: str
    dialects: Collection[Dialect]
    namings: Collection[str]
    alpha: float | None = None
    naming: str | None = None
    layer_prefix: str | None = None
    scan_axis: int | None = None
    scan_at: str | None = None
    arch: str | None = None
    head_dim: int | None = None
    ignore_other: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The options of the Flax writers; the formats say what they mean."""

    dialect: Dialect
    naming: str = "hf"
    layer_prefix: str | None = None
    scan_axis: int | None = None
    scan_at: str = DEFAULT_SCAN_AT
    num_layers: int | None = None
    head_dim: int | None = None
    fuse_qkv: bool | None = None
    arch: str | None = None

    @property
    def folds(self) -> bool:
        """Whether the dialect has no scale of its own."""
        return self.dialect is not Dialect.QWIX


def check_layout(layout: Layout, accepted: Iterable[str]) -> None:
    """Raises: OptionError for a writer option that is out of range, or that nothing in this layout uses."""
    if layout.scan_axis not in (None, 0, 1):
        raise OptionError(f"scan_axis is {layout.scan_axis}, expected 0 or 1")
    if layout.num_layers is not None and layout.num_layers < 1:
        raise OptionError(f"num_layers is {layout.num_layers}, expected the number of the model's layers")
    _check_head_dim(layout.head_dim)
    if layout.scan_axis is None:
        if layout.num_layers is not None:
            raise OptionError("num_layers is the length of stacked layers and needs scan_axis")
        if layout.scan_at != DEFAULT_SCAN_AT:
            raise OptionError("scan_at says which part of a path stands for stacked layers and needs scan_axis")
    _check_arch(layout.arch, layout.naming, layout.head_dim)
    chosen = NAMINGS.get(layout.naming)
    _check_names(chosen, layout.layer_prefix, layout.scan_at if layout.scan_at != DEFAULT_SCAN_AT else None)
    if layout.head_dim is not None and layout.arch is None and not _splits_heads(chosen):
        raise OptionError(_unused_head_dim(layout, accepted))
    if layout.fuse_qkv is not None and not _fuses_qkv(chosen):
        fusing = [name for name in accepted if _fuses_qkv(NAMINGS.get(name))]
        raise OptionError(f"fuse_qkv needs naming={' or '.join(fusing)}; the naming {layout.naming} fuses nothing")


def check_request(request: Request, sidecar: Sidecar | None, chosen: Naming | None) -> None:
    """Raises: OptionError for a reader option that cannot apply under the naming that was chosen or found."""
    name = chosen.name if chosen else "hf"
    _check_head_dim(request.head_dim)
    if request.scan_axis not in (None, 0, 1):
        raise OptionError(f"scan_axis is {request.scan_axis}, expected 0 or 1")
    if sidecar is None:
        _check_arch(request.arch, name, request.head_dim)
        if request.head_dim is not None and request.arch is None:
            raise OptionError(
                "head_dim needs arch: without it, a head's size is what the leaves show, or plays no part"
            )
    else:
        for option, asked, stated in (
            ("arch", request.arch, sidecar.arch),
            ("head_dim", request.head_dim, sidecar.head_dim),
        ):
            if asked is not None and asked != stated:
                raise OptionError(
                    f"{option} is {asked!r}, but {sidecar.label} says {stated!r} of the file: leave it out"
                )
        _check_arch(sidecar.arch, name, sidecar.head_dim)
    _check_names(chosen, request.layer_prefix, request.scan_at)


def check_stacked(request: Request, paths: Iterable[str]) -> None:
    """For leaves none of which stacks layers. Raises: OptionError for a reader option about such stacks."""
    given = [name for name in ("scan_axis", "scan_at") if getattr(request, name) is not None]
    if given:
        raise OptionError(
            f"{' and '.join(given)}: no leaf stacks layers; the paths are like {next(iter(paths))}. Stacked leaves "
            f"have no layer index behind the part that scan_at names, here {request.scan_at or DEFAULT_SCAN_AT!r}"
        )


def _check_head_dim(head_dim: int | None) -> None:
    if head_dim is not None and head_dim < 1:
        raise OptionError(f"head_dim is {head_dim}, expected the size of an attention head")


def _check_arch(arch: str | None, naming: str, head_dim: int | None) -> None:
    if arch is None:
        return
    if arch != LLAMA31:
        raise OptionError(f"arch is {arch!r}; only {LLAMA31} is known")
    if naming != "maxtext":
        raise OptionError(
            f"arch={LLAMA31} is MaxText's row order and needs naming=maxtext, but the naming is {naming}. Leave arch "
            "out for other namings"
        )
    if head_dim is None:
        raise OptionError(f"arch={LLAMA31} reorders the rows of every head and needs head_dim, the size of one")


def _check_names(chosen: Naming | None, layer_prefix: str | None, scan_at: str | None) -> None:
    if chosen is None and layer_prefix is not None:
        raise OptionError(
            "layer_prefix needs a naming with names of its own; the naming is hf, which keeps every name whole"
        )
    if chosen is not None and scan_at is not None:
        raise OptionError(
            f"scan_at needs naming=hf; the naming {chosen.name} has its layers at {'/'.join(chosen.stem)}"
        )


def _unused_head_dim(layout: Layout, accepted: Iterable[str]) -> str:
    splitting = [name for name in accepted if _splits_heads(NAMINGS.get(name))]
    if layout.naming == "maxtext":
        return (
            f"head_dim needs arch={LLAMA31} under naming=maxtext: qwix keeps the factors of MaxText's linear layers in "
            "two dimensions, whatever axes the layer has"
        )
    return f"head_dim needs naming={' or '.join(splitting)}; the naming {layout.naming} has no axis for heads"


def _splits_heads(chosen: Naming | None) -> bool:
    return chosen is not None and any(rule.heads for rule in chosen.rules)


def _fuses_qkv(chosen: Naming | None) -> bool:
    return chosen is not None and any(len(rule.parts) == 3 for rule in chosen.rules)
