"""What `check` says and `fix` writes, with the consumers themselves as the judge: mlx-lm and diffusers."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers_models import adapter_for, clip, fused_by_pipeline, our_deltas, pipeline, unet, weights
from safetensors.torch import load_file, save_file
from test_mlx_consumer import LLAMA, adapted, llama, logits

import adaptertools
from adaptertools.adapter import Adapter

pytestmark = [
    pytest.mark.consumers,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of diffusers' own imports
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning:(diffusers|peft|transformers|torch).*"),
]

UNEVEN = {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 1}}


@pytest.fixture
def mlx_folder(tmp_path: Path) -> Path:
    """An adapter of every linear layer of a tiny llama, for mlx-lm."""
    adapted(llama(), tmp_path / "peft", target_modules=LLAMA)
    adaptertools.convert(tmp_path / "peft", tmp_path / "mlx", to="mlx")
    return tmp_path / "mlx"


def test_mlx_lm_gives_pefts_logits_with_the_fixed_file(tmp_path: Path) -> None:
    import mlx_oracle

    wanted = logits(adapted(llama(), tmp_path / "peft", target_modules=LLAMA, **UNEVEN))
    assert not adaptertools.check(tmp_path / "peft", "mlx").passes
    adaptertools.fix(tmp_path / "peft", tmp_path / "fixed", "mlx")
    model = mlx_oracle.mlx_model(llama(), tmp_path / "base")
    assert np.abs(mlx_oracle.logits(model) - wanted).max() > 0.1
    assert np.abs(mlx_oracle.logits(mlx_oracle.with_adapter(model, tmp_path / "fixed")) - wanted).max() < 1e-5


def drop(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.pop(name)


def set_parameter(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["lora_parameters"].update({name: value})


BROKEN_FOR_MLX = {
    "number of layers": drop("num_layers"),
    "configuration": lambda config: config["lora_parameters"].pop("dropout"),
    "keys": set_parameter("keys", ["self_attn.q_proj"]),
    "stated rank": set_parameter("rank", 2),
}


@pytest.mark.parametrize("rule", BROKEN_FOR_MLX)
def test_mlx_lm_refuses_what_check_says_that_it_refuses(rule: str, mlx_folder: Path, tmp_path: Path) -> None:
    import mlx_oracle

    mlx_oracle.with_adapter(mlx_oracle.mlx_model(llama(), tmp_path / "base"), mlx_folder)
    assert adaptertools.check(mlx_folder, "mlx").passes
    config = json.loads((mlx_folder / "adapter_config.json").read_text())
    BROKEN_FOR_MLX[rule](config)
    (mlx_folder / "adapter_config.json").write_text(json.dumps(config))
    assert [finding.rule for finding in adaptertools.check(mlx_folder, "mlx").broken] == [rule]
    with pytest.raises((AttributeError, KeyError, ValueError)):
        mlx_oracle.with_adapter(mlx_oracle.mlx_model(llama(), tmp_path / "again"), mlx_folder)


def test_mlx_lm_loads_layers_that_num_layers_reaches_and_no_others(mlx_folder: Path, tmp_path: Path) -> None:
    import mlx_oracle

    config = json.loads((mlx_folder / "adapter_config.json").read_text())
    config["lora_parameters"]["keys"] = [f"{part}.{name}" for part in ("self_attn", "mlp") for name in LLAMA]
    for count, passes in ((2, True), (1, False)):
        (mlx_folder / "adapter_config.json").write_text(json.dumps({**config, "num_layers": count}))
        model = mlx_oracle.mlx_model(llama(), tmp_path / "base")
        assert adaptertools.check(mlx_folder, "mlx", base=tmp_path / "base").passes is passes
        if passes:
            mlx_oracle.with_adapter(model, mlx_folder)
        else:
            with pytest.raises(ValueError, match="not an adapter parameter"):
                mlx_oracle.with_adapter(model, mlx_folder)


@pytest.fixture
def stable_diffusion() -> Any:
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    return pipeline(StableDiffusionLoraLoaderMixin, unet=unet(), text_encoder=clip())


def attention(**how: Any) -> Adapter:
    model = unet()
    modules = adapter_for(model, "unet", lambda name: name.endswith((".to_q", ".to_k", ".to_v")), **how)
    return Adapter(modules=tuple(modules))


def is_fused_as_meant(made: Any, path: Path, adapter: Adapter) -> bool:
    base = weights(made.unet)
    found, expected = fused_by_pipeline(made, path)["unet"], our_deltas(adapter, "unet", base)
    return found.keys() == expected.keys() and all(
        torch.allclose(found[name], delta, rtol=1e-5, atol=1e-6) for name, delta in expected.items()
    )


def test_diffusers_scales_wrongly_what_check_says_that_it_does_and_rightly_what_is_fixed(
    stable_diffusion: Any, tmp_path: Path
) -> None:
    """One alpha of a kohya file is missing: it means the rank, and is given what most others are."""
    path = tmp_path / "kohya.safetensors"
    adaptertools.write(attention(rank=2, alpha=6.0), path, format="kohya")
    tensors = load_file(path)
    del tensors[next(key for key in tensors if key.endswith(".alpha"))]
    save_file(tensors, path)
    meant = adaptertools.read(path, base=saved_unet(tmp_path))
    broken = [finding.rule for finding in adaptertools.check(path, "diffusers").broken]
    assert broken == [".alpha for every module", "alphas of attention"]
    assert not is_fused_as_meant(stable_diffusion, path, meant)
    adaptertools.fix(path, tmp_path / "fixed.safetensors", "diffusers")
    assert is_fused_as_meant(fresh(), tmp_path / "fixed.safetensors", meant)


def test_diffusers_leaves_out_the_magnitudes_that_check_says_are_left_out(
    stable_diffusion: Any, tmp_path: Path
) -> None:
    path = tmp_path / "kohya.safetensors"
    adapter = attention(rank=2, alpha=6.0, magnitude=True)
    adaptertools.write(adapter, path, format="kohya")
    assert [finding.rule for finding in adaptertools.check(path, "diffusers").broken] == ["DoRA of kohya"]
    assert not is_fused_as_meant(stable_diffusion, path, adapter)
    plain = adapter.map_modules(lambda module: replace(module, magnitude=None))
    assert is_fused_as_meant(fresh(), path, plain)


def saved_unet(tmp_path: Path) -> Path:
    unet().save_pretrained(tmp_path / "pipeline" / "unet")  # type: ignore[operator]
    return tmp_path / "pipeline"


def fresh() -> Any:
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    return pipeline(StableDiffusionLoraLoaderMixin, unet=unet(), text_encoder=clip())
