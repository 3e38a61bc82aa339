"""Which modules of mlx-lm an adapter is written for: one for each of its own, or a stack for the experts of a layer."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from adaptertools.adapter import Adapter
from adaptertools.dialects.mlx.experts import EXPERTS, GATE_UP, STACK, part_of
from adaptertools.dialects.mlx.modules import named_like_embedding
from adaptertools.dialects.mlx.record import Experts, Record
from adaptertools.errors import OptionError, ShapeError, UnsupportedFeatureError
from adaptertools.module import Kind, LoraModule
from adaptertools.names import leaf, parent
from adaptertools.tensors import natural_order

_EXPERT = re.compile(rf"(?P<home>(?:.+\.)?){EXPERTS}\.(?P<expert>\d+)\.(?P<word>\w+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One module of mlx-lm and what it is made of: a module, half of one, or those of a layer's experts."""

    path: str
    members: tuple[LoraModule | None, ...]
    """one; or one for each expert, None where it has none"""
    apart: bool = False
    """whether the members are those of experts"""

    @property
    def rank(self) -> int:
        return max(member.rank for member in self.members if member is not None)


def arrange(
    modules: Sequence[LoraModule], num_experts: int | None, stated: int | None = None
) -> tuple[list[Layer], Record]:
    """The layers in natural order, and what of them the file has to say so that it can be read back.

    `num_experts` is what the caller says, `stated` what the base model does.

    Raises: UnsupportedFeatureError for what no layer of mlx-lm is; OptionError for an option that nothing here uses
    """
    layers: list[Layer] = []
    gate_up: dict[str, tuple[str, str]] = {}
    names: dict[str, str] = {}
    experts: dict[tuple[str, str], dict[int, LoraModule]] = {}
    for module in modules:
        name = _check(module)
        found = _EXPERT.fullmatch(name)
        if module.experts is not None:
            halves = _stack(module)
            layers += halves
            if len(halves) == 2:
                gate_up[name] = (halves[0].path, halves[1].path)
            elif halves[0].path != name:
                names[halves[0].path] = name
        elif found and module.kind is Kind.LINEAR:
            key = found["home"], found["word"]
            experts.setdefault(key, {})[int(found["expert"])] = module
        else:
            layers.append(Layer(path=name, members=(_table(module),)))
    together = _experts(experts, num_experts, stated)
    layers += [layer for layer, _ in together]
    _check_paths(layers)
    record = Record(
        ranks=_ranks(layers),
        embeddings=_embeddings(layers),
        experts={layer.path: said for layer, said in together},
        gate_up=gate_up,
        names=names,
    )
    return sorted(layers, key=lambda layer: natural_order(layer.path)), record


def check_names(adapter: Adapter) -> None:
    """Raises: UnsupportedFeatureError for a name that could not be turned back; stacks of experts have mlx-lm's own"""
    for module in adapter.modules:
        if module.target.opaque and module.experts is None:
            raise UnsupportedFeatureError(
                f"{module.target} is a name that could not be turned back into a module path, which mlx-lm needs. "
                f"{adapter.naming_advice}"
            )


def _check(module: LoraModule) -> str:
    target = module.target
    if module.kind is Kind.PARAMETER and module.experts is None:
        raise UnsupportedFeatureError(
            f"{target} is a bare parameter; mlx-lm adapts Linear, SwitchLinear and Embedding. "
            "Leave it out with --drop parameter"
        )
    return target.parameter


def _stack(module: LoraModule) -> list[Layer]:
    """A stack of experts as a SwitchLinear, or as two where it holds gate and up."""
    name = module.target.parameter
    home, part = parent(name), leaf(name)
    if leaf(home) == STACK or module.target.opaque:
        return [Layer(path=name, members=(module,))]
    if leaf(home) != EXPERTS or module.transposed or module.shape is not None:
        raise UnsupportedFeatureError(
            f"{name}: a stack of experts that is stored (in, out) or has another name than experts.gate_up_proj, "
            "experts.down_proj and the like; which SwitchLinear of mlx-lm it is, is not known here"
        )
    stack = f"{parent(home)}.{STACK}".lstrip(".")
    if part != GATE_UP:
        return [Layer(path=f"{stack}.{part_of(part)}", members=(module,))]
    if module.out_features % 2:
        raise ShapeError(f"{name}: {module.out_features} rows are not those of a gate and as many of up")
    half = module.out_features // 2
    return [
        Layer(path=f"{stack}.gate_proj", members=(replace(module, lora_B=module.lora_B[:, :half]),)),
        Layer(path=f"{stack}.up_proj", members=(replace(module, lora_B=module.lora_B[:, half:]),)),
    ]


def _table(module: LoraModule) -> LoraModule:
    """An embedding held the other way round, as mlx-lm holds it."""
    if module.kind is not Kind.EMBEDDING or module.transposed is not False:
        return module
    return replace(
        module,
        lora_A=module.lora_B.mT,
        lora_B=module.lora_A.mT,
        transposed=True,
        magnitude_axis="in" if module.magnitude_axis == "out" else "out",
    )


def _experts(
    found: Mapping[tuple[str, str], Mapping[int, LoraModule]], num_experts: int | None, stated: int | None
) -> list[tuple[Layer, Experts]]:
    """Experts that stand one by one, as a stack for each layer and part.

    Raises: UnsupportedFeatureError where their number is not known; OptionError for a number that is too small
    """
    if not found:
        if num_experts is not None:
            raise OptionError("num_experts is given, and the adapter holds no expert that stands by itself")
        return []
    most = max(max(members) for members in found.values()) + 1
    num_experts = stated if num_experts is None else num_experts
    if num_experts is not None and (isinstance(num_experts, bool) or num_experts < most):
        raise OptionError(f"num_experts is {num_experts}, and the adapter holds expert {most - 1}, counted from 0")
    together = []
    for (home, word), members in found.items():
        if num_experts is None and len(members) < most:
            absent = next(expert for expert in range(most) if expert not in members)
            raise UnsupportedFeatureError(
                f"{home}{EXPERTS}.{absent}.{word} is not in the adapter, others are. mlx-lm holds all experts of a "
                "layer in one tensor, and their number cannot be told: give it with num_experts=… (--out num_experts=…)"
                " or the base model (--base), and zeros stand for those that are not there"
            )
        whole = tuple(members.get(expert) for expert in range(num_experts or most))
        _check_experts(f"{home}{EXPERTS}.*.{word}", list(members.values()))
        layer = Layer(path=f"{home}{STACK}.{part_of(word)}", members=whole, apart=True)
        ranks = tuple(member.rank if member else 0 for member in whole)
        together.append((layer, Experts(names=f"{home}{EXPERTS}.{{}}.{word}", ranks=ranks)))
    return together


def _check_experts(name: str, members: Sequence[LoraModule]) -> None:
    sizes = {(member.out_features, member.in_features) for member in members}
    if len(sizes) > 1:
        raise ShapeError(f"{name}: experts of one layer are of different sizes: {sorted(sizes)}")


def _check_paths(layers: Iterable[Layer]) -> None:
    seen: set[str] = set()
    for layer in layers:
        if layer.path in seen:
            raise UnsupportedFeatureError(
                f"two modules would both be {layer.path} in mlx-lm; write them apart (--only)"
            )
        seen.add(layer.path)


def _ranks(layers: Sequence[Layer]) -> dict[str, int]:
    """The rank of each module that is lower than the file's."""
    most = max(layer.rank for layer in layers)
    return {layer.path: layer.rank for layer in layers if not layer.apart and layer.rank < most}


def _embeddings(layers: Iterable[Layer]) -> tuple[str, ...] | None:
    """The embeddings, if names would not tell them."""
    single = [(layer.path, layer.members[0]) for layer in layers if not layer.apart]
    tables = tuple(path for path, module in single if module is not None and module.kind is Kind.EMBEDDING)
    matrices = [path for path, module in single if module is not None and module.experts is None]
    told = tuple(path for path in matrices if named_like_embedding(path))
    return None if set(told) == set(tables) else tables
