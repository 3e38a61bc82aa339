"""Real loralib as the judge: its checkpoints mean the same to us, and ours the same to it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import loralib
import pytest
import torch
from torch import nn

import adaptertools
from adaptertools.adapter import Adapter, Kind, LoraModule, RowSlice, ScaleRule, Target

SLOTS = "fused=TFT,turned=TFT:transposed"
OPTIONS = {"slots": SLOTS, "embeddings": "tokens", "convolutions": "conv=3"}


class Net(nn.Module):
    """An MLP with every layer of loralib: embedding, linear both ways, fused both ways, convolution."""

    def __init__(self, alpha: float, r: int = 2, *, fan_in_fan_out: bool, biases: bool = True) -> None:
        super().__init__()
        both: dict[str, Any] = {"r": r, "lora_alpha": alpha}
        self.tokens = loralib.Embedding(13, 8, **both)
        self.up = loralib.Linear(8, 12, bias=biases, **both)
        self.down = loralib.Linear(12, 8, bias=biases, fan_in_fan_out=fan_in_fan_out, **both)
        self.fused = loralib.MergedLinear(8, 24, enable_lora=[True, False, True], bias=biases, **both)
        self.turned = loralib.MergedLinear(
            8, 24, enable_lora=[True, False, True], bias=biases, fan_in_fan_out=fan_in_fan_out, **both
        )
        self.conv = loralib.Conv2d(1, 4, 3, padding=1, bias=biases, **both)
        self.head = nn.Linear(24, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.down(torch.relu(self.up(self.tokens(ids))))
        hidden = self.fused(hidden) * torch.tanh(self.turned(hidden))
        image = self.conv(hidden.unsqueeze(1)).mean(dim=1)
        return self.head(image)


def seeded(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


IDS = torch.arange(12).reshape(2, 6)


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    for name, layer in model.named_modules():
        if isinstance(layer, loralib.LoRALayer):
            yield name, layer, layer.conv.weight if hasattr(layer, "conv") else layer.weight


def merged_deltas(model: nn.Module) -> dict[str, torch.Tensor]:
    """What eval() adds to weights of zeros."""
    model.train()
    for _, _, weight in layers(model):
        weight.data.zero_()
    model.eval()
    return {name: weight.detach().clone() for name, _, weight in layers(model)}


def our_deltas(adapter: Adapter) -> dict[str, torch.Tensor]:
    summed: dict[str, torch.Tensor] = {}
    for module in adapter.modules:
        name = module.target.parameter
        summed[name] = summed.get(name, torch.zeros(())) + module.delta_weight()
    return summed


@pytest.mark.parametrize("fan_in_fan_out", [True, False])
@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_our_delta_weights_are_what_loralib_merges(bias: str, fan_in_fan_out: bool, tmp_path: Path) -> None:
    model = seeded(Net(alpha=7, fan_in_fan_out=fan_in_fan_out), 0)
    torch.save(loralib.lora_state_dict(model, bias), tmp_path / "lora.pt")
    slots = SLOTS if fan_in_fan_out else SLOTS.replace(":transposed", "")
    options = {**OPTIONS, "slots": slots, **({"transposed": "down"} if fan_in_fan_out else {})}
    adapter = adaptertools.read(tmp_path / "lora.pt", alpha=7, **options)
    expected = merged_deltas(model)
    found = our_deltas(adapter)
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        assert found[name].shape == delta.shape, name
        assert torch.allclose(found[name], delta, rtol=1e-6, atol=1e-7), name


def our_adapter(
    *, fan_in_fan_out: bool, r: int = 2, alpha: float = 7.0, rule: ScaleRule = ScaleRule.ALPHA_OVER_RANK
) -> Adapter:
    """An adapter for Net that loralib had no hand in."""
    generator = torch.Generator().manual_seed(5)

    def module(name: str, n_in: int, n_out: int, fold: int = 1, **fields: Any) -> LoraModule:
        target = fields.pop("target", None) or Target(parameter=name)
        return LoraModule(
            target=target,
            lora_A=torch.randn(r * fold, n_in * fold, generator=generator) * 0.3,
            lora_B=torch.randn(n_out * fold, r * fold, generator=generator) * 0.3,
            alpha=alpha,
            scale_rule=rule,
            **fields,
        )

    def slots(name: str, transposed: bool) -> list[LoraModule]:
        spans = [RowSlice(start=start, stop=start + 8, total=24) for start in (0, 16)]
        targets = [Target(parameter=name, rows=span) for span in spans]
        return [module(name, 8, 8, target=target, transposed=transposed) for target in targets]

    return Adapter(
        modules=(
            module("tokens", 13, 8, kind=Kind.EMBEDDING, transposed=True),
            module("up", 8, 12, transposed=False),
            module("down", 12, 8, transposed=fan_in_fan_out),
            *slots("fused", False),
            *slots("turned", fan_in_fan_out),
            module("conv", 1, 4, fold=3, kind=Kind.CONV, shape=(4, 1, 3, 3)),
        )
    )


def loaded(adapter: Adapter, path: Path, container: str, model: nn.Module) -> nn.Module:
    """The model with our file in it, loaded as loralib's README loads one."""
    adaptertools.write(adapter, path, format="loralib", container=container)
    if container == "torch":
        tensors = torch.load(path)
    else:
        from safetensors.torch import load_file

        tensors = load_file(path)
    result = model.load_state_dict(tensors, strict=False)
    assert result.unexpected_keys == []
    assert not [key for key in result.missing_keys if "lora_" in key]
    return model


def merged_by_us(adapter: Adapter, model: nn.Module) -> nn.Module:
    """The model with our delta weights added to its own, and its factors at zero."""
    deltas = our_deltas(adapter)
    with torch.no_grad():
        for name, layer, weight in layers(model):
            weight += deltas[name]
            layer.lora_A.zero_()
            layer.lora_B.zero_()
    return model


@pytest.mark.parametrize("container", ["torch", "safetensors"])
@pytest.mark.parametrize("fan_in_fan_out", [True, False])
@pytest.mark.parametrize("evaluated", [True, False])
def test_our_file_gives_the_forward_pass_that_our_delta_weights_give(
    evaluated: bool, fan_in_fan_out: bool, container: str, tmp_path: Path
) -> None:
    adapter = our_adapter(fan_in_fan_out=fan_in_fan_out)
    base = {"alpha": 7.0, "fan_in_fan_out": fan_in_fan_out}
    ours = loaded(adapter, tmp_path / "lora", container, seeded(Net(**base), 1)).train(not evaluated)
    reference = merged_by_us(adapter, seeded(Net(**base), 1))
    plain = seeded(Net(**base), 1)
    assert (ours(IDS) - reference(IDS)).abs().max() < 1e-5
    assert (ours(IDS) - plain(IDS)).abs().max() > 1e-2
    unadapted = merged_by_us(our_adapter(fan_in_fan_out=fan_in_fan_out, alpha=0.0), seeded(Net(**base), 1))
    assert (ours(IDS) - unadapted(IDS)).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("rule", "alpha", "printed"),
    [
        (ScaleRule.ALPHA_OVER_SQRT_RANK, 5.0, 5 * 2**0.5),
        (ScaleRule.DIRECT, 1.5, 3.0),
    ],
)
def test_a_model_built_with_the_alpha_that_was_printed_acts_as_the_adapter(
    rule: ScaleRule, alpha: float, printed: float, tmp_path: Path
) -> None:
    adapter = our_adapter(fan_in_fan_out=True, rule=rule, alpha=alpha)
    report = adaptertools.write(adapter, tmp_path / "note.pt", format="loralib")
    said = next(note for note in report.notes if "lora_alpha=" in note)
    number = float(said.rpartition("lora_alpha=")[2])
    assert number == pytest.approx(printed, rel=1e-15)
    ours = loaded(adapter, tmp_path / "lora.pt", "torch", seeded(Net(alpha=number, fan_in_fan_out=True), 1)).eval()
    reference = merged_by_us(adapter, seeded(Net(alpha=number, fan_in_fan_out=True), 1))
    assert (ours(IDS) - reference(IDS)).abs().max() < 1e-5


def test_layers_of_several_ranks_act_as_the_adapter_when_alpha_is_each_ones_r(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    ranks, alphas = {"0": 2, "1": 3}, {"0": 5.0, "1": 11.0}
    adapter = Adapter(
        modules=tuple(
            LoraModule(
                target=Target(parameter=name),
                lora_A=torch.randn(rank, 6, generator=generator),
                lora_B=torch.randn(6, rank, generator=generator),
                alpha=alphas[name],
            )
            for name, rank in ranks.items()
        )
    )
    model = nn.Sequential(*(loralib.Linear(6, 6, r=rank, lora_alpha=rank) for rank in ranks.values()))
    seeded(model, 1)
    x = torch.randn(4, 6, generator=generator)
    expected = x
    for module, layer in zip(adapter.modules, model, strict=True):
        expected = expected @ (layer.weight + module.delta_weight()).T + layer.bias
    ours = loaded(adapter, tmp_path / "lora.pt", "torch", model)
    assert (ours(x) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_loralib_to_peft_acts_as_loralib_does(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    alpha = 7
    trained = seeded(Net(alpha=alpha, fan_in_fan_out=False), 0)
    state = loralib.lora_state_dict(trained, "all") | {f"head.{k}": v for k, v in trained.head.state_dict().items()}
    state = {key: value for key, value in state.items() if not key.startswith("conv.")}
    torch.save(state, tmp_path / "lora.pt")
    options = {"alpha": alpha, "slots": "fused=TFT,turned=TFT", "embeddings": "tokens"}
    adaptertools.convert(tmp_path / "lora.pt", tmp_path / "peft", to="peft", read_options=options)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(13, 8)
            self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
            self.fused, self.turned = nn.Linear(8, 24), nn.Linear(8, 24)
            self.conv = nn.Conv2d(1, 4, 3, padding=1)
            self.head = nn.Linear(24, 5)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            hidden = self.down(torch.relu(self.up(self.tokens(ids))))
            hidden = self.fused(hidden) * torch.tanh(self.turned(hidden))
            return self.head(self.conv(hidden.unsqueeze(1)).mean(dim=1))

    plain = Plain()
    with torch.no_grad():
        trained.conv.lora_B.zero_()
    own = {k.replace("conv.conv.", "conv."): v for k, v in trained.state_dict().items() if "lora_" not in k}
    plain.load_state_dict(own)
    with torch.no_grad():  # the file brings head and biases along
        for name, parameter in plain.named_parameters():
            if name.startswith("head") or (name.endswith("bias") and not name.startswith("conv")):
                parameter.zero_()
    adapted = peft.PeftModel.from_pretrained(plain, str(tmp_path / "peft")).eval()
    assert (adapted(IDS) - trained.eval()(IDS)).abs().max() < 1e-5
