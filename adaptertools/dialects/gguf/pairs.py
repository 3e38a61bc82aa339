"""The tensors of a GGUF adapter as pairs of factors: every one is claimed, or an error that names it."""

from collections.abc import Mapping

from torch import Tensor

from adaptertools.errors import UnclaimedTensorError, UnpairedFactorError, UnsupportedFeatureError

LORA_A, LORA_B = ".lora_a", ".lora_b"
WEIGHT = ".weight"
_NORM = "_norm.weight"


def pair(label: str, names: Mapping[str, Tensor], *, ignore_norms: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """The two factors of each adapted tensor, by its name without `.weight`.

    Raises: UnpairedFactorError, UnclaimedTensorError; UnsupportedFeatureError for stacks of experts
    """
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name in names:
        if name.endswith(_NORM) and ignore_norms:
            continue
        tensor, dot, factor = name.rpartition(".")
        if f"{dot}{factor}" not in (LORA_A, LORA_B) or not tensor.endswith(WEIGHT):
            raise UnclaimedTensorError(f"{label}: tensor {name} is no factor of a pair{_norm_advice(name)}")
        other = tensor + {LORA_A: LORA_B, LORA_B: LORA_A}[dot + factor]
        if other not in names:
            raise UnpairedFactorError(f"{label}: {name} stands without {other}")
        pairs[tensor.removesuffix(WEIGHT)] = names[tensor + LORA_A], names[tensor + LORA_B]
    for tensor, (lora_a, lora_b) in pairs.items():
        if lora_a.ndim == 3 or lora_b.ndim == 3:
            raise UnsupportedFeatureError(f"{label}: {tensor}.weight is a stack of experts, which is not read")
    return pairs


def _norm_advice(name: str) -> str:
    if not name.endswith(_NORM):
        return f", expected names that end in {WEIGHT}{LORA_A} and {WEIGHT}{LORA_B}"
    return (
        ": a norm that was trained along. llama.cpp ignores it without a word; ignore_norms=true (--in "
        "ignore_norms=true) leaves it out"
    )
