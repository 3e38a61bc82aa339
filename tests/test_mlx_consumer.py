"""mlx-lm is served what PEFT says, beside its weights and fused into them; its own files are read as it fuses them."""

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import adaptertools
from adaptertools.adapter import Adapter, Kind, LoraModule, Target
from adaptertools.errors import AmbiguousFormatError, MissingAlphaError

pytestmark = [
    pytest.mark.consumers,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]

LLAMA = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 72,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
IDS = [[3, 17, 41, 8, 25, 60, 2]]


@pytest.fixture(scope="module")
def mlx() -> ModuleType:
    """The judge, imported only where its tests run."""
    import mlx_oracle

    return mlx_oracle


def llama(*, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return spread(LlamaForCausalLM(LlamaConfig(**TINY, intermediate_size=56, tie_word_embeddings=tied)))


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return spread(MixtralForCausalLM(MixtralConfig(**TINY, intermediate_size=24, num_local_experts=4)))


def qwen_moe() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    sizes = {"intermediate_size": 56, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
    return spread(Qwen3MoeForCausalLM(Qwen3MoeConfig(**TINY, **sizes, head_dim=8, norm_topk_prob=True)))


def spread(model: Any) -> Any:
    """Weights wide enough that an adapter changes the logits."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return model.eval()


def adapted(model: PreTrainedModel, folder: Path, **config: Any) -> PeftModel:
    """A PEFT adapter with values as after training, saved."""
    wrapped = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, **config}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
            elif "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    return wrapped.eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> np.ndarray:
    return model(torch.tensor(IDS)).logits.float().numpy()


def assert_served(
    mlx: ModuleType, wanted: np.ndarray, base: PreTrainedModel, adapter: Path, tmp_path: Path, fused: float = 1e-5
) -> None:
    """mlx-lm gives these logits with the adapter beside the weights and fused into them; without it, others."""
    model = mlx.mlx_model(base, tmp_path / "base")
    assert np.abs(mlx.logits(model) - logits(base)).max() < 1e-5
    assert np.abs(mlx.logits(model) - wanted).max() > 0.1
    assert np.abs(mlx.logits(mlx.with_adapter(model, adapter)) - wanted).max() < 1e-5
    assert np.abs(mlx.logits(mlx.fuse(model)) - wanted).max() < fused


CASES: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": LLAMA},
    "rslora": {"target_modules": LLAMA, "use_rslora": True},
    "one_projection": {"target_modules": ["v_proj"]},
    "one_layer": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    "patterns": {
        "target_modules": LLAMA,
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 7},
        "alpha_pattern": {"q_proj": 5, "up_proj": 1},
    },
    "mixed_ranks_of_one_scaling": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"v_proj": 3},
    },
    "rslora_with_patterns": {"target_modules": ["q_proj", "o_proj"], "use_rslora": True, "rank_pattern": {"o_proj": 9}},
    "dora": {"target_modules": LLAMA, "use_dora": True},
    "dora_with_patterns": {"target_modules": ["q_proj", "v_proj"], "use_dora": True, "rank_pattern": {"v_proj": 2}},
    "lm_head": {"target_modules": ["lm_head"]},
    "embeddings": {"target_modules": ["embed_tokens"]},
    "everything": {"target_modules": [*LLAMA, "embed_tokens", "lm_head"], "alpha_pattern": {"lm_head": 11}},
}


@pytest.mark.parametrize("case", CASES)
def test_what_peft_saved_is_served_by_mlx_lm(case: str, mlx: ModuleType, tmp_path: Path) -> None:
    wrapped = adapted(llama(), tmp_path / "peft", **CASES[case])
    report = adaptertools.convert(tmp_path / "peft", tmp_path / "mlx", to="mlx")
    assert report.max_relative_error < 1e-7
    assert_served(mlx, logits(wrapped), llama(), tmp_path / "mlx", tmp_path)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_narrow_factors_are_served(dtype: str, mlx: ModuleType, tmp_path: Path) -> None:
    adapted(llama(), tmp_path / "wide", target_modules=LLAMA, lora_alpha=5)
    adaptertools.convert(tmp_path / "wide", tmp_path / "peft", to="peft", dtype=dtype)
    adaptertools.convert(tmp_path / "peft", tmp_path / "mlx", to="mlx")
    stored = {tensor.dtype for tensor in load_file(tmp_path / "mlx" / "adapters.safetensors").values()}
    assert stored == {{"bf16": torch.bfloat16, "f16": torch.float16}[dtype]}
    wrapped = PeftModel.from_pretrained(llama(), tmp_path / "peft").eval()
    coarse = 2 * float(torch.finfo(next(iter(stored))).eps)  # of fuse, which multiplies the factors in their own dtype
    assert_served(mlx, logits(wrapped), llama(), tmp_path / "mlx", tmp_path, fused=coarse)


def test_a_record_and_a_history_in_the_header_keep_nothing_from_loading(mlx: ModuleType, tmp_path: Path) -> None:
    wrapped = adapted(llama(), tmp_path / "peft", **CASES["patterns"])
    adaptertools.convert(tmp_path / "peft", tmp_path / "mlx", to="mlx")
    with safe_open(tmp_path / "mlx" / "adapters.safetensors", "pt") as file:
        said = json.loads(file.metadata()["adaptertools"])
    assert said["mlx"]["ranks"]
    assert said["history"]
    assert_served(mlx, logits(wrapped), llama(), tmp_path / "mlx", tmp_path)


@pytest.mark.filterwarnings("ignore:Model.*tie_word_embeddings=True:UserWarning")
def test_an_adapted_embedding_that_is_the_head_too_is_served_as_the_merged_model(
    mlx: ModuleType, tmp_path: Path
) -> None:
    wrapped = adapted(llama(tied=True), tmp_path / "peft", target_modules=["embed_tokens"])
    report = adaptertools.convert(tmp_path / "peft", tmp_path / "mlx", to="mlx")
    assert any("ties its head" in note for note in report.notes)
    unmerged, merged = logits(wrapped), logits(wrapped.merge_and_unload())
    assert np.abs(unmerged - merged).max() > 0.1
    assert_served(mlx, merged, llama(tied=True), tmp_path / "mlx", tmp_path)


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments .'fine_tune_type', 'lora_parameters':UserWarning")
def test_one_configuration_serves_peft_and_mlx_lm(mlx: ModuleType, tmp_path: Path) -> None:
    wrapped = adapted(llama(), tmp_path / "peft", target_modules=LLAMA)
    adaptertools.convert(tmp_path / "peft", tmp_path / "mlx", to="mlx")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    config |= json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    (tmp_path / "mlx" / "adapter_config.json").write_text(json.dumps(config))
    weights = "adapter_model.safetensors"
    (tmp_path / "mlx" / weights).write_bytes((tmp_path / "peft" / weights).read_bytes())
    with pytest.raises(AmbiguousFormatError, match="mlx or peft; say which with --from"):
        adaptertools.read(tmp_path / "mlx")
    one, other = (adaptertools.read(tmp_path / "mlx", format=name) for name in ("mlx", "peft"))
    assert adaptertools.diff(one, other, tolerance=0).same
    assert_served(mlx, logits(wrapped), llama(), tmp_path / "mlx", tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path / "mlx").eval()
    assert np.array_equal(logits(again), logits(wrapped))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_gpt2_is_served_under_the_names_of_the_checkpoint_that_mlx_lm_saved(mlx: ModuleType, tmp_path: Path) -> None:
    def gpt2() -> GPT2LMHeadModel:
        torch.manual_seed(0)
        config = GPT2Config(
            n_embd=32, n_layer=2, n_head=4, n_positions=64, n_ctx=64, vocab_size=72, bos_token_id=1, eos_token_id=2
        )
        return spread(GPT2LMHeadModel(config))

    targets = ["c_attn", "c_proj", "c_fc"]
    wrapped = adapted(gpt2(), tmp_path / "peft", target_modules=targets, rank_pattern={"c_fc": 2})
    model = mlx.mlx_model(gpt2(), tmp_path / "base", strip="transformer.")
    (tmp_path / "mlx-base").mkdir()
    weights = dict(mlx.tree_flatten(model.parameters()))
    mlx.mx.save_safetensors(str(tmp_path / "mlx-base" / "model.safetensors"), weights, metadata={"format": "mlx"})
    adaptertools.convert(tmp_path / "peft", tmp_path / "mlx", to="mlx", base=tmp_path / "mlx-base")
    assert np.abs(mlx.logits(model) - logits(gpt2())).max() < 1e-5
    assert np.abs(mlx.logits(model) - logits(wrapped)).max() > 0.1
    assert np.abs(mlx.logits(mlx.with_adapter(model, tmp_path / "mlx")) - logits(wrapped)).max() < 1e-5
    assert np.abs(mlx.logits(mlx.fuse(model)) - logits(wrapped)).max() < 1e-5
    assert adaptertools.diff(adaptertools.read(tmp_path / "peft"), adaptertools.read(tmp_path / "mlx")).same


STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def test_stacks_of_experts_are_served(mlx: ModuleType, tmp_path: Path) -> None:
    wrapped = adapted(
        qwen_moe(), tmp_path / "peft", target_modules=["q_proj"], target_parameters=STACKS, rank_pattern={"q_proj": 6}
    )
    adaptertools.convert(tmp_path / "peft", tmp_path / "mlx", to="mlx")
    stored = load_file(tmp_path / "mlx" / "adapters.safetensors")
    assert tuple(stored["model.layers.0.mlp.switch_mlp.gate_proj.lora_a"].shape) == (4, 6, 32)
    assert tuple(stored["model.layers.0.mlp.switch_mlp.gate_proj.lora_b"].shape) == (4, 24, 6)
    assert_served(mlx, logits(wrapped), qwen_moe(), tmp_path / "mlx", tmp_path)


def test_stacks_of_mixtral_are_served_under_the_name_that_mlx_lm_has(mlx: ModuleType, tmp_path: Path) -> None:
    wrapped = adapted(mixtral(), tmp_path / "peft", target_modules=["v_proj"], target_parameters=STACKS)
    rename = r"\.mlp\.experts=.block_sparse_moe.experts"
    adaptertools.convert(tmp_path / "peft", tmp_path / "mlx", to="mlx", rename=[rename])
    assert_served(mlx, logits(wrapped), mixtral(), tmp_path / "mlx", tmp_path)


def experts_one_by_one(*, leave_out: int | None = None) -> Adapter:
    """An adapter of each expert alone, as PEFT made them before transformers 5; ranks and alphas differ."""
    generator = torch.Generator().manual_seed(5)
    modules = []
    for layer in range(2):
        for expert in range(4):
            for name, (n_in, n_out) in {"gate": (32, 24), "up": (32, 24), "down": (24, 32)}.items():
                rank = 1 + (expert + layer) % 3
                modules.append(
                    LoraModule(
                        target=Target(parameter=f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj"),
                        lora_A=0.3 * torch.randn(rank, n_in, generator=generator),
                        lora_B=0.3 * torch.randn(n_out, rank, generator=generator),
                        alpha=3.0 + expert,
                    )
                )
    kept = [m for m in modules if leave_out is None or f"experts.{leave_out}." not in m.target.parameter]
    return Adapter(modules=tuple(kept))


@pytest.mark.parametrize("leave_out", [None, 3])
def test_experts_that_stand_one_by_one_become_the_stacks_of_mlx_lm(
    leave_out: int | None, mlx: ModuleType, tmp_path: Path
) -> None:
    adapter = experts_one_by_one(leave_out=leave_out)
    options = {} if leave_out is None else {"num_experts": 4}
    adaptertools.write(adapter, tmp_path / "mlx", format="mlx", **options)
    model = mlx.mlx_model(qwen_moe(), tmp_path / "base")
    before = mlx.weights_of(model)
    added = mlx.added_by_fusing(mlx.with_adapter(model, tmp_path / "mlx"), before)
    wanted = {name: torch.zeros_like(delta) for name, delta in added.items()}
    for module in adapter.modules:
        home, _, rest = module.target.parameter.partition(".experts.")
        expert, _, part = rest.partition(".")
        wanted[f"{home}.switch_mlp.{part}"][int(expert)] = module.lora_B @ module.lora_A * module.scaling
    assert len(wanted) == 6
    for name, delta in wanted.items():
        assert torch.allclose(added[name], delta, atol=2e-6), name
    again = adaptertools.read(tmp_path / "mlx")
    assert {(str(m.target), m.rank) for m in again.modules} == {(str(m.target), m.rank) for m in adapter.modules}


def deltas(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {module.target.parameter: module.delta_weight() for module in adapter.modules}


TRAINED: dict[str, dict[str, Any]] = {
    "all_linear_layers": {"num_layers": -1},
    "the_last_layer": {"num_layers": 1},
    "relative_keys": {"num_layers": -1, "keys": ["self_attn.q_proj", "mlp.down_proj"], "rank": 3, "scale": 0.1},
    "embeddings_and_head": {"num_layers": 1, "keys": ["model.embed_tokens", "lm_head", "self_attn.v_proj"]},
}


@pytest.mark.parametrize("case", TRAINED)
def test_what_mlx_lm_trained_is_read_as_it_fuses_it(case: str, mlx: ModuleType, tmp_path: Path) -> None:
    model = mlx.mlx_model(llama(), tmp_path / "base")
    before = mlx.weights_of(model)
    mlx.train(model, tmp_path / "mlx", **TRAINED[case])
    adapter = adaptertools.read(tmp_path / "mlx")
    added = mlx.added_by_fusing(model, before)
    found = deltas(adapter)
    assert found.keys() == added.keys()
    for name, delta in added.items():
        assert torch.allclose(found[name], delta, atol=2e-6), name
    assert adapter.bases[""].id == "org/tiny"
    assert {m.target.parameter for m in adapter.modules if m.kind is Kind.EMBEDDING} <= {"model.embed_tokens"}


@pytest.mark.parametrize("keys", [None, ["model.embed_tokens", "self_attn.q_proj"]])
def test_dora_of_mlx_lm_is_read_as_it_fuses_it(keys: list[str] | None, mlx: ModuleType, tmp_path: Path) -> None:
    model = mlx.mlx_model(llama(), tmp_path / "base")
    before = mlx.weights_of(model)
    mlx.train(model, tmp_path / "mlx", num_layers=1, dora=True, **({"keys": keys} if keys else {}))
    adapter = adaptertools.read(tmp_path / "mlx")
    added = mlx.added_by_fusing(model, before)
    assert len(adapter.modules) == (2 if keys else 7)
    for module in adapter.modules:
        name = module.target.parameter
        delta = module.delta_weight(base_weight=before[f"{name}.weight"])
        assert torch.allclose(delta, added[name], atol=1e-5), name


@pytest.mark.parametrize("dora", [False, True])
def test_what_mlx_lm_trained_is_served_by_peft(dora: bool, mlx: ModuleType, tmp_path: Path) -> None:
    model = mlx.train(mlx.mlx_model(llama(), tmp_path / "base"), tmp_path / "mlx", num_layers=-1, dora=dora, scale=0.7)
    adaptertools.convert(tmp_path / "mlx", tmp_path / "peft", to="peft")
    wrapped = PeftModel.from_pretrained(llama(), tmp_path / "peft").eval()
    wanted = mlx.logits(model)
    assert np.abs(wanted - logits(llama())).max() > 0.1
    assert np.abs(logits(wrapped) - wanted).max() < 1e-5


@pytest.mark.parametrize("make", [qwen_moe, mixtral])
def test_experts_that_mlx_lm_trained_get_the_names_of_the_base(make: Any, mlx: ModuleType, tmp_path: Path) -> None:
    model = mlx.mlx_model(make(), tmp_path / "base")
    before = mlx.weights_of(model)
    mlx.train(model, tmp_path / "mlx", num_layers=-1)
    added = mlx.added_by_fusing(model, before)
    alone = adaptertools.read(tmp_path / "mlx")
    named = adaptertools.read(tmp_path / "mlx", base=tmp_path / "base")
    assert {m.target.parameter for m in alone.modules if m.target.opaque} == {n for n in added if "switch_mlp" in n}
    for module in alone.modules:
        assert torch.allclose(module.delta_weight(), added[module.target.parameter], atol=2e-6)
    stored = load_file(tmp_path / "base" / "model.safetensors")
    assert not any(module.target.opaque for module in named.modules)
    for module in named.modules:
        assert tuple(stored[f"{module.target.parameter}.weight"].shape) == module.weight_shape
    merged = tmp_path / "merged"
    adaptertools.run_merge(adaptertools.plan_merge(tmp_path / "base", [named]), merged, device="cpu")
    after = {
        n: mlx.as_torch(v) for n, v in model.sanitize(dict(mlx.mx.load(str(merged / "model.safetensors")))).items()
    }
    for name, delta in added.items():
        assert torch.allclose(after[f"{name}.weight"] - before[f"{name}.weight"], delta, atol=5e-6), name


def test_stacks_of_before_october_2025_are_read_as_mlx_lm_still_fuses_them(mlx: ModuleType, tmp_path: Path) -> None:
    model = mlx.train(mlx.mlx_model(qwen_moe(), tmp_path / "base"), tmp_path / "mlx", num_layers=-1)
    stored = load_file(tmp_path / "mlx" / "adapters.safetensors")
    old = {n: t.flatten(0, 1) if t.ndim == 3 and n.endswith("lora_a") else t for n, t in stored.items()}
    (tmp_path / "old").mkdir()
    save_file(old, tmp_path / "old" / "adapters.safetensors")
    shutil.copy(tmp_path / "mlx" / "adapter_config.json", tmp_path / "old")
    found = deltas(adaptertools.read(tmp_path / "old"))
    for part in ("gate_proj", "up_proj", "down_proj"):
        name = f"model.layers.1.mlp.switch_mlp.{part}"
        switch = model.model.layers[1].mlp.switch_mlp[part]
        assert old[f"{name}.lora_a"].ndim == 2
        switch.lora_a = mlx.mx.array(old[f"{name}.lora_a"].numpy())
        added = mlx.as_torch(switch.fuse().weight) - mlx.as_torch(switch.linear.weight)
        assert torch.allclose(found[name], added, atol=2e-6)


def test_a_checkpoint_of_a_run_is_read_with_the_configuration_beside_it(mlx: ModuleType, tmp_path: Path) -> None:
    mlx.train(mlx.mlx_model(llama(), tmp_path / "base"), tmp_path / "mlx", num_layers=1)
    (tmp_path / "mlx" / "adapters.safetensors").rename(tmp_path / "mlx" / "0000100_adapters.safetensors")
    one = adaptertools.read(tmp_path / "mlx" / "0000100_adapters.safetensors")
    assert {module.scaling for module in one.modules} == {3.0}
    assert adaptertools.diff(one, adaptertools.read(tmp_path / "mlx"), tolerance=0).same


def test_an_npz_file_as_the_lora_example_saves_it_means_the_same(mlx: ModuleType, tmp_path: Path) -> None:
    mlx.train(mlx.mlx_model(llama(), tmp_path / "base"), tmp_path / "mlx", num_layers=-1, scale=20.0)
    tensors = dict(mlx.mx.load(str(tmp_path / "mlx" / "adapters.safetensors")))
    tensors |= {name: value.astype(mlx.mx.bfloat16) for name, value in tensors.items()}
    mlx.mx.savez(str(tmp_path / "adapters.npz"), **tensors)
    mlx.mx.save_safetensors(str(tmp_path / "mlx" / "adapters.safetensors"), tensors)
    with pytest.raises(MissingAlphaError, match="--in scale"):
        adaptertools.read(tmp_path / "adapters.npz")
    found = adaptertools.read(tmp_path / "adapters.npz", scale=20.0)
    assert {module.lora_A.dtype for module in found.modules} == {torch.bfloat16}
    assert adaptertools.diff(adaptertools.read(tmp_path / "mlx"), found, tolerance=0).same
