"""What PEFT stores beside the factors: whole weights, biases, trained token rows, and copies of tied factors."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adaptertools.adapter import FullWeight, RowWeights, WeightRole
from adaptertools.dialects.peft.config import PeftConfig
from adaptertools.dialects.peft.keys import Contents, Group, without_base_layer
from adaptertools.dialects.peft.leftovers import check_gathered
from adaptertools.errors import ConfigError, ShapeError
from adaptertools.names import leaf, parent


def read_full_weights(contents: Contents, config: PeftConfig) -> dict[str, FullWeight]:
    """The whole weights by the name of the base parameter. A trained copy stands before the weight beside it.

    Raises: EmptyFactorError for the empty shards that ZeRO-3 leaves
    """
    found: dict[str, FullWeight] = {}
    unannounced = []
    for name, tensor in contents.saved.items():
        found[name] = _whole(name, tensor, WeightRole.MODULE)
    for stored, tensor in contents.plain.items():
        name = without_base_layer(stored)
        if name in contents.saved:
            config.notes.append(f"{name} stands in the file twice; the copy in modules_to_save is used, as PEFT does")
            continue
        role = _role(stored, name, contents.plain, config)
        if role is None:
            unannounced.append(name)
        found[name] = _whole(name, tensor, role or WeightRole.BASE)
    if unannounced:
        more = f" and {len(unannounced) - 3} more" if len(unannounced) > 3 else ""
        config.notes.append(
            f"whole weights that modules_to_save does not name: {', '.join(unannounced[:3])}{more}; "
            "they replace those of the base model, as PEFT loads them"
        )
    _note_absent(found, config)
    return found


def read_row_weights(contents: Contents, config: PeftConfig) -> dict[str, RowWeights]:
    """The trained token rows; their indices stand in the configuration alone.

    Raises: ConfigError if they do not
    """
    found = {}
    for path, rows in contents.tokens.items():
        module = without_base_layer(path)
        check_gathered(f"{module} (trained token rows)", rows)
        indices = _token_indices(module, config)
        if rows.ndim != 2 or len(indices) != rows.shape[0]:
            raise ShapeError(
                f"{config.label}: {module} has trained token rows of shape {tuple(rows.shape)}, "
                f"and trainable_token_indices lists {len(indices)} tokens"
            )
        found[f"{module}.weight"] = RowWeights(indices=tuple(indices), rows=rows)
    return found


def tied_copies(groups: Mapping[str, Group], config: PeftConfig) -> dict[str, str]:
    """Pairs that only repeat those of an embedding for the output layer that shares its weight.

    With ensure_weight_tying PEFT stores lora_A = lora_embedding_Bᵀ and lora_B = lora_embedding_Aᵀ once more. The weight
    is one, so it changes once. Values are compared here.
    """
    if not config.flag("ensure_weight_tying"):
        return {}
    pair = {"lora_embedding_A", "lora_embedding_B"}
    embeddings = [group for group in groups.values() if pair <= group.tensors.keys()]
    found = {}
    for group in groups.values():
        lora_A, lora_B = group.tensors.get("lora_A"), group.tensors.get("lora_B")
        for source in embeddings:
            A, B = source.tensors["lora_embedding_A"], source.tensors["lora_embedding_B"]
            if lora_A is not None and lora_B is not None and _same(lora_A, B) and _same(lora_B, A):
                found[group.path] = source.path
    for copy, original in found.items():
        config.notes.append(f"{copy} repeats the factors of {original} for a tied weight, which changes once")
    return found


def _same(one: Tensor, other: Tensor) -> bool:
    return one.ndim == other.ndim == 2 and one.shape == other.T.shape and torch.equal(one, other.T)


def _whole(name: str, tensor: Tensor, role: WeightRole) -> FullWeight:
    return FullWeight(weight=check_gathered(name, tensor), role=role)


def _role(stored: str, name: str, plain: Mapping[str, Tensor], config: PeftConfig) -> WeightRole | None:
    """Why a weight is there; None where the configuration gives no reason."""
    if leaf(stored) == "bias" and leaf(parent(stored)) == "base_layer":
        return WeightRole.BIAS
    if "base_layer" in stored.split("."):
        return WeightRole.BASE
    if _is_saved(name, config.saved_modules):
        return WeightRole.MODULE
    if leaf(name) == "bias" and config.raw.get("bias") in ("all", "lora_only"):
        return WeightRole.BIAS
    if config.saved_modules and config.flag("ensure_weight_tying"):
        return WeightRole.MODULE  # the other end of a tied weight, stored again
    if not config.stated:
        lone = leaf(name) == "bias" and f"{parent(name)}.weight" not in plain
        return WeightRole.BIAS if lone else WeightRole.MODULE
    return None


def _is_saved(name: str, modules: Sequence[str]) -> bool:
    """Whether the parameter lies in one of the modules; PEFT compares ends of paths without regard to dots."""
    path = parent(name)
    while path:
        if path.endswith(tuple(modules)):
            return True
        path = parent(path)
    return False


def _token_indices(module: str, config: PeftConfig) -> list[int]:
    stated = config.raw.get("trainable_token_indices")
    if isinstance(stated, Mapping):
        stated = next((tokens for name, tokens in stated.items() if module.endswith(name)), None)
    if not isinstance(stated, list) or not all(type(token) is int for token in stated):
        raise ConfigError(
            f"{config.label}: the file has trained token rows for {module}, but trainable_token_indices is "
            f"{config.raw.get('trainable_token_indices')!r:.80}; expected the indices of the rows"
        )
    return stated


def _note_absent(found: Mapping[str, FullWeight], config: PeftConfig) -> None:
    for module in config.names("modules_to_save"):
        if not any(_is_saved(name, (module,)) for name in found):
            config.notes.append(
                f"{config.label}: modules_to_save lists {module}, of which the file has nothing; "
                "it is left out when written"
            )
    roles = {weight.role for weight in found.values()}
    bias = config.raw.get("bias")
    if bias in ("all", "lora_only") and WeightRole.BIAS not in roles:
        config.notes.append(
            f"{config.label}: bias is {bias!r}, but the file has none; PEFT 0.7 to 0.20 lost those of lora_only"
        )
