"""The sidecar of the Flax formats: what a tree cannot say comes back, and nothing in it crashes the reader."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from flax_oracle import D, H, N, assert_identical, decoder, delta, module, modules_of, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import adaptertools
from adaptertools.adapter import Adapter, Base, HistoryEntry, LoraModule, ScaleRule, Target
from adaptertools.errors import DuplicateTargetError


def test_a_component_is_kept_and_may_not_hide_another_module(tmp_path: Path) -> None:
    inner = Target(parameter="mid.fc", component="unet")
    adapter = Adapter(
        modules=(
            module("fc", 4, 3),
            LoraModule(target=inner, lora_A=torch.ones(2, 4), lora_B=torch.ones(3, 2), alpha=2),
        ),
        bases={"": Base(id="org/text"), "unet": Base(id="org/unet")},
    )
    assert_identical(adapter, adaptertools.read(write(adapter, tmp_path / "flax")))
    clash = Adapter(modules=(*adapter.modules, module("unet.mid.fc", 4, 3)))
    with pytest.raises(DuplicateTargetError, match=r"unet\.mid\.fc"):
        write(clash, tmp_path / "clash")


def test_everything_else_that_an_adapter_says_comes_back(tmp_path: Path) -> None:
    modules = (
        module("a", 4, 3, alpha=16, transposed=True),
        module("b", 4, 3, alpha=16.5, rank=3, scale_rule=ScaleRule.ALPHA_OVER_SQRT_RANK),
        module("c", 4, 3, alpha=0.1, rank=1, scale_rule=ScaleRule.DIRECT),
        module("d", 4, 3, alpha=0, transposed=False),
        module("e", 4, 3, alpha=-8, shape=(3, 2, 2)),
        LoraModule(
            target=Target(parameter="lora_te_f", opaque=True), lora_A=torch.ones(2, 4), lora_B=torch.ones(3, 2), alpha=2
        ),
    )
    adapter = Adapter(
        modules=modules,
        bases={"": Base(id="org/model", revision="0123", change="pissa")},
        history=(HistoryEntry(operation="rescale", source="x", details={"alpha": 3}),),
        metadata={"peft": {"task_type": "CAUSAL_LM", "target_modules": ["a", "b"]}},
    )
    for container in ("msgpack", "npz", "safetensors", "orbax"):
        report = adaptertools.write(adapter, tmp_path / container, format="flax-qwix", container=container)
        assert report.exact
        assert any("pissa" in note for note in report.notes)
        back = adaptertools.read(tmp_path / container)
        assert_identical(adapter, back)
        for before in modules:
            after = modules_of(back)[str(before.target)]
            assert (after.transposed, after.shape, after.target) == (before.transposed, before.shape, before.target)
            assert type(after.alpha) is type(before.alpha)
        assert back.metadata == adapter.metadata
        assert back.history == adapter.history


def test_a_dtype_that_was_asked_for_keeps_alpha_where_the_scale_can_be_undone(tmp_path: Path) -> None:
    for alpha, kept in ((4, True), (5, False)):
        before = module("fc", 7, 9, alpha=alpha)
        write(Adapter(modules=(before,)), tmp_path / "flax", dtype="bf16", overwrite=True)
        (after,) = adaptertools.read(tmp_path / "flax").modules
        assert {after.lora_A.dtype, after.lora_B.dtype} == {torch.bfloat16}
        assert torch.equal(after.lora_A, before.lora_A.bfloat16())
        assert (after.alpha == alpha) is kept
        if kept:
            assert torch.equal(after.lora_B, before.lora_B.bfloat16())
        else:
            wanted = (before.lora_B.double() * before.scaling).bfloat16()
            assert torch.equal(after.lora_B, wanted)


@given(
    alpha=st.one_of(st.integers(-64, 64), st.floats(1e-3, 1e3)),
    rule=st.sampled_from(list(ScaleRule)),
    rank=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    format=st.sampled_from(["flax", "flax-gemma", "flax-qwix"]),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_scale_comes_back_bit_for_bit_or_as_it_was_stored(
    alpha: float, rule: ScaleRule, rank: int, dtype: torch.dtype, format: str, tmp_path: Path
) -> None:
    before = module("fc", 7, 9, rank=rank, alpha=alpha, scale_rule=rule, dtype=dtype)
    tensors, sidecar = Adapter(modules=(before,)).to_state_dict(format=format)
    (after,) = adaptertools.from_state_dict(tensors, sidecar, format=format).modules
    assert torch.equal(after.lora_A, before.lora_A)
    if after.scale_rule is ScaleRule.DIRECT and rule is not ScaleRule.DIRECT:
        assert format != "flax-qwix"
        assert after.alpha == 1.0
        stored = tensors["fc/lora_b" if format == "flax" else "fc/lora/b"]
        assert torch.equal(after.lora_B, stored.T)
        wanted = before.lora_B.double() * before.scaling
        torch.testing.assert_close(after.lora_B.double(), wanted, rtol=6e-8, atol=0)
    elif (after.alpha, after.scale_rule) == (before.alpha, before.scale_rule):
        assert torch.equal(after.lora_B, before.lora_B)
        assert after.lora_B.dtype == dtype
    else:
        assert (after.alpha, after.scale_rule, rule) == (1.0, ScaleRule.DIRECT, ScaleRule.DIRECT)


@given(
    ranks=st.tuples(*[st.integers(1, 3)] * 3),
    alphas=st.tuples(*[st.sampled_from([1.0, 2.0, 3.0, 4.0])] * 3),
    shared=st.booleans(),
    format=st.sampled_from([("flax-qwix", "tunix-gemma"), ("flax-gemma", "gemma")]),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_fused_leaves_hold_the_delta_weight_of_every_part(
    ranks: tuple[int, ...], alphas: tuple[float, ...], shared: bool, format: tuple[str, str], tmp_path: Path
) -> None:
    """Whatever the ranks, scales and lora_A of q, k and v: read from the bare tree, ΔW is what it was."""
    modules = tuple(
        module(
            f"model.layers.0.self_attn.{name}_proj", D, N * H, rank=ranks[0] if shared else rank, alpha=alpha, seed=s
        )
        for s, (name, rank, alpha) in enumerate(zip("qkv", ranks, alphas, strict=True))
    )
    adapter = Adapter(modules=modules)
    tensors, sidecar = adapter.to_state_dict(format=format[0], naming=format[1], head_dim=H)
    assert len(tensors) == 2
    rank = next(tensor.shape[0] for name, tensor in tensors.items() if name.endswith("b"))
    scales = {m.scaling for m in modules}
    alpha = {"alpha": rank * (scales.pop() if len(scales) == 1 else 1.0)} if format[0] == "flax-qwix" else {}
    bare = adaptertools.from_state_dict(tensors, format=format[0], **alpha) if not alpha else None
    if alpha:
        np.savez(tmp_path / "bare.npz", **{name: tensor.numpy() for name, tensor in tensors.items()})
        bare = adaptertools.read(tmp_path / "bare.npz", **alpha)
    described = adaptertools.from_state_dict(tensors, sidecar, format=format[0])
    for name in modules_of(adapter):
        wanted = delta(adapter, name)
        np.testing.assert_allclose(delta(bare, name), wanted, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(delta(described, name), wanted, rtol=1e-5, atol=1e-6)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_sidecar_with_anything_in_it_is_read_or_refused_but_never_crashes(data: st.DataObject) -> None:
    tensors, sidecar = decoder(1).to_state_dict(format="flax-gemma", naming="gemma", head_dim=H)
    sidecar["modules"] = {"model.layers.0.mlp.down_proj": {"factor": 2.0}}
    values = st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.floats(allow_nan=True), st.text(max_size=4)),
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
        max_leaves=4,
    )
    home = data.draw(st.sampled_from(["top", "modules", "scan", "bases"]))
    special = ["factor", "restores", "rows", "absent", "lora_A_dtype", "transposed", "shape", "component", "scaling"]
    if home == "top":
        sidecar[data.draw(st.sampled_from(sorted({*sidecar, "bases", "scan", "arch", "head_dim"})))] = data.draw(values)
    elif home == "modules":
        sidecar["modules"]["model.layers.0.mlp.down_proj"][data.draw(st.sampled_from(special))] = data.draw(values)
    else:
        sidecar[home] = {data.draw(st.sampled_from(["axis", "at", "", "id"])): data.draw(values)}
    with contextlib.suppress(adaptertools.AdapterToolsError):
        adaptertools.from_state_dict(tensors, sidecar, format="flax-gemma")
