"""Key grammar of diffusers: three ways of writing a factor, each behind the name of the model that it belongs to.

[<component>.]<module path>.<leaf>

    .lora_A.weight, .lora_B.weight, .lora_B.bias, .lora_magnitude_vector                     since 0.22, as in PEFT
    .lora.down.weight, .lora.up.weight, .lora_linear_layer.down.weight …                     0.18 to 0.30
    .processor.to_q_lora.down.weight, …up.weight (to_k, to_v, to_out, add_k_proj, add_v_proj)  up to 0.21
    .alpha                                                                                   with any of them

Attention processors name their projections by role: to_out is the layer to_out.0, and in a text encoder to_q is q_proj.

Read in huggingface/diffusers 58eb52c: `utils/state_dict_utils.py`, `loaders/lora_base.py`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from adaptertools.dialects.peft.keys import MAGNITUDE, Group
from adaptertools.errors import DuplicateTargetError, UnclaimedTensorError

DIFFUSION_MODEL = "diffusion_model"
"""The prefix of AI-toolkit and ComfyUI, behind which names may be those of the model as it was published."""

COMPONENT = re.compile(r"unet|transformer(_\d+|_ref)?|text_encoder(_\d+)?|controlnet|prior|connectors|diffusion_model")
"""The models of a pipeline that diffusers loads adapters into."""

_LEAVES: tuple[tuple[re.Pattern[str], dict[str, str]], ...] = (
    (re.compile(r"(?P<path>.+)\.(?P<leaf>lora_[AB])(\.default)?\.weight"), {}),
    (re.compile(r"(?P<path>.+)\.(lora_B(\.default)?|lora(_linear_layer)?\.up)\.(?P<leaf>bias)"), {"bias": "lora_bias"}),
    (re.compile(rf"(?P<path>.+)\.(?P<leaf>{MAGNITUDE})(\.default)?(\.weight)?"), {}),
    (
        re.compile(r"(?P<path>.+)\.lora(_linear_layer)?\.(?P<leaf>down|up)\.weight"),
        {"down": "lora_A", "up": "lora_B"},
    ),
)
_PROCESSOR = re.compile(
    r"(?P<path>.+)\.(?P<role>to_q|to_k|to_v|to_out|add_k_proj|add_v_proj)_lora\.(?P<leaf>down|up)\.weight"
)
_ALPHA = re.compile(r"(?P<path>.+?)(\.lora(_linear_layer|_[AB])?|(?P<role>\.to_[a-z]+)_lora)?(\.down\.weight)?\.alpha")
_IN_TEXT_ENCODERS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass(frozen=True, slots=True)
class Key:
    """What one key says. `component` is None where none is named; `leaf` is `lora_A`, `lora_B`, `alpha` …"""

    component: str | None
    path: str
    leaf: str
    processor: bool = False


@dataclass(slots=True)
class Contents:
    """The tensors of one component by module, and the alphas that stand beside them."""

    groups: dict[str, Group] = field(default_factory=dict)
    alphas: dict[str, Tensor] = field(default_factory=dict)


def parse_key(key: str, *, prefixed: bool = True) -> Key | None:
    """A key in its parts, None if diffusers writes no such key.

    >>> parse_key("unet.mid_block.attentions.0.to_q.lora.up.weight")
    Key(component='unet', path='mid_block.attentions.0.to_q', leaf='lora_B', processor=False)
    """
    first, _, rest = key.partition(".")
    component = first if prefixed and rest and COMPONENT.fullmatch(first) else None
    name = rest if component else key
    if found := _PROCESSOR.fullmatch(name):
        leaf = {"down": "lora_A", "up": "lora_B"}[found["leaf"]]
        return Key(component, _path(found["path"], found["role"], component), leaf, processor=True)
    for pattern, leaves in _LEAVES:
        if found := pattern.fullmatch(name):
            said = str(found["leaf"])
            return Key(component, _path(found["path"]), leaves.get(said, said))
    if found := _ALPHA.fullmatch(name):
        role = (found["role"] or "").removeprefix(".")
        return Key(component, _path(found["path"], role, component), "alpha", processor=bool(role))
    return None


def is_factor(key: Key | None) -> bool:
    """Whether a key is that of a factor, which no file of the format lacks."""
    return key is not None and key.leaf in ("lora_A", "lora_B")


def sort_keys(
    tensors: Mapping[str, Tensor], label: str, *, prefixed: bool, component: str | None
) -> dict[str, Contents]:
    """The tensors of a file by component and module; those of no component are `component`'s.

    Attention processors without a component are those of the unet, the only model that was saved so.

    Raises: UnclaimedTensorError for a key that is none of diffusers'; DuplicateTargetError for two that say the same
    """
    found: dict[str, Contents] = {}
    for key, tensor in tensors.items():
        parsed = parse_key(key, prefixed=prefixed)
        if parsed is None:
            raise UnclaimedTensorError(
                f"{label}: {key} is no key that diffusers writes for LoRA: expected a module path and lora_A.weight, "
                "lora_B.weight, lora_B.bias, lora_magnitude_vector or alpha, or one of their older spellings"
            )
        home = parsed.component or component or ("unet" if parsed.processor else "")
        contents = found.setdefault(home, Contents())
        if parsed.leaf == "alpha":
            _put(contents.alphas, parsed.path, tensor, key, label)
        else:
            _put(contents.groups.setdefault(parsed.path, Group(parsed.path)).tensors, parsed.leaf, tensor, key, label)
    for home, contents in found.items():
        stray = sorted(contents.alphas.keys() - contents.groups.keys())
        if stray:
            raise UnclaimedTensorError(f"{label}: the alpha of {home or 'the model'}'s {stray[0]} has no factors")
    return found


def _path(path: str, role: str = "", component: str | None = None) -> str:
    """A module's path, with the role of an attention processor turned into the layer that plays it."""
    path = path.removesuffix(".processor").replace(".processor.", ".")
    if not role:
        return path
    if component is not None and component.startswith("text_encoder"):
        return f"{path}.{_IN_TEXT_ENCODERS.get(role, role)}"
    return f"{path}.to_out.0" if role == "to_out" else f"{path}.{role}"


def _put(home: dict[str, Tensor], name: str, tensor: Tensor, key: str, label: str) -> None:
    if name in home:
        raise DuplicateTargetError(f"{label}: {key} stands for what another key of the file says already")
    home[name] = tensor
