"""All that a list of adapters does to a base model, gathered into one draft of edits."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from adaptertools.adapter import WeightRole
from adaptertools.containers.checkpoint import Checkpoint
from adaptertools.errors import MatchError, ShapeError, UnsupportedFeatureError
from adaptertools.merging.draft import Draft
from adaptertools.merging.experts import Experts
from adaptertools.merging.match import Names
from adaptertools.merging.place import Orientation, Shape, Source, bias_change, changes
from adaptertools.merging.tying import Tie, check_untying, find_tie, is_embedding, is_head, refuse_tied, tie_stated
from adaptertools.merging.whole import Member, Whole, check_replacement, gather, is_classifier, labels
from adaptertools.module import LoraModule
from adaptertools.names import parent
from adaptertools.tensors import check_finite, in_parallel

_BIASES = ("bias", "final_logits_bias", "predictions.bias")

_AT_A_TIME = 32
"""The modules that a thread checks before it takes others."""


@dataclass(slots=True, kw_only=True)
class Settings:
    """What the caller allows and asks for."""

    dtype: torch.dtype | None = None
    allow_unmatched: bool = False
    untie: bool = False
    full_weights: int | None = None


@dataclass(slots=True)
class Assembly:
    """The gathering: whole weights first, then the output head, then what is added."""

    base: Checkpoint
    members: Sequence[Member]
    settings: Settings
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    untied: bool = False
    vocabulary: tuple[int, int] | None = None
    labels: int | None = None
    draft: Draft = field(init=False)
    _names: Names = field(init=False)
    _tie: Tie | None = field(init=False)

    def __post_init__(self) -> None:
        self.draft = Draft(self.base, self.settings.dtype)
        self._names = Names(self.base)

    def run(self) -> None:
        """Gather everything.

        Raises: MatchError, ShapeError, UnsupportedFeatureError, NonFiniteError, OptionError
        """
        stated = [name for member in self.members for name in _stated(member)]
        self._tie = find_tie(self.base, self._names, [name for name in stated if is_head(self._names, name)])
        head = self._tie.head if self._tie and not self._tie.stored else None
        whole = gather(self.members, self.base, self._names, head, self.settings.full_weights, self._unmatched)
        self.notes += whole.notes
        self.left_out += whole.left_out
        targets = self._targets(head)
        self._settle_tie(whole, targets)
        for name, (weight, _, _) in whole.weights.items():
            check_replacement(name, weight, self.base, self._is_of_vocabulary)
            self.draft.replace(name, weight)
        self._untie(whole)
        for name, groups in whole.rows.items():
            for rows, _ in groups:
                self.draft.set_rows(name, rows.indices, rows.rows)
                if self.untied and self._tie and self._tie.tied and name == self._tie.embedding:
                    self.draft.set_rows(self._tie.head, rows.indices, rows.rows)
        self._mirror()
        self._add_modules(targets)
        self._check_vocabulary()
        self.labels = labels(whole, self.base)
        if not self.base.config and self._tie is None:
            changed = [name for _, _, name in targets if name is not None and is_embedding(self._names, name)]
            if changed:
                self.notes.append(
                    f"{changed[0]} is changed, and no config.json says whether the output head is tied to it: if it "
                    "is, the head changes too"
                )

    def _targets(self, head: str | None) -> list[tuple[Member, LoraModule, str | None]]:
        """The modules and the tensors that they change, where there is one of their own name."""
        found = []
        for member in self.members:
            for module in member.adapter.modules:
                name = None if module.target.opaque else self._names.find(module.target.parameter)
                if name is None and head is not None and is_head(self._names, module.target.parameter):
                    name = head
                found.append((member, module, name))
        return found

    def _settle_tie(self, whole: Whole, targets: Sequence[tuple[Member, LoraModule, str | None]]) -> None:
        """Whether the head gets a tensor of its own.

        Raises: UnsupportedFeatureError if it needs one and the caller does not allow it
        """
        tie = self._tie
        if tie is None:
            return
        if tie.tied:
            self._drop_repeated_head(whole, tie)
        alone = [
            (name, member.name)
            for member, _, name in targets
            if name == tie.head or (name == tie.embedding and not _ties_weights(member))
        ]
        for name, (_, role, member) in whole.weights.items():
            trained = name == tie.embedding and role is WeightRole.MODULE and not _ties_weights(member)
            if trained or name == tie.head:
                alone.append((name, member.name))
        if tie.tied and alone and not self.settings.untie:
            raise refuse_tied(self.base, tie, *alone[0])
        self.untied = tie.tied and self.settings.untie
        if tie.stored and not tie.tied and alone and tie_stated(self.base.config) is None and self.base.config:
            self.untied = True  # the configuration leaves it to the model's class, which may tie them
        if self.untied and tie.tied:
            check_untying(self.base)
            self.notes.append(f"{tie.head} is written as a tensor of its own, and tie_word_embeddings set to false")

    def _drop_repeated_head(self, whole: Whole, tie: Tie) -> None:
        """A head that is stored again beside the embedding that it is, and changes with it."""
        if tie.head in whole.weights and tie.embedding in whole.weights:
            head, embedding = whole.weights[tie.head][0], whole.weights[tie.embedding][0]
            if head.shape == embedding.shape and torch.equal(head.float(), embedding.float()):
                weight, _, member = whole.weights[tie.embedding]
                whole.weights[tie.embedding] = (weight, WeightRole.BASE, member)
                del whole.weights[tie.head]
                self.notes.append(f"{tie.head} repeats {tie.embedding}, to which it is tied; it changes once")

    def _untie(self, whole: Whole) -> None:
        """The head as a tensor of its own, made of the embedding before that was trained."""
        tie = self._tie
        if tie is None or not self.untied or not tie.tied:
            return
        if tie.head not in whole.weights:
            weight, role, _ = whole.weights.get(tie.embedding, (None, None, None))
            if weight is not None and role is WeightRole.BASE:
                self.draft.replace(tie.head, weight)
            else:
                self.draft.copy(tie.head, tie.embedding)
        self._untie_bias(tie, whole)

    def _untie_bias(self, tie: Tie, whole: Whole) -> None:
        """The bias of the head, which models of BERT's kind tie to that of the module around it."""
        module = tie.head.removesuffix(".weight")
        own, other = f"{module}.bias", f"{parent(module)}.bias"
        if other not in self.base.shapes or self.draft.has(own) or len(self.base.shapes[other]) != 1:
            return
        if other in whole.weights:
            self.draft.replace(own, whole.weights[other][0])
        else:
            self.draft.copy(own, other)

    def _mirror(self) -> None:
        """Tensors that are the same as another one stay so."""
        tie = self._tie
        if tie is not None and tie.tied and tie.stored and not self.untied:
            self.draft.mirror(tie.head, tie.embedding)
        places = {(self.base.tensor(name).data_ptr(), shape): name for name, shape in self._unshared()}
        for name in self.base.shared:
            first = places.get((self.base.tensor(name).data_ptr(), self.base.shapes[name]))
            if first is not None and not (self.untied and tie is not None and name in (tie.head, tie.embedding)):
                self.draft.mirror(name, first)
        if tie is not None and tie.embedding.endswith("shared.weight"):
            for name, shape in self.base.shapes.items():
                copies = name.endswith(("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"))
                if copies and shape == self.base.shapes[tie.embedding]:
                    self.draft.mirror(name, tie.embedding)

    def _unshared(self) -> list[tuple[str, Shape]]:
        return [(name, shape) for name, shape in self.base.shapes.items() if name not in self.base.shared]

    def _add_modules(self, targets: Sequence[tuple[Member, LoraModule, str | None]]) -> None:
        orientation = Orientation(self.base)
        experts = Experts(self._names, self.base, orientation)
        _check_finite(targets)
        for member, module, name in targets:
            source = Source(number=member.number, weight=member.weight)
            if name is not None and (twin := self.draft.same_as(name)):
                raise UnsupportedFeatureError(
                    f"{member.name}: {module.target} changes {name}, which is the same tensor as {twin} in "
                    f"{self.base.label}: the change was trained on one of the two and would change both"
                )
            with _naming(member):
                self._add_module(module, source, name, orientation, experts)

    def _add_module(
        self, module: LoraModule, source: Source, name: str | None, orientation: Orientation, experts: Experts
    ) -> None:
        if name is not None:
            found = changes(module, source, name, self.draft.shape(name), orientation)
        else:
            split = None if module.target.opaque else experts.changes(module, source)
            if split is None:
                self._unmatched(f"{module.target}", module.target.parameter)
                self.left_out.append(f"{module.target}")
                return
            found = split
        for change in found:
            self.draft.add(change)
        if module.lora_bias is not None and name is not None:
            self._add_bias(module, source, name)

    def _add_bias(self, module: LoraModule, source: Source, name: str) -> None:
        bias = f"{name.removesuffix('weight')}bias" if name.endswith(".weight") else ""
        if not self.draft.has(bias):
            raise UnsupportedFeatureError(
                f"{module.target}: the adapter trained a lora_bias, and the base has no bias for {name} to add it to. "
                "`adaptertools convert` with --drop lora-bias gives it up"
            )
        self.draft.add(bias_change(module, source, bias, self.draft.shape(bias)))

    def _unmatched(self, label: str, parameter: str) -> None:
        """Raises: MatchError, unless the caller allows that it is left out"""
        if wrapped := self._names.find(f"{parameter}.base_layer"):
            raise MatchError(
                f"{label}: {self.base.label} has it as {wrapped}, as a model is saved that has an adapter around it. "
                "Take that off (PEFT's unload or merge_and_unload), save the model, and merge into that"
            )
        if not self.settings.allow_unmatched:
            raise MatchError(
                f"{label}: {self.base.label} has no such tensor; {self._names.nearest(parameter)}. Is it the right "
                "base model? allow_unmatched (--allow-unmatched) leaves out what matches nothing"
            )

    def _is_of_vocabulary(self, name: str) -> bool:
        tie = self._tie
        ends = tuple(f".{end}" for end in _BIASES)
        return tie is not None and (name in (tie.embedding, tie.head) or (is_classifier(name) and name.endswith(ends)))

    def _check_vocabulary(self) -> None:
        """Raises: ShapeError unless the embedding, the head and its bias have rows for the same tokens"""
        tie = self._tie
        if tie is None:
            return
        old, new = self.base.shapes[tie.embedding][0], self.draft.shape(tie.embedding)[0]
        head = tie.head if self.draft.has(tie.head) and not (tie.tied and not self.untied) else None
        if head is not None and head in self.base.shapes and self.base.shapes[head][0] != old:
            return
        others = [head] if head is not None else []
        module = tie.head.removesuffix(".weight")
        for name in (f"{module}.bias", f"{parent(module)}.bias"):
            others += [name] if name in self.base.shapes and self.base.shapes[name] == (old,) else []
        for name in others:
            if self.draft.shape(name)[0] != new:
                raise ShapeError(
                    f"{tie.embedding} gets {new} rows, {name} has {self.draft.shape(name)[0]}: the vocabulary was "
                    "resized, and the adapter does not hold both. Save it again with save_embedding_layers=True; where "
                    "one of them is a target module, PEFT saves that one alone: save the resized model, merge into that"
                )
        if new != old:
            self.vocabulary = (old, new)
            self.notes.append(f"the vocabulary changes from {old} to {new} tokens, and vocab_size with it")


@contextmanager
def _naming(member: Member) -> Iterator[None]:
    """Errors within say which adapter they are about."""
    try:
        yield
    except (MatchError, ShapeError, UnsupportedFeatureError) as error:
        raise type(error)(f"{member.name}: {error}") from error


def _check_finite(targets: Sequence[tuple[Member, LoraModule, str | None]]) -> None:
    """Raises: NonFiniteError that names the first tensor with NaN or infinity"""

    def check(some: Sequence[tuple[Member, LoraModule, str | None]]) -> None:
        for member, module, _ in some:
            for part, tensor in module.tensors.items():
                check_finite(f"{member.name}: {module.target}.{part}", tensor, may_pass=False)

    few = (targets[start : start + _AT_A_TIME] for start in range(0, len(targets), _AT_A_TIME))
    for _ in in_parallel(check, few):
        pass


def _stated(member: Member) -> list[str]:
    modules = [module.target.parameter for module in member.adapter.modules if not module.target.opaque]
    return [*modules, *member.adapter.full_weights]


def _ties_weights(member: Member) -> bool:
    """Whether the adapter was trained on both ends of a tied weight at once."""
    stated = member.adapter.metadata.get("peft")
    return isinstance(stated, dict) and stated.get("ensure_weight_tying") is True
