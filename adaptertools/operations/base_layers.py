"""What the weights of a base model are to LoRA, told by its headers: linear layers, heads, embeddings, experts.

A header says name and shape. Which sort of layer a matrix belongs to is told by how models name their layers, by the
bias beside it, and by the configuration. Of the 563 models that transformers 5.23 builds from default configurations
these rules tell the linear layers of 556 as the modules themselves do; the rest are named in tests/test_base_layers.py.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from adaptertools.containers.checkpoint import Checkpoint
from adaptertools.names import leaf, parent
from adaptertools.operations.base_shapes import true_shapes

_NAMED_EMBEDDING = re.compile(
    r"(^|_)(embed|embeds|emb|embedding|embeddings|embedder)(_|$)|embedder_\d|_(table|tokens?|feat|features)$"
    r"|^(w|wte|wpe|shared|codebook|relative_attention_bias|reference_points|pe_k|bias_values)$",
    re.IGNORECASE,
)
_NAMED_LINEAR = re.compile(r"proj|dense|transform|mapping|linear|patch_embed|embed_out", re.IGNORECASE)
"""Linear layers with an embedding in their name: embeddings_project, embedding_hidden_mapping_in, patch_embedding …"""

_HEAD = re.compile(
    r"(^|\.)(lm_head|embed_out|vocab_projector|generator_lm_head|lm_loss)$"
    r"|(^|\.)(lm_head|predictions|head)\.decoder$|^(lm_head\.out_proj|pred_layer\.proj)$"
)
_HEAD_BY_SIZE = ("decoder", "head", "output", "output_projection", "proj_out")
"""Output heads whose names say less: they are heads where they have a row for each token."""

_CLASSIFIERS = frozenset({"score", "classifier"})
"""What PEFT trains whole for sequence classification."""

_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""Ends of the names of architectures whose output head is called lm_head."""

_LINEAR_ROUTERS = ("llama4", "llama4_text", "jetmoe")
"""Models of transformers whose routers are linear layers though their experts are fused."""

_EXPERT = re.compile(r"(.*)\.experts\.\d+\.")


class LayerKind(StrEnum):
    """What sort of layer a weight belongs to."""

    LINEAR = "linear"
    HEAD = "head"
    """the linear layer that gives a language model's output"""
    CLASSIFIER = "classifier"
    """the head of a model for sequence classification"""
    EMBEDDING = "embedding"
    CONV = "conv"
    PARAMETER = "parameter"
    """a bare `nn.Parameter`: two-dimensional, or a stack of experts"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One weight that LoRA can adapt. `name` is that of the module; of a bare parameter, its own in full."""

    name: str
    kind: LayerKind
    shape: tuple[int, ...]

    @property
    def width(self) -> int:
        """The parameters that each rank takes: in + out; of a stack, in every expert."""
        if self.kind is LayerKind.PARAMETER:
            return math.prod(self.shape[:-2]) * sum(self.shape[-2:])
        return self.shape[0] + math.prod(self.shape[1:])

    @property
    def full_rank(self) -> int:
        """The rank beyond which nothing is gained."""
        rows, columns = self.shape[-2:] if self.kind is LayerKind.PARAMETER else self.shape[:2]
        return min(rows, columns if self.kind is LayerKind.PARAMETER else math.prod(self.shape[1:]))

    @property
    def label(self) -> str:
        """The last part of the name, and the one before where that says too little: `mlp.0`, `experts.down_proj`."""
        parts = self.name.split(".")
        length = 2 if self.kind is LayerKind.PARAMETER or parts[-1].isdigit() else 1
        return ".".join(parts[-length:])

    @property
    def is_expert(self) -> bool:
        """Whether it is one expert's own linear layer."""
        return _EXPERT.match(self.name) is not None


class BaseLayers:
    """The layers of a base model by its headers.

    `shapes` has every parameter, `layers` those that LoRA can adapt, `ignored` those for predicting several tokens at
    once, which are in the file and which transformers does not load.

    Raises: UnsupportedFeatureError if the headers do not state the shapes, or if it is an adapter
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._config = checkpoint.config
        text = self._config.get("text_config")
        self._text: Mapping[str, Any] = text if isinstance(text, Mapping) else self._config
        found = dict(true_shapes(checkpoint))
        self.ignored = [name for name in found if self._is_ignored(name)]
        self.shapes = {name: shape for name, shape in found.items() if not self._is_ignored(name)}
        sizes = [part.get("vocab_size") for part in (self._config, self._text)]
        self._vocabularies = {size for size in sizes if isinstance(size, int)}
        single = {match[1] for name in self.shapes if (match := _EXPERT.match(name))}
        stacks = {_home(name) for name, shape in self.shapes.items() if _is_stack(name, shape)}
        self._fused_experts = stacks - single
        self.layers = [layer for name, shape in self.shapes.items() if (layer := self._layer(name, shape)) is not None]
        self._shared = set(checkpoint.shared)

    @property
    def parameters(self) -> int:
        """The parameters of the model, tied weights counted once."""
        twice = self._shared | set(self._tied_heads())
        return sum(math.prod(shape) for name, shape in self.shapes.items() if name not in twice)

    @property
    def classifier_parameters(self) -> int:
        """Those of the head of a model for sequence classification; 0 for other models."""
        return sum(math.prod(shape) for name, shape in self.shapes.items() if self._is_classifier(name))

    @property
    def tied_head(self) -> Layer | None:
        """The output head of a language model that is its input embedding, where the file does not repeat it.

        It is called `lm_head` in the models that have one by this rule. Where the configuration does not say
        `tie_word_embeddings`, it is true by default.
        """
        untied = any(part.get("tie_word_embeddings") is False for part in (self._config, self._text))
        if untied or not self._is_language_model or any(layer.kind is LayerKind.HEAD for layer in self.layers):
            return None
        embeddings = [layer for layer in self.layers if layer.kind is LayerKind.EMBEDDING]
        shapes = {layer.shape for layer in embeddings if layer.shape[0] in self._vocabularies}
        return Layer(name="lm_head", kind=LayerKind.HEAD, shape=shapes.pop()) if len(shapes) == 1 else None

    def _tied_heads(self) -> list[str]:
        """Heads that are stored and yet are the embedding, as the configuration says."""
        if not any(part.get("tie_word_embeddings") is True for part in (self._config, self._text)):
            return []
        embeddings = {layer.shape for layer in self.layers if layer.kind is LayerKind.EMBEDDING}
        heads = [layer for layer in self.layers if layer.kind is LayerKind.HEAD and layer.shape in embeddings]
        return [f"{layer.name}.weight" for layer in heads]

    def _is_ignored(self, name: str) -> bool:
        if name.startswith("mtp."):
            return True
        depth = self._text.get("num_hidden_layers")
        match = re.match(r"(?:model\.)?(?:language_model\.)?layers\.(\d+)\.", name)
        extra = self._text.get("num_nextn_predict_layers")
        return bool(extra and match and isinstance(depth, int) and int(match[1]) >= depth)

    def _layer(self, name: str, shape: tuple[int, ...]) -> Layer | None:
        if len(shape) < 2 or 0 in shape:
            return None
        module = parent(name)
        if leaf(name) != "weight" or not module or _is_stack(name, shape) or self._is_parameter_router(module):
            return Layer(name=name, kind=LayerKind.PARAMETER, shape=shape) if len(shape) <= 3 else None
        return Layer(name=module, kind=self._kind(module, shape), shape=shape)

    def _kind(self, module: str, shape: tuple[int, ...]) -> LayerKind:
        if len(shape) > 2:
            return LayerKind.CONV
        said = next((part for part in reversed(module.split(".")) if not part.isdigit()), module)
        is_linear = f"{module}.bias" in self.shapes or _NAMED_LINEAR.search(said) or not _NAMED_EMBEDDING.search(said)
        if not is_linear:
            return LayerKind.EMBEDDING
        if _HEAD.search(module) or (module in _HEAD_BY_SIZE and shape[0] in self._vocabularies):
            return LayerKind.HEAD
        return LayerKind.CLASSIFIER if self._is_classifier(module) else LayerKind.LINEAR

    def _is_classifier(self, name: str) -> bool:
        classifies = any(name.endswith("ForSequenceClassification") for name in self._architectures)
        return classifies and not _CLASSIFIERS.isdisjoint(name.split("."))

    def _is_parameter_router(self, module: str) -> bool:
        """Whether it is a router beside fused experts: those are bare parameters in all models but a few."""
        home = module.removesuffix(".layer")
        is_router = leaf(home) == "router" or (leaf(home) == "gate" and home == module)
        return is_router and parent(home) in self._fused_experts and self._model_type not in _LINEAR_ROUTERS

    @property
    def _is_language_model(self) -> bool:
        return any(name.endswith(_LANGUAGE_MODELS) for name in self._architectures)

    @property
    def _architectures(self) -> list[str]:
        stated = self._config.get("architectures")
        return [str(name) for name in stated] if isinstance(stated, list) else []

    @property
    def _model_type(self) -> object:
        return self._text.get("model_type")


def _is_stack(name: str, shape: tuple[int, ...]) -> bool:
    """Whether it is a stack of experts, which may be called `weight` like a convolution's."""
    if len(shape) != 3:
        return False
    return leaf(name) != "weight" or leaf(parent(name)).endswith("linear") or "experts" in name.split(".")


def _home(stack: str) -> str:
    """The module that has the experts: `mlp` of `mlp.experts.down_proj`, and of `mlp.input_linear.weight`."""
    home, found, _ = stack.rpartition(".experts.")
    return home if found else parent(parent(stack))
