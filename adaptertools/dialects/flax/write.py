"""Adapter -> Flax tree: every module finds its leaf, the leaves are packed, and the sidecar says the rest."""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from adaptertools.adapter import Adapter, LoraModule, ScaleRule
from adaptertools.containers.artifact import Artifact
from adaptertools.dialects.flax import sidecar as flax_sidecar
from adaptertools.dialects.flax.layout import insert_layer, remove_layer
from adaptertools.dialects.flax.names import (
    LLAMA31,
    Naming,
    Path,
    Rule,
    find_layer_prefix,
    locate,
    module_name,
    naming,
    query_or_key,
)
from adaptertools.dialects.flax.options import Layout, check_layout
from adaptertools.dialects.flax.pack import Packed, Part, Stack, pack
from adaptertools.dialects.flax.sidecar import Record
from adaptertools.dialects.flax.tree import Dialect
from adaptertools.encoding import Encoder
from adaptertools.errors import DuplicateTargetError, OptionError, UnsupportedFeatureError, count
from adaptertools.names import join
from adaptertools.tensors import Deferred, dtype_name, natural_order

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def encode(adapter: Adapter, encoder: Encoder, layout: Layout, accepted: Iterable[str], container: str) -> Artifact:
    """The tree that holds an adapter, and the sidecar that explains it.

    Memory: one leaf when it is written; the values of what is folded are read once here
    Raises: UnsupportedFeatureError, OptionError, ShapeError
    """
    chosen = naming(layout.naming, accepted)
    check_layout(layout, accepted)
    _check(adapter)
    if chosen is not None and layout.layer_prefix is None:
        layout = replace(layout, layer_prefix=find_layer_prefix(map(_key, adapter.modules), chosen))
    leaves: dict[Path, Deferred] = {}
    records: dict[str, Record] = {}
    packs: list[tuple[Stack, Packed]] = []
    for stack in _stacks(adapter.modules, chosen, layout):
        packed = pack(stack, encoder, folds=layout.folds)
        for path, leaf in zip(_leaf_paths(stack, layout.dialect), (packed.a, packed.b), strict=True):
            if path in leaves:
                raise DuplicateTargetError(f"two modules would stand at {'/'.join(path)}")
            leaves[path] = leaf
        records |= packed.records
        packs.append((stack, packed))
    sidecar = flax_sidecar.build(
        adapter,
        {key: records[key] for key in sorted(records, key=natural_order)},
        dialect=layout.dialect,
        folded=layout.folds,
        dtype=str(Counter(leaf.dtype for leaf in leaves.values()).most_common(1)[0][0]).removeprefix("torch."),
        naming=layout.naming,
        layer_prefix=layout.layer_prefix,
        head_dim=layout.head_dim,
        arch=layout.arch,
        scan=_scan(packs, layout),
    )
    return Artifact(
        tensors={"/".join(path): leaves[path] for path in sorted(leaves)},
        stem=flax_sidecar.STEM,
        metadata=flax_sidecar.header(sidecar) if container == "safetensors" else {},
        documents={flax_sidecar.NAME: sidecar},
        sidecar=flax_sidecar.NAME,
        notes=(*_changed_base(adapter), *(() if layout.folds else _lora_rules(packs)), *_filled(packs)),
    )


def _check(adapter: Adapter) -> None:
    for module in adapter.modules:
        for name, tensor in module.tensors.items():
            if tensor.dtype not in _DTYPES:
                raise UnsupportedFeatureError(
                    f"{module.target}: {name} is {dtype_name(tensor.dtype)}; Flax adapters are f32, bf16 or f16. "
                    "Choose one with --dtype"
                )
        if any(not part or "/" in part for part in _key(module).split(".")):
            raise UnsupportedFeatureError(f"{module.target}: this name is no path in a tree; change it with --rename")


def _key(module: LoraModule) -> str:
    return join(module.target.component, module.target.parameter)


def _stacks(modules: Sequence[LoraModule], chosen: Naming | None, layout: Layout) -> list[Stack]:
    """What goes into each leaf pair, in the order of the paths."""
    fuse = layout.fuse_qkv if layout.fuse_qkv is not None else _same_heads(modules)
    grouped: dict[tuple[Rule, int | None], list[Part]] = {}
    scanned: set[Rule] = set()
    for module in modules:
        rule, layer, part = _place(module, chosen, layout, fuse)
        if layout.scan_axis is not None and layer is not None:
            scanned.add(rule)
            grouped.setdefault((rule, None), []).append(replace(part, layer=layer))
        else:
            grouped.setdefault((rule, layer), []).append(part)
    _check_scanned(modules, grouped, scanned, layout)
    stacks = [_stack(rule, layer, rule in scanned, parts, chosen, layout) for (rule, layer), parts in grouped.items()]
    return sorted(stacks, key=lambda stack: natural_order("/".join(stack.path)))


def _check_scanned(
    modules: Sequence[LoraModule],
    grouped: Mapping[tuple[Rule, int | None], list[Part]],
    scanned: Collection[Rule],
    layout: Layout,
) -> None:
    if layout.scan_axis is None:
        return
    if not scanned:
        where = f"behind a part {layout.scan_at!r}, as scan_at says" if layout.naming == "hf" else "in its layers"
        raise OptionError(
            f"scan_axis: no module has a layer index {where}; the names are like {_key(modules[0])}. Give scan_at the "
            "part before the index, or leave scan_axis out"
        )
    last = max(part.layer for (rule, _), parts in grouped.items() if rule in scanned for part in parts)
    if layout.num_layers is not None and last >= layout.num_layers:
        raise OptionError(f"num_layers is {layout.num_layers}, but the adapter has a layer {last}, counted from 0")


def _place(module: LoraModule, chosen: Naming | None, layout: Layout, fuse: bool) -> tuple[Rule, int | None, Part]:
    """The rule of the leaf that holds a module, the index of its layer, and its part in the leaf."""
    key = _key(module)
    if chosen is None:
        path: Path = tuple(key.split("."))
        path, layer = remove_layer(path, layout.scan_at) if layout.scan_axis is not None else (path, None)
        return (
            Rule(path=path, parts=(key if layer is None else "",)),
            layer,
            Part(module=module, key=key, layer=0, place=0),
        )
    layer, name = locate(key, chosen, layout.layer_prefix or "")
    fitting = sorted((rule for rule in chosen.all_rules if name in rule.parts), key=lambda rule: len(rule.parts))
    rule = fitting[-1] if fuse else next((r for r in reversed(fitting) if len(r.parts) < 3), fitting[-1])
    if layout.dialect is Dialect.NNX:
        rule = replace(rule, heads="")  # nnx.LoRA is a product of two matrices
    turned = query_or_key(name) if layout.arch == LLAMA31 else ""
    part = Part(
        module=module,
        key=key,
        layer=0,
        place=rule.parts.index(name),
        halves_of=layout.head_dim if turned else None,
        extra=1 / math.sqrt(layout.head_dim) if turned == "q" and layout.head_dim else 1.0,
    )
    return rule, layer, part


def _stack(
    rule: Rule, layer: int | None, scanned: bool, parts: list[Part], chosen: Naming | None, layout: Layout
) -> Stack:
    layers = max(max(part.layer for part in parts) + 1, layout.num_layers or 0) if scanned else 1
    places = {(index, place): part for index in range(layers) for place, part in enumerate(rule.parts)}
    if chosen is None:
        path = rule.path
        names = {slot: ".".join(insert_layer(path, layout.scan_at, slot[0]) if scanned else path) for slot in places}
    else:
        path = chosen.path(rule, layer)
        names = {
            slot: module_name(part, rule, chosen, slot[0] if scanned else layer, layout.layer_prefix or "")
            for slot, part in places.items()
        }
    taken = Counter((part.layer, part.place) for part in parts)
    for slot, times in taken.items():
        if times > 1:
            raise DuplicateTargetError(f"two modules would stand at {names[slot]}")
    return Stack(
        path=path,
        rule=rule,
        parts=parts,
        names=names,
        layers=layers,
        axis=layout.scan_axis if scanned else None,
        head_dim=layout.head_dim,
    )


def _same_heads(modules: Sequence[LoraModule]) -> bool:
    """Whether q has as many rows as k and v, as far as the adapter shows: then Gemma fuses all three."""
    rows: dict[str, set[int]] = {"q_proj": set(), "k_proj": set(), "v_proj": set()}
    for module in modules:
        name = module.target.parameter.rpartition(".")[2]
        if name in rows:
            rows[name].add(module.out_features)
    return len(rows["q_proj"]) == 1 and rows["q_proj"] == rows["k_proj"] | rows["v_proj"]


def _leaf_paths(stack: Stack, dialect: Dialect) -> tuple[Path, Path]:
    match dialect:
        case Dialect.QWIX:
            return (*stack.path, f"{stack.rule.weight}_lora_a"), (*stack.path, f"{stack.rule.weight}_lora_b")
        case Dialect.GEMMA:
            return (*stack.path, "lora", "a"), (*stack.path, "lora", "b")
        case _:
            return (*stack.path, "lora_a"), (*stack.path, "lora_b")


def _scan(packs: Sequence[tuple[Stack, Packed]], layout: Layout) -> dict[str, Any] | None:
    lengths = {stack.layers for stack, _ in packs if stack.axis is not None}
    if len(lengths) > 1:
        raise OptionError(
            f"the scanned leaves would have {', '.join(map(str, sorted(lengths)))} layers; give the model's num_layers"
        )
    return {"axis": layout.scan_axis, "length": lengths.pop(), "at": layout.scan_at} if lengths else None


def _changed_base(adapter: Adapter) -> list[str]:
    return [
        f"the factors belong to {base.id or 'the base model'} as changed by {base.change}, not to the published weights"
        for base in adapter.bases.values()
        if base.change
    ]


def _lora_rules(packs: Sequence[tuple[Stack, Packed]]) -> list[str]:
    """qwix multiplies by alpha / rank and stores neither, so the user has to know both."""
    rules: dict[tuple[int, float], list[str]] = {}
    for stack, packed in packs:
        alpha = ScaleRule.ALPHA_OVER_RANK.alpha(packed.scaling, packed.rank)
        rules.setdefault((packed.rank, alpha), []).append("/".join(stack.path))
    common = max(rules, key=lambda rule: len(rules[rule]))
    notes = [f"apply it with qwix.LoraProvider(module_path=…, rank={common[0]}, alpha={common[1]:.17g})"]
    for (rank, alpha), paths in rules.items():
        if (rank, alpha) != common:
            shown = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
            notes.append(f"but with a LoraRule of rank={rank}, alpha={alpha:.17g} for {shown}")
    return notes


def _filled(packs: Sequence[tuple[Stack, Packed]]) -> list[str]:
    absent = sum(record.absent for _, packed in packs for record in packed.records.values())
    if not absent:
        return []
    return [f"filled with zeros: {count(absent, 'module')} in leaves of others, which the adapter does not change"]
