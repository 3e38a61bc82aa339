"""The rules of every consumer: each is broken by what it is about and by nothing else, and says where it was read."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from check_cases import (
    ALSO,
    BREAKING,
    GPT2,
    kept,
    module,
    ranked,
    together,
    whole,
    with_config,
    with_modules,
    with_more,
)

from adaptertools import consumers, formats
from adaptertools.cli.check import CONSUMERS
from adaptertools.consumers.judge import judge
from adaptertools.consumers.layers import is_of_language_model
from adaptertools.consumers.rule import Consumer, Rule, Verdict, version_number
from adaptertools.errors import OptionError
from adaptertools.module import Target

RULES = [
    (consumer, rule)
    for name in consumers.names()
    for consumer in [consumers.get(name)]
    for rule in consumer.rules
    if rule.verdict is not Verdict.UNCHECKED
]


def version_of(consumer: Consumer, rule: Rule) -> str:
    """The newest version in which the rule holds."""
    return next(version for version in reversed(consumer.versions) if rule.holds_in(version))


def untold(consumer: Consumer) -> set[str]:
    """The rules that no file tells anything of."""
    return {rule.name for rule in consumer.rules if rule.verdict is Verdict.UNCHECKED}


def format_of(consumer: Consumer, rule: Rule) -> str:
    """A format that the rule is about."""
    return rule.formats[0] if rule.formats else consumer.writes


def label(case: object) -> str:
    if isinstance(case, Consumer):
        return case.name
    assert isinstance(case, Rule)
    return f"{case.name} {case.since}{'-' if case.since or case.until else ''}{case.until}".strip()


@pytest.mark.parametrize(("consumer", "rule"), RULES, ids=label)
def test_each_rule_is_broken_by_what_it_is_about_and_no_other_is(consumer: Consumer, rule: Rule) -> None:
    version = version_of(consumer, rule)
    sound = kept(consumer.name, format_of(consumer, rule))
    assert {f.verdict for f in judge(sound, consumer, version) if f.rule not in untold(consumer)} == {Verdict.OK}
    broken = BREAKING[consumer.name][rule.name](sound)
    also = (*ALSO.get((consumer.name, rule.name), ()), *untold(consumer))
    findings = [f for f in judge(broken, consumer, version) if f.verdict is not Verdict.OK and f.rule not in also]
    assert [(finding.rule, finding.verdict) for finding in findings] == [(rule.name, rule.verdict)]
    assert findings[0].found
    assert findings[0].found[0] in findings[0].reason


def test_every_case_belongs_to_a_rule() -> None:
    for name, cases in BREAKING.items():
        consumer = consumers.get(name)
        assert set(cases) == {rule.name for rule in consumer.rules} - untold(consumer), name


@pytest.mark.parametrize("name", ["vllm", "sglang", "lorax", "tensorrt-llm"])
def test_whether_a_server_adapts_the_model_family_is_said_to_be_unchecked(name: str) -> None:
    consumer = consumers.get(name)
    (found,) = [f for f in judge(kept(name), consumer, consumer.newest) if f.rule == "architecture"]
    assert (found.verdict, found.passes) == (Verdict.UNCHECKED, True)
    assert found.reason == "whether this release supports LoRA for this model family is not among the rules"


@pytest.mark.parametrize(("consumer", "rule"), RULES, ids=label)
def test_each_rule_says_why_and_where_it_was_read(consumer: Consumer, rule: Rule) -> None:
    assert "/" in rule.source
    assert rule.source.endswith((".py", ".go", ".cpp"))
    assert rule.because
    assert rule.verdict in (Verdict.FAILS, Verdict.CHANGES, Verdict.NOTE)
    for version in filter(None, (rule.since, rule.until)):
        assert version in consumer.versions


@pytest.mark.parametrize("name", consumers.names())
def test_a_consumer_is_named_alike_everywhere_and_loads_what_fix_writes(name: str) -> None:
    consumer = consumers.get(name)
    assert name in CONSUMERS
    assert consumer.repository.count("/") == 1
    assert consumer.writes in consumer.formats
    assert set(consumer.keeps) <= set(consumer.formats)
    assert set(consumer.formats) <= set(formats.names())
    assert not consumer.released or consumer.versions == tuple(sorted(consumer.versions, key=version_number))


def test_the_command_line_knows_the_same_consumers() -> None:
    assert consumers.names() == CONSUMERS


@pytest.mark.parametrize("name", consumers.names())
def test_a_file_of_another_format_is_to_be_converted_first(name: str) -> None:
    consumer = consumers.get(name)
    other = replace(kept(name), format="flax", files=(), config={})
    first = judge(other, consumer, consumer.newest)[0]
    assert (first.rule, first.verdict) == ("format", Verdict.FAILS)
    assert "this is flax" in first.reason


@pytest.mark.parametrize("name", consumers.names())
def test_names_are_not_checked_without_a_base_model(name: str) -> None:
    consumer = consumers.get(name)
    without = replace(kept(name), unmatched=None, misshapen=None)
    for has_base, wanted in ((False, "needs --base"), (True, "needs --base with config.json and weights")):
        findings = judge(replace(without, has_base=has_base), consumer, consumer.newest)
        unchecked = {
            f.rule: f.reason for f in findings if f.verdict is Verdict.UNCHECKED and f.rule not in untold(consumer)
        }
        assert unchecked == {"names in the base": wanted, "sizes in the base": wanted}


@pytest.mark.parametrize(
    ("count", "keys", "left_out"),
    [
        (-1, ["self_attn.q_proj"], []),
        (1, ["self_attn.q_proj"], ["model.layers.0.self_attn.q_proj"]),
        (1, ["model.layers.0.self_attn.q_proj", "self_attn.q_proj"], []),
        (-1, None, ["lm_head"]),
        (-1, ["lm_head", "self_attn.q_proj"], []),
    ],
)
def test_mlx_makes_modules_for_whole_paths_and_within_the_last_layers(
    count: int, keys: list[str] | None, left_out: list[str]
) -> None:
    subject = kept("mlx")
    if keys is None or "lm_head" in keys:
        subject = with_more(module("lm_head"))(subject)
    section = {"rank": 16, "scale": 1.0, "dropout": 0.0, **({} if keys is None else {"keys": keys})}
    subject = with_config(num_layers=count, lora_parameters=section)(subject)
    found = {f.rule: f.found for f in judge(subject, consumers.get("mlx"), "0.32.2")}
    assert list(found["keys"]) == left_out


VLLM = consumers.get("vllm")


def verdicts(version: str, *rules: str) -> Iterator[tuple[str, str]]:
    for rule in rules:
        subject = BREAKING["vllm"][rule](kept("vllm"))
        found = [f.verdict for f in judge(subject, VLLM, version) if f.rule == rule and f.verdict is not Verdict.OK]
        yield rule, str(found[0]) if found else "ok"


def test_vllm_reads_patterns_and_refuses_what_it_once_ignored_since_0_32() -> None:
    rules = ("rank_pattern", "alpha_pattern", "aLoRA", "layer replication", "changed base")
    assert dict(verdicts("0.31.0", *rules)) == dict.fromkeys(rules, "changes meaning")
    assert dict(verdicts("0.33.0", *rules)) == {
        "rank_pattern": "ok",
        "alpha_pattern": "ok",
        "aLoRA": "fails",
        "layer replication": "fails",
        "changed base": "fails",
    }


def test_vllm_refuses_rslora_in_0_6_alone() -> None:
    assert [dict(verdicts(version, "rsLoRA"))["rsLoRA"] for version in ("0.6.6", "0.8.5")] == ["fails", "ok"]


@pytest.mark.parametrize(("version", "allowed"), [("0.26.0", False), ("0.31.0", True)])
def test_vllm_takes_the_head_of_a_classifier_since_0_31(version: str, allowed: bool) -> None:
    findings = judge(whole("score.weight")(kept("vllm")), VLLM, version)
    assert all(finding.passes for finding in findings) is allowed


@pytest.mark.parametrize(
    ("asked", "read"),
    [(None, "0.33.0"), ("0.33.0", "0.33.0"), ("v0.25.1", "0.20.0"), ("0.5", "0.6.6"), ("1.0", "0.33.0")],
)
def test_a_version_has_the_rules_of_the_last_one_read_before_it(asked: str | None, read: str) -> None:
    assert VLLM.read_version(asked) == read


@pytest.mark.parametrize(
    ("name", "asked", "read"),
    [
        ("ollama", None, "fb30760"),
        ("ollama", "01cf744", "01cf744"),
        ("ollama", "0242080", "0242080"),
        ("tensorrt-llm", "037d4ba", "037d4ba"),
        ("tensorrt-llm", "1.0", "007e181"),
    ],
)
def test_a_commit_that_was_read_is_a_version(name: str, asked: str | None, read: str) -> None:
    assert consumers.get(name).read_version(asked) == read


@pytest.mark.parametrize(
    ("model_type", "passes"), [(None, False), ("gpt2", False), ("gpt_bigcode", True)], ids=["unknown", "gpt2", "other"]
)
def test_mlx_lm_knows_no_names_of_gpt2_in_transformers(model_type: str | None, passes: bool) -> None:
    subject = GPT2(replace(kept("mlx"), model_type=model_type))
    (found,) = [f for f in judge(subject, consumers.get("mlx"), "0.32.2") if f.rule == "names of GPT-2"]
    assert found.passes is passes
    assert passes or "mlx-lm's GPT-2 calls it model.h…: convert with --base" in found.reason


@pytest.mark.parametrize(
    ("version", "asked", "expected"),
    [("0.33.0", None, 16), ("0.33.0", 1, 1), ("0.33.0", 320, 320), ("0.6.6", 256, 256)],
)
def test_the_cap_is_what_vllm_is_started_with(version: str, asked: int | None, expected: int) -> None:
    assert VLLM.cap(version, asked) == expected


@pytest.mark.parametrize(("version", "asked", "advice"), [("0.33.0", 48, "start it with 64"), ("0.6.6", 1, "with 8")])
def test_a_cap_that_vllm_cannot_be_started_with_is_refused(version: str, asked: int, advice: str) -> None:
    with pytest.raises(OptionError, match=advice):
        VLLM.cap(version, asked)


def test_a_cap_beyond_all_and_one_below_1_are_refused() -> None:
    with pytest.raises(OptionError, match="512 is the most"):
        VLLM.cap("0.33.0", 1024)
    with pytest.raises(OptionError, match="from 1 on"):
        consumers.get("sglang").cap("0.5.23", 0)


def test_what_is_no_version_is_refused() -> None:
    with pytest.raises(OptionError, match="expected numbers"):
        VLLM.read_version("latest")


def test_an_unknown_consumer_is_refused_with_the_known_ones() -> None:
    with pytest.raises(OptionError, match=r"comfyui, diffusers, llama\.cpp"):
        consumers.get("tgi")


def test_a_rank_that_lorax_need_not_pad_is_taken() -> None:
    lorax = consumers.get("lorax")
    for rank, verdict in ((8, Verdict.OK), (16, Verdict.OK), (4, Verdict.CHANGES), (48, Verdict.OK)):
        change = together(with_modules(ranked(rank)), with_config(r=rank, lora_alpha=rank))
        findings = {f.rule: f.verdict for f in judge(change(kept("lorax")), lorax, lorax.newest)}
        assert findings["rank that is padded"] is verdict, rank


@pytest.mark.parametrize("name", consumers.names())
def test_values_that_are_not_finite_pass_nowhere_and_are_said_to_be_unchecked_where_unread(name: str) -> None:
    consumer = consumers.get(name)
    for nonfinite, verdict in ((("a.lora_A",), Verdict.CHANGES), (None, Verdict.UNCHECKED), ((), Verdict.OK)):
        findings = judge(replace(kept(name), nonfinite=nonfinite), consumer, consumer.newest)
        (found,) = [finding for finding in findings if finding.rule == "finite"]
        assert (found.verdict, found.found) == (verdict, nonfinite or ())


@pytest.mark.parametrize(
    ("component", "name", "expected"),
    [
        ("", "model.layers.0.self_attn.q_proj", True),
        ("unet", "model_layers_0_mlp_down_proj", True),
        ("", "lora_unet_model_layers_12_self_attn_q_proj", True),
        ("", "base_model.model.model.language_model.layers.3.mlp.up_proj", True),
        ("transformer", "transformer.h.0.attn.c_attn", True),
        ("", "gpt_neox.layers.0.attention.dense", True),
        ("text_encoder", "model.layers.0.self_attn.q_proj", False),
        ("", "lora_te1_text_model_encoder_layers_0_self_attn_q_proj", False),
        ("text_encoder", "text_model_encoder_layers_0_mlp_fc1", False),
        ("", "text_model.encoder.layers.0.self_attn.q_proj", False),
        ("transformer", "layers.0.attention.to_q", False),
        ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", False),
        ("", "decoder.layers.0.self_attn.q_proj", False),
    ],
)
def test_names_are_those_of_a_language_model_only_where_nothing_else_has_them(
    component: str, name: str, expected: bool
) -> None:
    assert is_of_language_model(Target(parameter=name, component=component)) is expected


@pytest.mark.parametrize("layers", [1, 3])
def test_what_else_breaks_a_rule_is_counted_in_modules(layers: int) -> None:
    more = [module(f"model.layers.{layer}.self_attn.x", rank=96) for layer in range(layers)]
    findings = judge(with_more(*more)(kept("vllm")), VLLM, VLLM.newest)
    (found,) = [finding for finding in findings if finding.rule == "rank"]
    assert found.reason.endswith(" has rank 96 > 16" + (" and 2 more modules" if layers == 3 else ""))
