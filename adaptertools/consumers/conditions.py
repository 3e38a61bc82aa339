"""What rules ask of a file. Each gives the names of what breaks the rule: none where it is kept."""

import re
from collections import Counter
from collections.abc import Sequence

from adaptertools.adapter import Feature, LoraModule, WeightRole
from adaptertools.consumers.layers import absent, is_of_language_model, place
from adaptertools.consumers.rule import Condition, Layers
from adaptertools.consumers.subject import Subject
from adaptertools.module import Kind, ScaleRule, Target
from adaptertools.names import leaf, parent

_CONFIG = "adapter_config.json"
_ATTENTION = re.compile(r"[._]to_(q|k|v|out[._]0)$")


def holds(*features: Feature) -> Condition:
    """The adapter holds one of these features."""
    return lambda subject: [name for feature in features for name in subject.adapter.holders(feature)]


def changed_base(*harmless: str) -> Condition:
    """It belongs to base weights that an initialisation changed, other than by these."""

    def condition(subject: Subject) -> list[str]:
        changes = [base.change for base in subject.adapter.bases.values() if base.change]
        return [f"init_lora_weights {change!r}" for change in changes if not change.lower().startswith(harmless or "-")]

    return condition


def changed_base_only(*which: str) -> Condition:
    """It belongs to base weights that one of these initialisations changed."""

    def condition(subject: Subject) -> list[str]:
        changes = [base.change for base in subject.adapter.bases.values() if base.change]
        return [f"init_lora_weights {change!r}" for change in changes if change.lower().startswith(which)]

    return condition


def rank_over_cap(subject: Subject) -> list[str]:
    """A rank above the one that the consumer was started with."""
    cap = subject.cap
    if cap is None:
        return []
    return [f"{m.target} has rank {m.nominal_rank} > {cap}" for m in _by_rank(subject) if m.nominal_rank > cap]


def rank_over(limit: int) -> Condition:
    """A rank above a fixed one."""
    return lambda subject: [
        f"{m.target} has rank {m.nominal_rank} > {limit}" for m in _by_rank(subject) if m.nominal_rank > limit
    ]


def rank_padded(least: int, multiple: int) -> Condition:
    """A rank that the consumer pads: neither the least one nor a multiple."""
    return lambda subject: [
        f"{m.target} has rank {m.nominal_rank}, neither {least} nor a multiple of {multiple}"
        for m in _by_rank(subject)
        if m.nominal_rank != least and m.nominal_rank % multiple
    ]


def mixed_ranks(subject: Subject) -> list[str]:
    """Modules of another rank than most."""
    ranks = Counter(module.nominal_rank for module in subject.adapter.modules)
    usual = max(ranks, key=lambda rank: (ranks[rank], rank), default=0)
    return [_ranked(module, usual) for module in subject.adapter.modules if module.nominal_rank != usual]


def mixed_ranks_in_layer_type(subject: Subject) -> list[str]:
    """Modules whose rank is not that of the module of the same name in the layers before."""
    first: dict[str, int] = {}
    found = []
    for module in subject.adapter.modules:
        rank = first.setdefault(re.sub(r"\d+", "N", str(module.target)), module.nominal_rank)
        if module.nominal_rank != rank:
            found.append(_ranked(module, rank))
    return found


def ranks_unlike_r(subject: Subject) -> list[str]:
    """Modules whose rank is not the r of the configuration, as rank_pattern allows."""
    r = subject.config.get("r")
    if type(r) is not int:
        return []
    return [_ranked(module, r) for module in subject.adapter.modules if module.nominal_rank != r]


def alphas_unlike_lora_alpha(subject: Subject) -> list[str]:
    """Modules whose alpha is not the lora_alpha of the configuration, as alpha_pattern allows."""
    alpha = subject.config.get("lora_alpha")
    if not isinstance(alpha, int | float):
        return []
    return [f"{m.target} has alpha {m.alpha:g}, not {alpha:g}" for m in subject.adapter.modules if m.alpha != alpha]


def rslora(subject: Subject) -> list[str]:
    """Modules whose scaling is alpha/√r in a file that says so, where that is another number than alpha/r."""
    if not subject.config.get("use_rslora"):
        return []
    return [
        f"{m.target} is scaled by {m.scaling:g}, not {m.alpha / m.nominal_rank:g}"
        for m in subject.adapter.modules
        if m.scale_rule is ScaleRule.ALPHA_OVER_SQRT_RANK and m.nominal_rank != 1
    ]


def heads_but(*allowed: str) -> Condition:
    """Whole trained weights other than those of modules with these names."""

    def condition(subject: Subject) -> list[str]:
        trained = _whole(subject, WeightRole.MODULE)
        return [name for name in trained if leaf(parent(name)) not in allowed]

    return condition


def travelling_weights(subject: Subject) -> list[str]:
    """Whole weights that are stored untrained, so that they travel along."""
    return _whole(subject, WeightRole.BASE)


def embeddings_but(*allowed: str) -> Condition:
    """Factors of embeddings other than these."""
    return lambda subject: [
        str(m.target)
        for m in subject.adapter.modules
        if m.kind is Kind.EMBEDDING and leaf(m.target.parameter) not in allowed
    ]


def modules_but(*allowed: str) -> Condition:
    """Modules whose name ends otherwise than in these."""
    return lambda subject: [str(m.target) for m in subject.adapter.modules if leaf(m.target.parameter) not in allowed]


def modules_named(*names: str) -> Condition:
    """Modules whose name ends in these."""
    return lambda subject: [str(m.target) for m in subject.adapter.modules if leaf(m.target.parameter) in names]


def tied_modules(subject: Subject) -> list[str]:
    """Factors of the input embedding or the output head of a model in which the two are one."""
    ends = ("embed_tokens", "lm_head")
    return [str(m.target) for m in subject.adapter.modules if subject.tied and leaf(m.target.parameter) in ends]


def missing_layers(layers: Layers) -> Condition:
    """Modules that the consumer wants beside those that are there."""
    return lambda subject: [
        target.parameter for target in absent(subject.adapter.modules, layers, num_layers=subject.num_layers)
    ]


def unmatched(subject: Subject) -> Sequence[str] | None:
    """Modules whose name the base model does not have."""
    return subject.unmatched


def misshapen(subject: Subject) -> Sequence[str] | None:
    """Modules that the base model has in another size."""
    return subject.misshapen


UNTOLD_FAMILY = "whether this release supports LoRA for this model family is not among the rules"


def untold(subject: Subject) -> None:
    """What no file tells."""


def opaque(subject: Subject) -> list[str]:
    """Names that could not be turned back into module paths."""
    return [str(module.target) for module in subject.adapter.modules if module.target.opaque]


def opaque_unless(own: str) -> Condition:
    """Names that could not be turned back into module paths, where they are not the consumer's own."""
    return lambda subject: [] if subject.format == own else opaque(subject)


def names_of_language_model(subject: Subject) -> list[str]:
    """Modules whose names are recognisably those of a language model."""
    return [str(m.target) for m in subject.adapter.modules if is_of_language_model(m.target)]


def names_of_gpt2(subject: Subject) -> list[str]:
    """Names that the GPT-2 of Transformers has, which may be those of another model if its type is known.

    Those in the file count, where there is one. With a base model at hand, the writer may yet give them other names.
    """
    if subject.model_type not in (None, "gpt2") or (subject.unmatched is not None and not subject.files):
        return []
    names = subject.keys or [m.target.parameter for m in subject.adapter.modules]
    return sorted(name for name in names if name.startswith("transformer.h."))


def files_but(*names: str) -> Condition:
    """None of the files has a name that the consumer looks for."""

    def condition(subject: Subject) -> list[str]:
        if not subject.files or set(names) & set(subject.files):
            return []
        return [f"there is no {' and no '.join(names)} among {', '.join(subject.files[:3])}"]

    return condition


def fields_missing(*names: str) -> Condition:
    """The configuration lacks a field that the consumer cannot do without."""
    return lambda subject: [f"no {name} in {_CONFIG}" for name in names if subject.files and name not in subject.config]


def field_set(*names: str) -> Condition:
    """The configuration sets a field that the consumer does not take."""
    return lambda subject: [f"{name} is set" for name in names if subject.config.get(name)]


def bias_trained(subject: Subject) -> list[str]:
    """Biases of base layers were trained, or the configuration says so."""
    stated = subject.config.get("bias", "none")
    found = subject.adapter.holders(Feature.BIAS)
    return found or ([f"bias is {stated!r}"] if stated not in ("none", None) else [])


def target_modules_as_text(*allowed: str) -> Condition:
    """target_modules is one regular expression, not a list."""

    def condition(subject: Subject) -> list[str]:
        stated = subject.config.get("target_modules")
        return [f"target_modules is {stated!r:.60}"] if isinstance(stated, str) and stated not in allowed else []

    return condition


def alpha_as_float(subject: Subject) -> list[str]:
    """lora_alpha is written with a decimal point, or below 0."""
    alpha = subject.config.get("lora_alpha")
    return [f"lora_alpha is {alpha!r}"] if isinstance(alpha, float) or (alpha is not None and alpha < 0) else []


def model_type_but(*allowed: str) -> Condition:
    """The base model is of another type."""

    def condition(subject: Subject) -> list[str] | None:
        if subject.model_type is None:
            return None
        return [] if subject.model_type in allowed else [f"the base model is of type {subject.model_type}"]

    return condition


def without_alpha_key(subject: Subject) -> list[str]:
    """Modules without an alpha of their own in a file where others have one."""
    prefixes = {key.rpartition(".lora_down")[0] for key in subject.keys if key.endswith(".lora_down.weight")}
    stated = {key.removesuffix(".alpha") for key in subject.keys if key.endswith(".alpha")}
    return sorted(f"{prefix} has no .alpha" for prefix in prefixes - stated) if stated else []


def attention_of_other_alpha(subject: Subject) -> list[str]:
    """Modules of attention whose alpha is not that of most modules."""
    alphas = Counter(module.alpha for module in subject.adapter.modules)
    usual = max(alphas, key=lambda alpha: alphas[alpha], default=0.0)
    others = [module for module in subject.adapter.modules if module.alpha != usual]
    return [f"{m.target} has alpha {m.alpha:g}, not {usual:g}" for m in others if _ATTENTION.search(str(m.target))]


def scaling_beside_keys(subject: Subject) -> list[str]:
    """Scalings that stand in metadata alone, where the consumer looks for .alpha."""
    if not subject.keys or any(key.endswith(".alpha") for key in subject.keys):
        return []
    return [f"{m.target} is scaled by {m.scaling:g}" for m in subject.adapter.modules if m.scaling != 1.0]


def scaling_of_mlx(subject: Subject) -> list[str]:
    """Modules whose scaling is not the alpha / rank that lora_parameters states, which is 0 where it states none."""
    stated = subject.config.get("lora_parameters")
    alpha = stated.get("alpha", 0.0) if isinstance(stated, dict) else 0.0
    scaled = [(m, alpha / m.nominal_rank if alpha else 1.0) for m in subject.adapter.modules]
    return [f"{m.target} is scaled by {m.scaling:g}, not {found:g}" for m, found in scaled if m.scaling != found]


def field_missing_in(section: str, *names: str) -> Condition:
    """A section of the configuration lacks a field that the consumer cannot do without."""

    def condition(subject: Subject) -> list[str]:
        stated = subject.config.get(section)
        held = stated if isinstance(stated, dict) else {}
        return [f"no {section}.{name} in {_CONFIG}" for name in names if subject.files and name not in held]

    return condition


def mlx_left_out(subject: Subject) -> list[str]:
    """Modules of an MLX file for which `keys` and `num_layers` of its configuration make none.

    Keys are whole paths, or paths within a layer, of the last `num_layers` alone; without keys every module within is
    meant. Where the model's layers are not known, the layers are taken to be the last ones.
    """
    stated, count = subject.config.get("lora_parameters"), subject.config.get("num_layers")
    if not isinstance(stated, dict) or type(count) is not int:
        return []
    keys = stated.get("keys")
    first = (subject.num_layers or 0) - count if count > 0 else 0

    def made(target: Target) -> bool:
        found = place(target)
        within = found is not None and found.layer >= first and (keys is None or found.name.lstrip(".") in keys)
        return within or (keys is not None and target.parameter in keys)

    stored = [Target(parameter=key.removesuffix(".lora_a")) for key in sorted(subject.keys) if key.endswith(".lora_a")]
    targets = stored or [module.target for module in subject.adapter.modules]
    return [str(target) for target in targets if not made(target)]


def mlx_rank(subject: Subject) -> list[str]:
    """Modules of a higher rank than the configuration of an MLX file says; lower ones are filled up with zeros."""
    stated = subject.config.get("lora_parameters")
    rank = stated.get("rank") if isinstance(stated, dict) else None
    if type(rank) is not int:
        return []
    return [_ranked(module, rank) for module in subject.adapter.modules if module.nominal_rank > rank]


def _by_rank(subject: Subject) -> list[LoraModule]:
    return sorted(subject.adapter.modules, key=lambda module: -module.nominal_rank)


def _ranked(module: LoraModule, usual: int) -> str:
    return f"{module.target} has rank {module.nominal_rank}, not {usual}"


def _whole(subject: Subject, role: WeightRole) -> list[str]:
    return [name for name, weight in subject.adapter.full_weights.items() if weight.role is role]
