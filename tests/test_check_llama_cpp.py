"""What `fix` writes for llama.cpp and Ollama, with llama.cpp as the judge.

Needs llama_cpp and LLAMA_CPP_SOURCE, as tests/test_gguf_consumer.py does.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import make_adapter, make_model
from test_gguf_consumer import TOKENS, largest, run_converters, served

import adaptertools

pytestmark = [
    pytest.mark.consumers,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]

VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "v_proj": 7}, "alpha_pattern": {"k_proj": 3.0, "layers.1.*o_proj": 1.0}},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("consumer", ["llama.cpp", "ollama"])
def test_llama_cpp_gives_pefts_logits_with_the_fixed_file(consumer: str, variant: str, tmp_path: Path) -> None:
    base, adapter, place = tmp_path / "model", tmp_path / "adapter", tmp_path / "fixed.gguf"
    model = make_model("llama", base)
    with torch.no_grad():
        plain = model(input_ids=torch.tensor([TOKENS])).logits[0].numpy()
        wrapped = make_adapter(model, "llama", adapter, **VARIANTS[variant])
        wanted = wrapped(input_ids=torch.tensor([TOKENS])).logits[0].numpy()
    assert run_converters([{"model": str(base), "to": str(tmp_path / "base.gguf")}]) == {}
    assert not adaptertools.check(adapter, consumer, base=base).passes
    fixed = adaptertools.fix(adapter, place, consumer, base=base)
    assert fixed.relative_error < 1e-7
    assert adaptertools.check(place, consumer, base=base).passes
    assert largest(wanted - plain) > 1e-2
    assert largest(served(tmp_path / "base.gguf", place) - wanted) < 1e-4
