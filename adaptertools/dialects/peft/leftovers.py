"""What training runs leave in place of an adapter: checkpoints in shards that only their own tools can put together.

    pytorch_model_fsdp_0/__0_0.distcp          FSDP: a checkpoint of torch.distributed, with a pickle as its index
    global_step500/*_model_states.pt           DeepSpeed ZeRO: pickles with objects of its own
    tensors of shape [0]                       DeepSpeed ZeRO-3: parameters that were not gathered
    _flat_param                                FSDP: the parameters of a whole layer as one vector
    unembed_tokens, three-dimensional experts  Tinker: PEFT's names, and a layout of its own
    pissa_init/, pissa_backup/                 LLaMA-Factory: PiSSA factors whose configuration denies it

Source: torch 2.13 distributed/checkpoint/filesystem.py and format_utils.py, deepspeedai/DeepSpeed 00158f6
deepspeed/utils/zero_to_fp32.py, thinking-machines-lab/tinker-cookbook 9dfcc3a tinker_cookbook/weights/_adapter.py,
hiyouga/LLaMA-Factory src/llamafactory/train/callbacks.py
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import chain

from torch import Tensor

from adaptertools.adapter import Base
from adaptertools.containers.source import Source
from adaptertools.dialects.peft.config import PeftConfig
from adaptertools.errors import EmptyFactorError, UnsupportedFeatureError

_SHARDED = re.compile(r".+\.distcp")
_ZERO = re.compile(r"((bf16_|fp16_)?zero_pp_rank_\d+_)?mp_rank_\d+_(model|optim)_states\.pt")
_FLAT_PARAMETER = re.compile(r"(.*\.)?_?flat_param(_\d+)?")
_OPTIMIZER = re.compile(r"optim.*")
_PISSA_FOLDERS = ("pissa_init", "pissa_backup")
_TINKER = re.compile(r"(.*\.)?(unembed_tokens|experts\.(w1|w2|w3|gate_proj|up_proj|down_proj))\.lora_[AB](\..+)?")


def is_unread_checkpoint(source: Source) -> bool:
    """Whether a folder holds a sharded checkpoint, or is one."""
    return next(chain(_holders(source, _SHARDED), _holders(source, _ZERO)), None) is not None


def refuse_unread_checkpoint(source: Source) -> None:
    """Say what makes an adapter of a sharded checkpoint.

    Raises: UnsupportedFeatureError if the folder holds one, or is one
    """
    place = next(_holders(source, _SHARDED), None)
    if place is not None:
        raise UnsupportedFeatureError(
            f"{place}: a sharded checkpoint of torch.distributed, as FSDP saves it. Its index is a pickle, which could "
            "run code, so it is not read. If you trust it, put it together into a torch file: python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {place} OUT/adapter_model.bin, copy "
            "adapter_config.json to OUT, and read that"
        )
    place = next(_holders(source, _ZERO), None)
    if place is not None:
        raise UnsupportedFeatureError(
            f"{place}: a checkpoint of DeepSpeed ZeRO, in shards that only DeepSpeed can load. Put it together with "
            "the script that it saved into the folder above: python zero_to_fp32.py . OUT --safe_serialization "
            "--exclude_frozen_parameters, rename OUT/model.safetensors to adapter_model.safetensors, copy "
            "adapter_config.json to OUT, and read that"
        )


def _holders(source: Source, pattern: re.Pattern[str]) -> Iterator[str]:
    """The folder, and those directly in it, that hold files with such names; an optimizer's count for nothing."""
    if not source.is_folder:
        return
    below = (source.sub(name) for name in source.folders if not _OPTIMIZER.fullmatch(name))
    for place in chain([source], below):
        with suppress(OSError):  # a folder that may not be looked into
            if any(pattern.fullmatch(name) for name in place.file_names):
                yield place.label


def refuse_foreign_tensors(tensors: Mapping[str, Tensor], label: str) -> None:
    """Refuse what no module of PEFT stores, by name.

    Raises: UnsupportedFeatureError
    """
    for key, tensor in tensors.items():
        if _FLAT_PARAMETER.fullmatch(key):
            raise UnsupportedFeatureError(
                f"{label}: {key} is a whole layer as one vector, as FSDP shards it. Save with a full state dict "
                "(fsdp_state_dict_type FULL_STATE_DICT, StateDictType.FULL_STATE_DICT), which has the factors by name"
            )
        if _TINKER.fullmatch(key) and (tensor.ndim == 3 or "unembed_tokens" in key):
            raise UnsupportedFeatureError(
                f"{label}: {key} is Tinker's, whose names and expert stacks are not PEFT's: which weight it changes "
                "depends on the base model. Make a PEFT adapter of the folder with "
                "tinker_cookbook.weights.build_lora_adapter(base_model=…, adapter_path=…, output_path=…) and read that"
            )


def check_gathered(name: str, tensor: Tensor) -> Tensor:
    """The tensor itself.

    Raises: EmptyFactorError for the empty one that DeepSpeed ZeRO-3 leaves of a parameter in shards
    """
    if tensor.numel() == 0:
        raise EmptyFactorError(
            f"{name} has shape {tuple(tensor.shape)}. DeepSpeed ZeRO-3 saves such empty shards when the parameters "
            "were not gathered: save again with zero_to_fp32.py or stage3_gather_16bit_weights_on_model_save"
        )
    return tensor


def settle_base(config: PeftConfig, source: Source) -> Base:
    """The base model as the configuration says, but for folders of LLaMA-Factory whose configuration is not right.

    While it converts a PiSSA adapter it saves the factors before and after training with init_lora_weights true, so
    that PEFT loads them as they are; they belong to the base weights less the principal part all the same.
    """
    folder = "" if source.root is None else source.root.name
    if folder not in _PISSA_FOLDERS or config.base.change is not None:
        return config.base
    config.notes.append(
        f"{config.label}: init_lora_weights denies it, but LLaMA-Factory's {folder} belongs to the base weights that "
        "PiSSA changed; the adapter for the published ones is in pissa_converted"
    )
    return replace(config.base, change="pissa")
