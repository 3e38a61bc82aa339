"""adapter_config.json of mlx-lm: all arguments of the training run, of which few say what the factors mean.

model                   base model: a folder or a name on the Hub
fine_tune_type          lora, dora or full; before October 2024 `use_dora` instead
num_layers              how many layers from the last on, -1 for all; before October 2024 `lora_layers`
lora_parameters
    rank, scale         one of each for all modules; there is no alpha
    dropout             must be there
    keys                names of modules within a layer, or whole paths
    alpha               until April 2025; read by nothing since June 2024, before which scale·alpha/rank was applied
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from adaptertools.adapter import Adapter, Base
from adaptertools.containers.jsonfile import is_json
from adaptertools.errors import ConfigError, MissingAlphaError, NotLoraError, OptionError
from adaptertools.module import ScaleRule, check_alpha

_STRUCTURE = frozenset({"fine_tune_type", "lora_layers", "lora_parameters", "model", "num_layers", "use_dora"})
"""What the adapter model holds, and writing says anew."""

_ARGUMENTS = frozenset(
    {
        "adapter_path",
        "batch_size",
        "clear_cache_threshold",
        "config",
        "data",
        "grad_accumulation_steps",
        "grad_checkpoint",
        "iters",
        "learning_rate",
        "lr_schedule",
        "mask_prompt",
        "max_seq_length",
        "optimizer",
        "optimizer_config",
        "project_name",
        "report_to",
        "resume_adapter_file",
        "save_every",
        "seed",
        "steps_per_eval",
        "steps_per_report",
        "test",
        "test_batches",
        "train",
        "trust_remote_code",
        "val_batches",
    }
)
"""The other arguments of mlx_lm.lora: what is kept of a configuration that is PEFT's as well."""

_PARAMETERS = frozenset({"alpha", "keys", "rank", "scale"})


@dataclass(frozen=True, slots=True, kw_only=True)
class MlxConfig:
    """The checked values of one configuration. `alpha` by `rule` is what every module gets."""

    alpha: float
    rule: ScaleRule
    rank: int | None
    dora: bool
    label: str
    base: Base
    metadata: Mapping[str, Any]
    notes: list[str] = field(default_factory=list)


def parse(document: Mapping[str, Any] | None, label: str, scale: float | None, alpha: float | None) -> MlxConfig:
    """Check a configuration; `scale`, or `alpha` over each module's rank, stands in where it states no scale.

    Raises: NotLoraError for full fine-tuning; MissingAlphaError, ConfigError, OptionError
    """
    raw = dict(document or {})
    kind = raw.get("fine_tune_type") or ("dora" if raw.get("use_dora") else "lora")
    if kind == "full":
        raise NotLoraError(
            f"{label}: fine_tune_type is full: the file beside it holds weights that were trained whole, and no LoRA. "
            "mlx_lm.fuse makes a model of them"
        )
    if kind not in ("lora", "dora"):
        raise ConfigError(f"{label}: fine_tune_type is {kind!r:.40}, expected lora, dora or full")
    parameters = raw.get("lora_parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise ConfigError(f"{label}: lora_parameters is {parameters!r:.80}, expected an object")
    rank = (parameters or {}).get("rank")
    if rank is not None and (type(rank) is not int or rank < 1):
        raise ConfigError(f"{label}: the rank is {rank!r:.40}, expected a whole number from 1 on")
    notes: list[str] = []
    scaling, rule = _settle_scale(parameters or {}, label, document is not None, scale, alpha, notes)
    model = raw.get("model")
    return MlxConfig(
        alpha=scaling,
        rule=rule,
        rank=rank,
        dora=kind == "dora",
        label=label,
        base=Base(id=str(model) if model else None),
        metadata=_metadata(raw, parameters or {}, label, notes),
        notes=notes,
    )


def _settle_scale(
    parameters: Mapping[str, Any],
    label: str,
    present: bool,
    scale: float | None,
    alpha: float | None,
    notes: list[str],
) -> tuple[float, ScaleRule]:
    stated, old = parameters.get("scale"), parameters.get("alpha")
    _check_given(scale, alpha)
    if stated is None:
        return _given_scale(label, present, old, scale, alpha)
    if not _is_number(stated):
        raise ConfigError(f"{label}: the scale is {stated!r:.40}, expected a finite number")
    before = _scale_before_june_2024(stated, old, parameters.get("rank"))
    if alpha is not None or (scale not in (None, stated) and before is None):
        given = f"scale {scale:g}" if alpha is None else f"alpha {alpha:g}"
        raise OptionError(
            f"{label} states scale {stated}; {given} was given. A value may be given where there is none; to change "
            "the scaling of an adapter, rescale it"
        )
    if before is not None and scale is None:
        notes.append(
            f"{label}: scale {stated} counts and alpha {old} does not, as in mlx-lm since June 2024. Before that it "
            f"took scale·alpha/rank: if the adapter was trained then, read it with scale={before:g}"
        )
    return float(stated if scale is None else scale), ScaleRule.DIRECT


def _check_given(scale: float | None, alpha: float | None) -> None:
    """Raises: OptionError for a scale that is no number, and for two answers to one question"""
    if scale is not None and alpha is not None:
        raise OptionError(f"scale={scale} and alpha={alpha} are both given, and say the same thing: give one")
    if scale is not None and not _is_number(scale):
        raise OptionError(f"scale is {scale!r:.40}, expected a finite number")


def _scale_before_june_2024(scale: float, alpha: object, rank: object) -> float | None:
    """What scale and alpha meant together then, if that was something else than now."""
    return scale * alpha / rank if _is_number(alpha) and _is_number(rank) and alpha != rank else None


def _given_scale(
    label: str, present: bool, old: object, scale: float | None, alpha: float | None
) -> tuple[float, ScaleRule]:
    if scale is not None:
        return float(scale), ScaleRule.DIRECT
    if alpha is not None:
        return check_alpha(alpha), ScaleRule.ALPHA_OVER_RANK
    missing = f"{label}: lora_parameters has no scale" if present else f"{label} is not there"
    raise MissingAlphaError(
        f"{missing}{f', though an alpha of {old}' if old is not None else ''}, and the tensors cannot tell how strong "
        "the adapter is. Give the scale that it was trained with: scale=… in Python, --in scale=… on the command line, "
        "or an alpha that is divided by the rank (alpha=…, --source-alpha). Customary is 20, the default of mlx-lm and "
        "of the LoRA example that saves adapters.npz"
    )


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _metadata(raw: Mapping[str, Any], parameters: Mapping[str, Any], label: str, notes: list[str]) -> dict[str, Any]:
    """What is kept for writing the configuration again; of one that is PEFT's as well, the arguments of mlx-lm."""
    kept: dict[str, Any] = {key: value for key, value in raw.items() if key not in _STRUCTURE}
    if raw.get("peft_type") is not None:
        if rest := sorted(kept.keys() - _ARGUMENTS):
            notes.append(f"{label} is PEFT's too: {len(rest)} of its keys are left to that adapter, such as {rest[0]}")
        kept = {key: value for key, value in kept.items() if key in _ARGUMENTS}
    if beside := {key: value for key, value in parameters.items() if key not in _PARAMETERS}:
        kept["lora_parameters"] = beside
    for key in list(kept):
        if not is_json(kept[key]):
            notes.append(f"{label}: {key} is {kept.pop(key)!r:.40} and is not kept")
    return kept


def build(adapter: Adapter, keys: Sequence[str], rank: int, scale: float, *, dora: bool) -> dict[str, Any]:
    """The configuration with which mlx-lm makes layers for exactly these modules.

    Whole paths as keys reach every module, `lm_head` too; -1 layers is all of them.
    """
    kept = dict(adapter.metadata.get("mlx") or {})
    parameters = {"dropout": _dropout(adapter), **(kept.pop("lora_parameters", None) or {})}
    base = adapter.bases.get("")
    return {
        **kept,
        **({"model": base.id} if base and base.id else {}),
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": -1,
        "lora_parameters": {**parameters, "keys": list(keys), "rank": rank, "scale": scale},
    }


def _dropout(adapter: Adapter) -> float:
    said = (adapter.metadata.get("peft") or {}).get("lora_dropout")
    return float(said) if _is_number(said) else 0.0
