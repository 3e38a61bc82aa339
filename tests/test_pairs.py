"""Every pair of formats that can carry the same adapter, there and back: `diff` is nothing, or the reported rounding.

Formats are found by listing their folder. One that takes a base model is given a base whose names and shapes are those
of the adapter.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hollow_models import hollow_model, shapes_of
from proof import assert_diff_proves, without_component
from safetensors.torch import load_file
from strategies import tensor

import adaptertools
from adaptertools import api, formats
from adaptertools.adapter import Adapter, Base, Kind, LoraModule, ScaleRule, Target
from adaptertools.api import WriteReport
from adaptertools.errors import UnsupportedFeatureError

LLAMA = Path(__file__).parents[1] / "fixtures" / "base" / "llama_tiny"
CONFIG = json.loads((LLAMA / "config.json").read_text())
SHAPES = {name: tuple(weight.shape) for name, weight in load_file(LLAMA / "model.safetensors").items()}
WRITTEN = [name for name in formats.names() if formats.get(name).CONTAINERS]
DIRECT, OVER_RANK, OVER_ROOT = ScaleRule.DIRECT, ScaleRule.ALPHA_OVER_RANK, ScaleRule.ALPHA_OVER_SQRT_RANK


def on_llama(
    parameter: str, rank: int = 4, alpha: float = 8.0, rule: ScaleRule = OVER_RANK, dtype: torch.dtype = torch.float32
) -> LoraModule:
    """A module on a linear layer of the tiny Llama."""
    return on_linear(Target(parameter=parameter), *SHAPES[f"{parameter}.weight"], rank, alpha, rule, dtype)


def on_linear(
    target: Target,
    n_out: int,
    n_in: int,
    rank: int = 4,
    alpha: float = 8.0,
    rule: ScaleRule = OVER_RANK,
    dtype: torch.dtype = torch.float32,
) -> LoraModule:
    seed = sum(map(ord, str(target)))
    return LoraModule(
        target=target,
        lora_A=tensor((rank, n_in), dtype, seed),
        lora_B=tensor((n_out, rank), dtype, seed + 1),
        alpha=alpha,
        scale_rule=rule,
    )


def plain() -> Adapter:
    """One rank and one scaling that is a power of two: every format holds it bit for bit."""
    leaves = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")
    return adapter_of(*(on_llama(f"model.layers.{layer}.{leaf}") for layer in (0, 1) for leaf in leaves))


def mixed() -> Adapter:
    """Ranks, alphas and scale rules that differ, on some layers alone and on the output layer."""
    return adapter_of(
        on_llama("model.layers.0.self_attn.q_proj", rank=8, alpha=16.0, rule=OVER_ROOT),
        on_llama("model.layers.0.self_attn.k_proj", rank=3, alpha=5.0),
        on_llama("model.layers.1.self_attn.q_proj", rank=1, alpha=0.1, rule=DIRECT),
        on_llama("model.layers.1.mlp.gate_proj", rank=5, alpha=3.7, rule=OVER_ROOT),
        on_llama("lm_head", rank=2, alpha=32.0),
    )


def half_precision() -> Adapter:
    """Factors of float16 and bfloat16 under scalings that these cannot hold."""
    return adapter_of(
        on_llama("model.layers.0.self_attn.v_proj", alpha=0.3, dtype=torch.float16),
        on_llama("model.layers.1.self_attn.v_proj", alpha=2.0, rule=OVER_ROOT, dtype=torch.bfloat16),
        on_llama("model.layers.1.mlp.up_proj", rank=3, alpha=3.0, dtype=torch.bfloat16),
    )


def dora() -> Adapter:
    modules = [on_llama(f"model.layers.{layer}.self_attn.{leaf}") for layer in (0, 1) for leaf in ("q_proj", "k_proj")]
    return adapter_of(*(replace(m, magnitude=tensor((m.out_features,), torch.float32, 3).abs()) for m in modules))


def embedding() -> Adapter:
    n_tokens, size = SHAPES["model.embed_tokens.weight"]
    tokens = on_linear(Target(parameter="model.embed_tokens"), size, n_tokens, alpha=4.0)
    return adapter_of(
        replace(tokens, kind=Kind.EMBEDDING, transposed=True), on_llama("model.layers.0.self_attn.q_proj", alpha=4.0)
    )


def conv() -> Adapter:
    """Convolutions of kernels 3 and 1, and a linear layer."""
    home = "down_blocks.0.resnets.0"
    return adapter_of(
        replace(on_linear(Target(parameter=f"{home}.conv1"), 8, 36), kind=Kind.CONV, shape=(8, 4, 3, 3)),
        replace(on_linear(Target(parameter=f"{home}.conv_shortcut"), 8, 4), kind=Kind.CONV, shape=(8, 4, 1, 1)),
        on_linear(Target(parameter=f"{home}.time_emb_proj"), 8, 16),
    )


def two_models() -> Adapter:
    """Modules of the same name in two models of one pipeline."""
    targets = [Target(parameter="layers.0.to_q", component=name) for name in ("unet", "text_encoder")]
    return adapter_of(
        *(on_linear(target, 8, 16, alpha=alpha) for target, alpha in zip(targets, (8.0, 3.0), strict=True))
    )


def opaque_names() -> Adapter:
    """Names that could not be turned back into module paths."""
    names = ("down_blocks_0_to_q", "down_blocks_0_to_k")
    return adapter_of(*(on_linear(Target(parameter=name, component="unet", opaque=True), 8, 16) for name in names))


def adapter_of(*modules: LoraModule) -> Adapter:
    return Adapter(modules=modules, bases={"": Base(id="tiny/model")})


CASES: dict[str, Callable[[], Adapter]] = {
    made.__name__: made for made in (plain, mixed, half_precision, dora, embedding, conv, two_models, opaque_names)
}

ONE_MODEL = "the adapter is for several models"
NO_NAME = "could not be turned back|by the names of its layers"
REFUSED = {
    ("conv", "loralib"): "Conv2d",
    **{("two_models", name): ONE_MODEL for name in ("loralib", "mlx", "peft")},
    **{("opaque_names", name): NO_NAME for name in ("diffusers", "loralib", "mlx", "peft")},
    **{(name, "gguf"): "of an image model" for name in ("two_models", "opaque_names")},
}
"""The adapters that a format refuses though it carries each of their features, and what the message says of it."""


def carried(case: str, name: str) -> bool:
    """Whether the format carries what the adapter holds, and takes it."""
    return CASES[case]().features <= formats.get(name).CARRIES and (case, name) not in REFUSED


def routes() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each adapter there and back by every pair of formats that carry it, and out of PEFT by both and into it again."""
    for case in CASES:
        takers = [name for name in WRITTEN if carried(case, name)]
        for one, other in itertools.permutations(takers, 2):
            yield case, (one, other, one)
            if "peft" not in (one, other) and "peft" in takers:
                yield case, ("peft", one, other, "peft")


def marked(case: str, route: tuple[str, ...]) -> Any:
    """Long routes are quick enough to run at once for two adapters alone."""
    slow = len(route) > 3 and case not in ("plain", "mixed")
    return pytest.param(case, route, id=f"{case}: {' '.join(route)}", marks=[pytest.mark.slow] if slow else [])


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each adapter a model with the weights that it changes, beside those of the tiny Llama."""
    folder = tmp_path_factory.mktemp("bases")
    return {case: hollow_model(folder / case, SHAPES | shapes_of(make()), CONFIG) for case, make in CASES.items()}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small take longer to share out than to multiply."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def go(start: Adapter, route: Sequence[str], folder: Path, base: Path) -> None:
    """Write, read and prove at every stop; what is read at one is written at the next."""
    named = not any(module.target.opaque for module in start.modules)
    now, reports = start, []
    for number, name in enumerate(route):
        dst = folder / f"{number}-{name}{'' if formats.get(name).FOLDER else '.bin'}"
        try:
            reports.append(write(now, dst, name, base))
        except UnsupportedFeatureError as error:
            pytest.fail(f"{name} refuses what its CARRIES says it takes; if rightly, say why in REFUSED: {error}")
        assert api.detect(dst) == name
        now = adaptertools.read(dst, base=base if named else None)
        assert_diff_proves(without_component(start), without_component(now), *reports)


def write(one: Adapter, dst: Path, name: str, base: Path) -> WriteReport:
    return adaptertools.write(one, dst, format=name, base=base)


@pytest.mark.parametrize(("case", "route"), [marked(*one) for one in routes()])
def test_an_adapter_stays_what_it_is_from_format_to_format(
    case: str, route: Sequence[str], tmp_path: Path, bases: dict[str, Path]
) -> None:
    go(CASES[case](), route, tmp_path, bases[case])


@pytest.mark.parametrize(("case", "name"), REFUSED)
def test_what_a_format_refuses_is_refused_still(case: str, name: str, tmp_path: Path, bases: dict[str, Path]) -> None:
    assert CASES[case]().features <= formats.get(name).CARRIES
    with pytest.raises(UnsupportedFeatureError, match=REFUSED[case, name]):
        write(CASES[case](), tmp_path / "out", name, bases[case])


def test_every_format_takes_every_adapter_of_plain_factors() -> None:
    """So that no pair is left out of the routes: what is refused beyond CARRIES stands in REFUSED alone."""
    for name in WRITTEN:
        assert all(carried(case, name) for case in ("plain", "mixed", "half_precision")), name
    assert len({name for _, route in routes() for name in route}) == len(WRITTEN)
