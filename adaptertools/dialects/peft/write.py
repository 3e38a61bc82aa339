"""An arranged adapter -> the tensors and the configuration of a PEFT folder."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from adaptertools.adapter import Adapter, WeightRole
from adaptertools.dialects.peft.config import DEFAULTS, NEWER_DEFAULTS
from adaptertools.dialects.peft.factors import settle_alpha
from adaptertools.dialects.peft.keys import MAGNITUDE, PREFIX, TOKENS
from adaptertools.dialects.peft.layout import Layout
from adaptertools.dialects.peft.patterns import anchored
from adaptertools.encoding import Encoder
from adaptertools.errors import UnsupportedFeatureError, few
from adaptertools.module import Kind, ScaleRule
from adaptertools.names import leaf, parent
from adaptertools.tensors import Deferred, combine, natural_order

PEFT_VERSION = "0.21.2"
"""The version whose layout is written; readers tell the layout of experts by it."""

_HEADS = ("classifier", "score", "qa_outputs")
"""Heads that PEFT wraps as a whole by itself, whatever modules they are made of."""

_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
_INIT_CONFIGS = ("corda_config", "lora_ga_config", "loftq_config")


def factor_tensors(layout: Layout) -> dict[str, Deferred]:
    """lora_A, lora_B and the vectors beside them, under their keys."""
    with_bias = any("lora_bias" in place.layer.extra for place in layout.places)
    tensors: dict[str, Deferred] = {}
    for place in layout.places:
        home, layer = layout.key(place.path, place.nesting), place.layer
        lora_B = layer.lora_B(place.factor)
        if layer.kind is Kind.EMBEDDING:
            tensors |= {f"{home}.lora_embedding_A": layer.lora_A, f"{home}.lora_embedding_B": lora_B}
        else:
            tensors |= {f"{home}.lora_A.weight": layer.lora_A, f"{home}.lora_B.weight": lora_B}
        if with_bias:
            tensors[f"{home}.lora_B.bias"] = layer.extra.get("lora_bias") or _zeros(lora_B.shape[0], lora_B.dtype)
        if "magnitude" in layer.extra:
            tensors[f"{home}.{MAGNITUDE}"] = layer.extra["magnitude"]
    return tensors


def tied_tensors(layout: Layout, tied: Mapping[str, str]) -> dict[str, Deferred]:
    """The copies that PEFT keeps of an embedding's factors for the output layer tied to it."""
    by_path = {place.path: place for place in layout.places}
    tensors = {}
    for copy, source in tied.items():
        place = by_path.get(source)
        if place is None or copy in by_path or place.layer.kind is not Kind.EMBEDDING:
            continue
        layout.hidden.add(copy)
        for name, part in (("lora_A", place.layer.lora_B(1.0)), ("lora_B", place.layer.lora_A)):
            tensors[f"{PREFIX}{copy}.{name}.weight"] = combine([part], part.shape[::-1], lambda ts: ts[0].T)
    return tensors


def weight_tensors(adapter: Adapter, layout: Layout, saved: Sequence[str], encoder: Encoder) -> dict[str, Deferred]:
    """Whole weights and token rows under their keys."""
    tensors = {}
    for name, weight in adapter.full_weights.items():
        trained = weight.role is WeightRole.MODULE and _covers(saved, name)
        key = layout.key(name) if trained else layout.base_key(name)
        if not trained and name in adapter.row_weights:
            key = f"{layout.key(parent(name))}.token_adapter.base_layer.{leaf(name)}"
        tensors[key] = encoder.keep(name, weight.weight)
    for name, rows in adapter.row_weights.items():
        module = parent(name)
        if leaf(name) != "weight" or not module:
            raise UnsupportedFeatureError(f"{name}: PEFT trains token rows of the weight of an embedding, nothing else")
        if layout.adapts(module):
            raise UnsupportedFeatureError(f"{module}: PEFT cannot train token rows of a layer that has LoRA as well")
        tensors[f"{layout.key(module)}.token_adapter.{TOKENS}"] = encoder.keep(f"{name} (token rows)", rows.rows)
    return tensors


def saved_modules(adapter: Adapter, layout: Layout, original: Sequence[str]) -> list[str]:
    """modules_to_save: the original names where they still cover something, else the modules that hold the weights.

    A module of which only a bias is there is left out: PEFT wants all of a module, or loads single weights as they are.
    """
    names = [name for name, weight in adapter.full_weights.items() if weight.role is WeightRole.MODULE and parent(name)]
    names = [name for name in names if not layout.adapts(parent(name))]
    usable = [entry for entry in original if any(_covers([entry], name) for name in names)]
    found = dict.fromkeys(entry for entry in usable if not _excludes(entry, layout))
    for name in names:
        if _covers(list(found), name):
            continue
        entry = _module_of(name)
        whole = leaf(name) != "bias" or entry != parent(name) or f"{entry}.weight" in names
        if whole and not _excludes(entry, layout):
            found[entry] = None
    return list(found)


def _module_of(name: str) -> str:
    """The module to save a weight with: the one that holds it, or the whole head around that."""
    parts = parent(name).split(".")
    heads = [index for index, part in enumerate(parts) if part in _HEADS]
    return ".".join(parts[: heads[0] + 1]) if heads else ".".join(parts)


def _covers(entries: Sequence[str], name: str) -> bool:
    """Whether modules_to_save takes in the parameter: the path of one of its modules ends with an entry."""
    path = parent(name)
    while path:
        if path.endswith(tuple(entries)):
            return True
        path = parent(path)
    return False


def _excludes(entry: str, layout: Layout) -> bool:
    """Whether PEFT would leave out a LoRA layer because modules_to_save names it or a module around it."""
    pattern = re.compile(rf"(^|.*\.){re.escape(entry)}($|\..*)")
    return any(pattern.match(path) for path in (*layout.target_modules, *layout.wrappers))


def build_config(
    adapter: Adapter, layout: Layout, rule: ScaleRule, saved: Sequence[str], tied: Iterable[str], encoder: Encoder
) -> dict[str, Any]:
    """The configuration, without the newer fields that are at PEFT's default: earlier versions refuse them.

    Raises: UnsupportedFeatureError
    """
    carried = adapter.metadata.get("peft", {})
    config = {**DEFAULTS, "peft_version": PEFT_VERSION}
    config |= {key: carried[key] for key in ("auto_mapping", "task_type") if key in carried}
    config["lora_dropout"] = _dropout(adapter)
    config |= {key: carried[key] for key in ("megatron_config", "megatron_core") if key in carried}
    init = carried.get("init_lora_weights")
    if init is False or init == "gaussian":  # they set only what loading replaces, whatever the rank
        config["init_lora_weights"] = init
    config |= _scales(layout, rule, encoder)
    component = adapter.modules[0].target.component
    base = adapter.bases.get(component) or adapter.bases.get("")
    if base is not None:
        config |= {"base_model_name_or_path": base.id, "revision": base.revision}
        config |= _change(base.change, carried)
        config["layer_replication"] = [list(layers) for layers in base.layer_replication] or None
    layers = [place.layer for place in layout.places]
    config["use_dora"] = any("magnitude" in layer.extra for layer in layers)
    config["lora_bias"] = any("lora_bias" in layer.extra for layer in layers)
    config["fan_in_fan_out"] = _fan_in_fan_out(adapter, bool(carried.get("fan_in_fan_out")))
    config["target_modules"] = sorted(layout.target_modules, key=natural_order)
    if layout.target_parameters:
        config["target_parameters"] = sorted(layout.target_parameters, key=natural_order)
        config |= {"lora_dropout": 0.0, "fan_in_fan_out": False}  # PEFT refuses either beside target_parameters
    config["modules_to_save"] = list(saved) or None
    config["bias"] = _bias(adapter, layout, carried.get("bias"))
    config["ensure_weight_tying"] = bool(list(tied)) or (bool(saved) and bool(carried.get("ensure_weight_tying")))
    if adapter.row_weights:
        config["trainable_token_indices"] = _token_indices(adapter, carried.get("trainable_token_indices"))
    if adapter.invocation_tokens is not None:
        config["alora_invocation_tokens"] = list(adapter.invocation_tokens)
    return {key: value for key, value in config.items() if key not in NEWER_DEFAULTS or value != NEWER_DEFAULTS[key]}


def _dropout(adapter: Adapter) -> Any:
    """That of the training: mlx-lm and LitGPT state it too."""
    peft, litgpt, mlx = (adapter.metadata.get(home) or {} for home in ("peft", "litgpt", "mlx"))
    if "lora_dropout" in peft:
        return peft["lora_dropout"]
    stated = (litgpt.get("lora_dropout"), (mlx.get("lora_parameters") or {}).get("dropout"))
    usable = (float(share) for share in stated if isinstance(share, int | float) and 0 <= share <= 1)
    return next(usable, DEFAULTS["lora_dropout"])


def _scales(layout: Layout, rule: ScaleRule, encoder: Encoder) -> dict[str, Any]:
    """r and lora_alpha of most layers, and a pattern for each that differs.

    The patterns are anchored, so that their order, which sorting changes, does not matter.
    """
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for place in layout.places:
        if place.path in layout.hidden:
            continue
        layer = place.layer
        alpha = layer.alpha
        if alpha is None:
            alpha = settle_alpha(layer.parameter, layer.scaling, layer.rank, rule, encoder)
        ranks[place.matched], alphas[place.matched] = layer.rank, alpha
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {anchored(path): value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {anchored(path): _plain(value) for path, value in alphas.items() if value != alpha},
        "use_rslora": rule is ScaleRule.ALPHA_OVER_SQRT_RANK,
    }


def _plain(alpha: float) -> int | float:
    return int(alpha) if float(alpha).is_integer() and abs(alpha) < 2**53 else alpha


def _change(change: str | None, carried: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that say what was done to the base weights before training."""
    if change is None:
        return {}
    if not change.lower().startswith(_INITS):
        raise UnsupportedFeatureError(
            f"the base weights were changed by {change!r}, which PEFT cannot be told. "
            "To use the adapter on the changed weights themselves, give that up: --drop changed-base"
        )
    config = {"init_lora_weights": change, **{key: carried[key] for key in _INIT_CONFIGS if key in carried}}
    if change == "loftq" and not config.get("loftq_config"):
        raise UnsupportedFeatureError(
            "the base weights were changed by loftq, and PEFT loads no such adapter without a loftq_config, which is "
            "not known. To use it on the changed weights themselves: --drop changed-base"
        )
    return config


def _fan_in_fan_out(adapter: Adapter, stated: bool) -> bool:
    """The nominal flag; PEFT settles the truth for each layer when it loads."""
    known = {module.transposed for module in adapter.modules if module.kind is Kind.LINEAR}
    return True in known or (stated and None in known)


def _bias(adapter: Adapter, layout: Layout, stated: Any) -> str:
    homes = [parent(name) for name, weight in adapter.full_weights.items() if weight.role is WeightRole.BIAS]
    if not homes:
        return "none"
    return "lora_only" if stated != "all" and all(layout.adapts(home) for home in homes) else "all"


def _token_indices(adapter: Adapter, stated: Any) -> Any:
    """A bare list where the adapter had one, for the input embedding, whatever its name; else by module."""
    indices = {parent(name): list(rows.indices) for name, rows in adapter.row_weights.items()}
    if isinstance(stated, list) and len(indices) == 1:
        return next(iter(indices.values()))
    return indices


def _zeros(size: int, dtype: torch.dtype) -> Deferred:
    return Deferred(shape=(size,), dtype=dtype, compute=lambda: torch.zeros(size, dtype=dtype))


def check_uniform(layout: Layout) -> None:
    """PEFT has one switch for DoRA and one for lora_bias, for all layers.

    Raises: UnsupportedFeatureError that names the layers which stand in the way
    """
    layers = [place.layer for place in layout.places]
    plain = [layer.parameter for layer in layers if "magnitude" not in layer.extra]
    bare = [layer.parameter for layer in layers if layer.kind is Kind.PARAMETER]
    biased = any("lora_bias" in layer.extra for layer in layers)
    if plain and len(plain) < len(layers):
        raise UnsupportedFeatureError(
            f"{few(plain)} without DoRA beside layers with it: PEFT's use_dora is for all layers. "
            "Give it up with --drop dora, or write two adapters (--only)"
        )
    if biased and not (plain or not layers):
        raise UnsupportedFeatureError("PEFT has no DoRA with lora_bias. Give one up: --drop dora or --drop lora-bias")
    without = [layer.parameter for layer in layers if layer.kind is Kind.EMBEDDING] + bare
    if biased and without:
        raise UnsupportedFeatureError(
            f"{few(without)} beside layers with lora_bias: PEFT has none for embeddings and bare parameters. "
            "Give it up with --drop lora-bias, or write two adapters (--only)"
        )
