"""llama.cpp is served what PEFT says, of every family; its converter writes the same bytes where that is right.

Needs llama_cpp (llama-cpp-python) and, in LLAMA_CPP_SOURCE, a folder with the source of its converters, as `.ci/llama`
unpacks it from the package's own archive.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_models import make_adapter, make_model, patterns
from numpy.typing import NDArray

import adaptertools
from adaptertools.dialects.gguf.families import FAMILIES
from adaptertools.errors import UnsupportedFeatureError

pytestmark = [
    pytest.mark.consumers,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]

TOKENS = [5, 17, 3, 88, 42, 9, 71, 60, 23, 11, 95, 34]
VARIANTS: Mapping[str, Callable[[str], dict[str, Any]]] = {
    "plain": lambda family: {},
    "rslora": lambda family: {"use_rslora": True},
    "patterns": patterns,
    "both": lambda family: {"use_rslora": True, **patterns(family)},
}
GELU = ("gemma", "gemma2", "gemma3", "gemma3_text", "phi", "starcoder2")
"""Families whose activation llama.cpp looks up in a table of float16, with an adapter and without."""
Array = NDArray[np.float32]


@dataclass(frozen=True)
class Made:
    """A model and its adapters: PEFT's logits, and the files that llama.cpp's own converters made."""

    folder: Path
    plain: Array
    logits: Mapping[str, Array]

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def base(self) -> Path:
        return self.folder / "base.gguf"

    def peft(self, variant: str) -> Path:
        return self.folder / variant

    def converted(self, variant: str) -> Path:
        return self.folder / f"{variant}.theirs.gguf"


def run_converters(jobs: list[dict[str, Any]]) -> dict[str, str]:
    source = os.environ.get("LLAMA_CPP_SOURCE")
    assert source, "LLAMA_CPP_SOURCE must name a folder with llama.cpp's converters: .ci/llama unpacks one"
    script = Path(__file__).with_name("llama_cpp_conversion.py")
    ran = subprocess.run(
        [sys.executable, str(script), source], input=json.dumps(jobs), capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    failed: dict[str, str] = json.loads(ran.stdout)
    return {f"{jobs[int(number)]}": reason for number, reason in failed.items()}


def jobs_for(made: Made) -> list[dict[str, Any]]:
    model = [{"model": str(made.model), "to": str(made.base)}]
    return model + [
        {"adapter": str(made.peft(name)), "base": str(made.model), "to": str(made.converted(name)), "type": "f32"}
        for name in made.logits
    ]


def make(folder: Path, model_type: str, variants: Mapping[str, dict[str, Any]], **options: Any) -> Made:
    model = make_model(model_type, folder / "model", **options)
    ids = torch.tensor([TOKENS])
    with torch.no_grad():
        plain = model(input_ids=ids).logits[0].numpy()
        logits = {}
        for name, given in variants.items():
            wrapped = make_adapter(model, model_type, folder / name, **given)
            logits[name] = wrapped(input_ids=ids).logits[0].numpy()
            model = wrapped.unload()
    return Made(folder, plain, logits)


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """A tiny model of every family."""
    made = {}
    for name in FAMILIES:
        variants = {variant: options(name) for variant, options in VARIANTS.items()}
        made[name] = make(tmp_path_factory.mktemp(name), name, variants)
    assert run_converters([job for one in made.values() for job in jobs_for(one)]) == {}
    return made


def served(base: Path, adapter: Path | None = None) -> Array:
    """The logits of llama.cpp, with keys and values in float32."""
    import llama_cpp

    model = llama_cpp.Llama(
        str(base),
        lora_path=str(adapter) if adapter else None,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        flash_attn=False,
        n_ctx=64,
        n_threads=2,
        verbose=False,
    )
    try:
        model.eval(TOKENS)
        return np.array(model.scores[: len(TOKENS)])
    finally:
        model.close()


def largest(difference: Array) -> float:
    return float(np.abs(difference).max())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_is_served_pefts_logits(family: str, variant: str, families: dict[str, Made], tmp_path: Path) -> None:
    made = families[family]
    options = {"read_options": {"base": made.model}}
    report = adaptertools.convert(made.peft(variant), tmp_path / "a.gguf", to="gguf", **options)
    assert report.max_relative_error < 1e-7
    allowed = 5e-3 if family in GELU else 1e-4
    assert largest(served(made.base) - made.plain) < allowed
    assert largest(made.logits[variant] - made.plain) > 50 * allowed
    assert largest(served(made.base, tmp_path / "a.gguf") - made.logits[variant]) < allowed


def tensors_of(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    import gguf

    return {
        tensor.name: (tensor.tensor_type.name, tuple(int(size) for size in tensor.shape), tensor.data.tobytes())
        for tensor in gguf.GGUFReader(path).tensors
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_our_tensors_are_those_of_llama_cpps_converter_byte_for_byte(
    family: str, families: dict[str, Made], tmp_path: Path
) -> None:
    made = families[family]
    adaptertools.convert(made.peft("plain"), tmp_path / "a.gguf", to="gguf", read_options={"base": made.model})
    assert tensors_of(tmp_path / "a.gguf") == tensors_of(made.converted("plain"))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_llama_cpps_converter_wrote_is_read_as_pefts_delta_weights(family: str, families: dict[str, Made]) -> None:
    made = families[family]
    found = adaptertools.read(made.converted("plain"), base=made.model)
    assert adaptertools.diff(adaptertools.read(made.peft("plain")), found, tolerance=0.0).same


@pytest.mark.parametrize("variant", ["rslora", "patterns"])
def test_llama_cpps_converter_is_wrong_without_a_word_where_ours_is_right(
    variant: str, families: dict[str, Made]
) -> None:
    made = families["llama"]
    assert largest(served(made.base, made.converted(variant)) - made.logits[variant]) > 0.1


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A Llama with more than the usual modules adapted, rank 32 so that blocks of quantised numbers fit."""
    leaves = ["q_proj", "k_proj", "down_proj"]
    variants = {
        "ends": {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "rank_pattern": {"lm_head": 3}},
        "wide": {"target_modules": leaves, "r": 32, "lora_alpha": 16},
        "alora": {"target_modules": leaves, "alora_invocation_tokens": [7, 11], "task_type": "CAUSAL_LM"},
    }
    made = make(tmp_path_factory.mktemp("llama_more"), "llama", variants)
    jobs = [{"model": str(made.model), "to": str(made.base)}]
    for variant, kind in (("wide", "f16"), ("wide", "q8_0"), ("alora", "f32")):
        to = str(made.folder / f"{variant}.{kind}.gguf")
        jobs.append({"adapter": str(made.peft(variant)), "base": str(made.model), "to": to, "type": kind})
    assert run_converters(jobs) == {}
    return made


def converted(made: Made, variant: str, to: Path, **options: Any) -> adaptertools.WriteReport:
    return adaptertools.convert(
        made.peft(variant), to, to="gguf", read_options={"base": made.model}, drop=["full-weights"], **options
    )


def test_embedding_and_head_are_served(llama: Made, tmp_path: Path) -> None:
    converted(llama, "ends", tmp_path / "a.gguf")
    assert largest(llama.logits["ends"] - llama.plain) > 0.1
    assert largest(served(llama.base, tmp_path / "a.gguf") - llama.logits["ends"]) < 1e-4


@pytest.mark.parametrize(("dtype", "allowed"), [("f16", 2e-2), ("bf16", 1e-1)])
def test_half_precision_is_served_as_far_as_it_reaches(dtype: str, allowed: float, llama: Made, tmp_path: Path) -> None:
    report = converted(llama, "wide", tmp_path / "a.gguf", dtype=dtype)
    assert not report.exact
    assert largest(llama.logits["wide"] - llama.plain) > 1
    assert largest(served(llama.base, tmp_path / "a.gguf") - llama.logits["wide"]) < allowed


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_what_we_make_of_files_in_half_precision_and_quantised_is_served_as_they_are(
    kind: str, llama: Made, tmp_path: Path
) -> None:
    theirs = llama.folder / f"wide.{kind}.gguf"
    report = adaptertools.convert(theirs, tmp_path / "peft", to="peft", read_options={"base": llama.model})
    assert report.exact
    adaptertools.convert(tmp_path / "peft", tmp_path / "a.gguf", to="gguf", read_options={"base": llama.model})
    distance = largest(served(llama.base, theirs) - llama.logits["wide"])
    assert distance > 1e-6
    assert largest(served(llama.base, tmp_path / "a.gguf") - served(llama.base, theirs)) < 2 * distance


def test_rescaling_and_stacking_work_without_a_base_and_are_served(llama: Made, tmp_path: Path) -> None:
    theirs = adaptertools.read(llama.folder / "alora.f32.gguf")
    assert all(module.target.opaque for module in theirs.modules)
    twice = adaptertools.stack([theirs, theirs], [0.5, 0.5]).adapter
    adaptertools.write(twice, tmp_path / "a.gguf", format="gguf")
    found, expected = (served(llama.base, path) for path in (tmp_path / "a.gguf", llama.folder / "alora.f32.gguf"))
    assert largest(expected - llama.plain) > 0.1
    assert largest(found - expected) < 1e-4


def test_llama_cpp_finds_invocation_tokens_and_our_record(llama: Made, tmp_path: Path) -> None:
    import ctypes

    import llama_cpp

    converted(llama, "alora", tmp_path / "a.gguf")
    model = llama_cpp.llama_model_load_from_file(str(llama.base).encode(), llama_cpp.llama_model_default_params())
    adapter = llama_cpp.llama_adapter_lora_init(model, str(tmp_path / "a.gguf").encode())
    assert adapter
    count = llama_cpp.llama_adapter_get_alora_n_invocation_tokens(adapter)
    assert list(llama_cpp.llama_adapter_get_alora_invocation_tokens(adapter)[:count]) == [7, 11]
    text = ctypes.create_string_buffer(1 << 16)
    assert llama_cpp.llama_adapter_meta_val_str(adapter, b"adaptertools", text, len(text)) > 0
    assert json.loads(text.value)["history"][-1]["operation"] == "convert"
    llama_cpp.llama_adapter_lora_free(adapter)
    llama_cpp.llama_model_free(model)
    theirs, ours = (adaptertools.read(path) for path in (llama.folder / "alora.f32.gguf", tmp_path / "a.gguf"))
    assert theirs.invocation_tokens == ours.invocation_tokens == (7, 11)


_EMBEDDING_OF_A_TIED_BASE = """
import sys
import llama_cpp
model = llama_cpp.Llama(sys.argv[1], lora_path=sys.argv[2], n_ctx=64, n_threads=2, verbose=False)
print("loaded", flush=True)
model.eval([5, 17, 3])
print("served", flush=True)
"""


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_llama_cpp_aborts_where_an_embedding_of_a_tied_base_is_adapted_which_we_refuse(tmp_path: Path) -> None:
    variants = {"ends": {"target_modules": ["embed_tokens"]}}
    made = make(tmp_path, "llama", variants, tie_word_embeddings=True)
    assert run_converters(jobs_for(made)) == {}
    command = [sys.executable, "-c", _EMBEDDING_OF_A_TIED_BASE, str(made.base), str(made.converted("ends"))]
    quiet = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=quiet)
    assert (ran.returncode < 0, ran.stdout.split()) == (True, ["loaded"])
    with pytest.raises(UnsupportedFeatureError, match="ties its head to its embedding"):
        converted(made, "ends", tmp_path / "a.gguf")
