"""Which weights are linear layers: what headers tell, against the modules of every model that transformers builds."""

import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from adaptertools.containers.checkpoint import Checkpoint
from adaptertools.operations.base_layers import BaseLayers, LayerKind

HEADS = (
    (hf.AutoModelForCausalLM, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    (hf.AutoModelForImageTextToText, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    (hf.AutoModelForMaskedLM, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    (hf.AutoModelForSeq2SeqLM, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    (hf.AutoModel, auto.MODEL_MAPPING_NAMES),
)

DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "encoder_layers", "decoder_layers", "depth")

DIFFERENT = {
    "bark": "each of its language models has a head",
    "blt": "the model that cuts text into patches has a head too",
    "clvp": "its language model has a head, which it does not call its own",
    "nemotron_h_omni": "its language model has a head, which it does not call its own",
    "ibert": "quantised while it trains: its linear layers are no nn.Linear",
    "lw_detr": "its default configuration gives linear layers without any weight",
    "phimoe": "the router beside experts that are fused in memory and separate in files",
}


def shortened(config: Any) -> Any:
    """The configuration with four layers at most, in every part."""
    for name in DEPTHS:
        if isinstance(getattr(config, name, None), int) and getattr(config, name) > 4:
            setattr(config, name, 4)
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        if isinstance(getattr(config, name, None), list):
            setattr(config, name, getattr(config, name)[:4])
    for part in list(vars(config).values()):
        if isinstance(part, hf.PretrainedConfig):
            shortened(part)
    return config


def built(model_type: str) -> nn.Module | None:
    """The model without weights; None if its default configuration, or a package that is not there, forbids."""
    for architecture, types in HEADS:
        for change in (shortened, lambda config: config) if model_type in types else ():
            try:
                with torch.device("meta"):
                    return architecture.from_config(change(CONFIG_MAPPING[model_type]()))
            except Exception:
                continue
    return None


def linear_layers(model: nn.Module) -> set[str]:
    """The modules that PEFT's all-linear takes."""
    try:
        head = model.get_output_embeddings()
    except Exception:
        head = None
    return {
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and module is not head
    }


def models() -> Iterator[tuple[str, nn.Module]]:
    for model_type in CONFIG_MAPPING_NAMES:
        model = built(model_type)
        if model is not None:
            yield model_type, model


@pytest.mark.slow
def test_headers_tell_the_linear_layers_of_the_models_of_transformers() -> None:
    logging.disable(logging.CRITICAL)
    found, different = 0, set()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of default configurations, and of what transformers deprecates
            for model_type, model in models():
                shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
                headers = Checkpoint(
                    shapes=shapes,
                    dtypes=dict.fromkeys(shapes, torch.float32),
                    config={**model.config.to_dict(), "model_type": model_type},
                    label=model_type,
                )
                told = {layer.name for layer in BaseLayers(headers).layers if layer.kind is LayerKind.LINEAR}
                stored = {name for name in linear_layers(model) if f"{name}.weight" in shapes}
                found += 1
                if told != stored:
                    different.add(model_type)
    finally:
        logging.disable(logging.NOTSET)
    assert found > 500
    assert different <= DIFFERENT.keys()
