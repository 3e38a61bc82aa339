"""Real PEFT, transformers and loralib as judges of a merge, from files to files; float64 as judge of every rounding."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import loralib
import pytest
import torch
from merge_cases import share_correct
from merged_models import load_model, merge, read_adapter, save_adapter, save_base, save_model, weights_in
from peft import LoraConfig, PeftModel, get_peft_model
from peft_cases import CASES, quiet, run
from safetensors.torch import save_file
from test_loralib_oracle import IDS, SLOTS, Net, layers, seeded
from torch import Tensor, nn

import adaptertools
from adaptertools.adapter import Adapter, LoraModule, Target
from adaptertools.errors import UnsupportedFeatureError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*invalid shape.*lora_B.bias"),  # peft 0.21 takes a bias for a factor
    pytest.mark.filterwarnings("ignore:.*_pattern keys did not match.*:RuntimeWarning"),  # it overlooks parameters
]

UNLIKE_PEFT = {
    "alora": "it acts after its tokens only",
    "attention_parameter": "PEFT leaves the layer inside the wrapped module as it is",
    "gpt2_mixed": "PEFT merges the adapted head into the tied embedding",
    "llama_tied": "PEFT merges the tied weight twice, unlike its own forward pass",
}
"""Cases in which PEFT's merge is no model of what the adapter does, or there is none."""

PRECISE = 1e-6


def assert_equal_to(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype), name
        assert torch.allclose(found[name], tensor, rtol=PRECISE, atol=PRECISE), name


@pytest.mark.parametrize("case", [case for case in CASES if case not in UNLIKE_PEFT])
def test_a_merge_equals_that_of_peft_and_acts_as_the_adapter(case: str, tmp_path: Path) -> None:
    base = save_base(case, tmp_path / "base")
    model = save_adapter(case, tmp_path / "adapter")
    wanted = run(case, model)
    ours = merge(base, [read_adapter(tmp_path / "adapter", base)], tmp_path / "ours")
    with quiet():
        theirs = save_model(model.merge_and_unload(), tmp_path / "theirs")
    before, found = weights_in(base), weights_in(ours)
    assert_equal_to(found, weights_in(theirs))
    assert any(not torch.equal(before[name], found[name]) for name in before), "the case changes nothing"
    assert (run(case, load_model(case, ours)) - wanted).abs().max() <= 1e-5


def test_an_adapted_tied_embedding_is_merged_once_as_in_the_forward_pass(tmp_path: Path) -> None:
    base = save_base("llama_tied", tmp_path / "base")
    wanted = run("llama_tied", save_adapter("llama_tied", tmp_path / "adapter"))
    ours = merge(base, [read_adapter(tmp_path / "adapter", base)], tmp_path / "ours")
    assert (run("llama_tied", load_model("llama_tied", ours)) - wanted).abs().max() <= 1e-5
    assert (run("llama_tied", load_model("llama_tied", base)) - wanted).abs().max() > 1e-3


def test_a_layer_within_a_module_with_an_adapted_parameter_is_merged_too(tmp_path: Path) -> None:
    """PEFT's own forward pass reads out_proj's weight past its adapter, and its merge forgets that layer."""
    case = "attention_parameter"
    base = save_base(case, tmp_path / "base")
    model = save_adapter(case, tmp_path / "adapter")
    ours = merge(base, [read_adapter(tmp_path / "adapter", base)], tmp_path / "ours")
    (inner,) = [layer for name, layer in model.named_modules() if name.endswith("out_proj")]
    with torch.no_grad():
        inner.base_layer.weight += inner.get_delta_weight("default")
    assert (run(case, load_model(case, ours)) - run(case, model)).abs().max() <= 1e-5


def test_an_adapted_head_that_is_tied_is_refused_unless_it_may_be_untied(tmp_path: Path) -> None:
    base = save_base("gpt2_mixed", tmp_path / "base")
    model = save_adapter("gpt2_mixed", tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter", base)
    with pytest.raises(UnsupportedFeatureError, match="untie"):
        adaptertools.plan_merge(base, [adapter])
    ours = merge(base, [adapter], tmp_path / "ours", untie=True)
    assert json.loads((ours / "config.json").read_text())["tie_word_embeddings"] is False
    found, before = weights_in(ours), weights_in(base)
    assert torch.equal(found["transformer.wte.weight"], before["transformer.wte.weight"])
    assert not torch.equal(found["lm_head.weight"], before["transformer.wte.weight"])
    assert (run("gpt2_mixed", load_model("gpt2_mixed", ours)) - run("gpt2_mixed", model)).abs().max() <= 1e-5


def test_an_adapter_that_acts_after_its_tokens_only_is_refused(tmp_path: Path) -> None:
    base = save_base("alora", tmp_path / "base")
    save_adapter("alora", tmp_path / "adapter")
    with pytest.raises(UnsupportedFeatureError, match=r"aLoRA|invocation"):
        adaptertools.plan_merge(base, [read_adapter(tmp_path / "adapter", base)])


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_on_changed_base_weights_is_refused(init: str, tmp_path: Path) -> None:
    base = save_base("llama", tmp_path / "base")
    save_adapter("llama", tmp_path / "adapter", init_lora_weights=init)
    with pytest.raises(UnsupportedFeatureError, match=init):
        adaptertools.plan_merge(base, [read_adapter(tmp_path / "adapter", base)])


@pytest.mark.parametrize("case", ["llama", "gpt2", "bert", "moe", "moe_transposed"])
def test_a_checkpoint_of_torch_files_merges_like_one_of_safetensors(case: str, tmp_path: Path) -> None:
    base = save_base(case, tmp_path / "base")
    save_adapter(case, tmp_path / "adapter")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((base / "config.json").read_bytes())
    torch.save(weights_in(base), pickled / "pytorch_model.bin")
    one = merge(base, [read_adapter(tmp_path / "adapter", base)], tmp_path / "one")
    other = merge(pickled, [read_adapter(tmp_path / "adapter", pickled)], tmp_path / "other")
    first, second = weights_in(one), weights_in(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not list(other.glob("*.bin"))


def test_a_saved_head_of_another_size_comes_out_as_peft_merges_it(tmp_path: Path) -> None:
    base = save_base("bert", tmp_path / "base")
    model = save_adapter("bert", tmp_path / "adapter")
    ours = merge(base, [read_adapter(tmp_path / "adapter", base)], tmp_path / "ours")
    saved = weights_in(tmp_path / "adapter")["base_model.model.classifier.weight"]
    assert torch.equal(weights_in(ours)["classifier.weight"], saved)
    assert (run("bert", load_model("bert", ours)) - run("bert", model)).abs().max() <= 1e-5


def test_a_resized_vocabulary_is_merged_and_written_to_the_config(tmp_path: Path) -> None:
    from peft_cases import make_adapter, make_base

    base = save_base("llama", tmp_path / "base")
    torch.manual_seed(7)
    grown = make_base("llama")
    with quiet():
        grown.resize_token_embeddings(35)
    model = make_adapter("llama", grown)
    with quiet():
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    ours = merge(base, [read_adapter(tmp_path / "adapter", base)], tmp_path / "ours")
    assert json.loads((ours / "config.json").read_text())["vocab_size"] == 35
    with quiet():
        theirs = save_model(model.merge_and_unload(), tmp_path / "theirs")
    assert_equal_to(weights_in(ours), weights_in(theirs))
    from transformers import LlamaForCausalLM

    loaded, info = LlamaForCausalLM.from_pretrained(ours, output_loading_info=True)
    assert not info["mismatched_keys"]
    tokens = torch.tensor([[33, 34, 1, 2]])
    with torch.no_grad():
        assert (loaded.eval()(tokens).logits - model(tokens).logits).abs().max() <= 1e-5


# -------------------------------------------------------------------------------------------------- several adapters


def dense(adapter: Adapter, before: dict[str, Tensor], weight: float, sums: dict[str, Tensor]) -> None:
    """Add what an adapter adds to each weight, in float64, to the sums."""
    for module in adapter.modules:
        name = module.target.parameter
        name = name if name in before else f"{name}.weight"
        delta = module.delta_weight(dtype=torch.float64, base_weight=before[name].double())
        sums[name] = sums[name] + weight * delta
        if module.lora_bias is not None:
            bias = f"{module.target.parameter}.bias"
            sums[bias] = sums[bias] + weight * module.scaling * module.lora_bias.double()


@pytest.mark.parametrize("case", ["linear", "gpt2", "llama_patterns", "moe_transposed", "convolutions", "embedding"])
def test_several_adapters_with_weights_are_the_dense_sum(case: str, tmp_path: Path) -> None:
    base = save_base(case, tmp_path / "base")
    before = weights_in(base)
    adapters = []
    for seed in range(3):
        save_adapter(case, tmp_path / f"adapter{seed}", lora_alpha=3 + 2 * seed)
        adapters.append(read_adapter(tmp_path / f"adapter{seed}", base))
    turned = adapters[1].map_modules(lambda module: moved(module))
    weights = [1.0, -0.5, 0.25]
    sums = {name: tensor.double() for name, tensor in before.items()}
    for adapter, weight in zip([adapters[0], turned, adapters[2]], weights, strict=True):
        dense(adapter, before, weight, sums)
    found = weights_in(merge(base, [adapters[0], turned, adapters[2]], tmp_path / "ours", weights))
    assert found.keys() == sums.keys()
    for name, tensor in sums.items():
        assert torch.allclose(found[name].double(), tensor, rtol=PRECISE, atol=PRECISE), name


def moved(module: LoraModule) -> LoraModule:
    """The module with other factors."""
    from dataclasses import replace

    return replace(module, lora_A=module.lora_A.flip(-1) * 0.7, lora_B=module.lora_B.flip(-2) * 1.3)


def test_dora_beside_others_and_with_a_weight_adds_what_it_adds_to_the_unmerged_weights(tmp_path: Path) -> None:
    base = save_base("llama_dora", tmp_path / "base")
    before = weights_in(base)
    save_adapter("llama_dora", tmp_path / "dora")
    save_adapter("llama", tmp_path / "plain")
    adapters = [read_adapter(tmp_path / name, base) for name in ("dora", "plain")]
    sums = {name: tensor.double() for name, tensor in before.items()}
    weights = [0.5, 2.0]
    for adapter, weight in zip(adapters, weights, strict=True):
        dense(adapter, before, weight, sums)
    found = weights_in(merge(base, adapters, tmp_path / "ours", weights))
    for name, tensor in sums.items():
        assert torch.allclose(found[name].double(), tensor, rtol=2e-6, atol=2e-6), name


# ----------------------------------------------------------------------------------------------------------- loralib


@pytest.mark.parametrize("fan_in_fan_out", [True, False])
def test_a_merge_equals_what_loralib_merges_for_evaluation(fan_in_fan_out: bool, tmp_path: Path) -> None:
    model = seeded(Net(alpha=7, fan_in_fan_out=fan_in_fan_out), 0).train()
    state = model.state_dict()
    plain = {name.replace("conv.conv.", "conv."): t.clone() for name, t in state.items() if "lora_" not in name}
    (tmp_path / "base").mkdir()
    save_file({name: t.contiguous() for name, t in plain.items()}, tmp_path / "base" / "model.safetensors")
    torch.save(loralib.lora_state_dict(model), tmp_path / "lora.pt")
    options = {
        "slots": SLOTS if fan_in_fan_out else SLOTS.replace(":transposed", ""),
        "embeddings": "tokens",
        "convolutions": "conv=3",
        **({"transposed": "down"} if fan_in_fan_out else {}),
    }
    adapter = adaptertools.read(tmp_path / "lora.pt", alpha=7, base=tmp_path / "base", **options)
    found = weights_in(merge(tmp_path / "base", [adapter], tmp_path / "ours"))
    wanted = model.eval()(IDS)
    merged = {f"{name}.weight": weight for name, _, weight in layers(model)}
    assert_equal_to(found, {name: merged.get(name, tensor).detach() for name, tensor in plain.items()})
    assert all(not torch.equal(found[name], plain[name]) for name in merged)
    again = seeded(Net(alpha=7, fan_in_fan_out=fan_in_fan_out), 1).train()
    with torch.no_grad():
        for name, parameter in again.named_parameters():
            parameter.copy_(
                torch.zeros_like(parameter) if "lora_" in name else found[name.replace("conv.conv.", "conv.")]
            )
    assert (again(IDS) - wanted).abs().max() <= 1e-5


# ------------------------------------------------------------------------------------------- one rounding, in float64

SIDE, RANK = 640, 16


def rounding_case(
    dtype: torch.dtype, factors: torch.dtype, count: int, ratio: float, folder: Path
) -> tuple[Path, list[Adapter], Tensor, Tensor]:
    """A base of one weight and adapters whose delta weights, all together, are `ratio` of its size."""
    generator = torch.Generator().manual_seed(count)
    weight = (torch.randn(SIDE, SIDE, generator=generator) * 0.02).to(dtype)
    folder.mkdir(parents=True)
    save_file({"proj.weight": weight, "other.weight": weight[:4].clone()}, folder / "model.safetensors")
    size = (0.02 * ratio / (RANK * count) ** 0.5) ** 0.5
    adapters = [
        Adapter(
            modules=(
                LoraModule(
                    target=Target(parameter="proj"),
                    lora_A=(torch.randn(RANK, SIDE, generator=generator) * size).to(factors),
                    lora_B=(torch.randn(SIDE, RANK, generator=generator) * size).to(factors),
                    alpha=float(RANK),
                ),
            )
        )
        for _ in range(count)
    ]
    exact = weight.double()
    for adapter in adapters:
        exact = exact + adapter.modules[0].delta_weight(dtype=torch.float64)
    return folder, adapters, weight, exact


def by_peft(weight: Tensor, adapters: Sequence[Adapter], **options: Any) -> Tensor:
    """What PEFT makes of the same: the adapters' factors in its layers, in their own dtype, merged in turn."""

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(SIDE, SIDE, bias=False, dtype=weight.dtype)

    base = One()
    base.proj.weight.data.copy_(weight)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["proj"])
    names = [f"a{index}" for index in range(len(adapters))]
    with quiet():
        model = get_peft_model(base, config, adapter_name=names[0], autocast_adapter_dtype=False)
        assert isinstance(model, PeftModel)
        for name in names[1:]:
            model.add_adapter(name, config, autocast_adapter_dtype=False)
    layer = model.base_model.model.proj
    for name, adapter in zip(names, adapters, strict=True):
        layer.lora_A[name].weight.data = adapter.modules[0].lora_A.clone()
        layer.lora_B[name].weight.data = adapter.modules[0].lora_B.clone()
    merged = model.merge_and_unload(adapter_names=names, **options)
    return merged.proj.weight.detach()


@pytest.mark.parametrize("ratio", [0.1, pytest.param(0.005, marks=pytest.mark.slow)])
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["into bf16", "into f16"])
def test_nearly_every_entry_is_the_correctly_rounded_one(
    dtype: torch.dtype, factors: torch.dtype, count: int, ratio: float, tmp_path: Path
) -> None:
    base, adapters, weight, exact = rounding_case(dtype, factors, count, ratio, tmp_path / "base")
    found = weights_in(merge(base, adapters, tmp_path / "ours"))
    ours = share_correct(found["proj.weight"], exact)
    theirs = share_correct(by_peft(weight, adapters), exact)
    print(f"correctly rounded, {dtype} base, {count} of {factors}, |ΔW|/|W| {ratio}: {ours:.6%}, PEFT {theirs:.4%}")
    assert ours >= 0.9999
    if factors == torch.float32 and count == 1:
        assert theirs >= 0.9999, "PEFT rounds a single float32 adapter once, too"
    elif count > 1:
        assert theirs < 0.999, "PEFT rounds for every adapter"
    else:
        assert theirs <= ours


def test_the_reference_knows_a_wrong_rounding() -> None:
    exact = torch.linspace(0.5, 1.5, 1001, dtype=torch.float64)
    right = exact.to(torch.bfloat16)
    assert share_correct(right, exact) == 1.0
    up = torch.nextafter(right, torch.full_like(right, torch.inf))
    assert share_correct(up, exact) < 0.01
