"""The model card of what is pushed: its metadata, and a marked section that says how the files were made.

Text in, text out. All that a card says beyond these stays as it is; the marked section is made anew each time.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from adaptertools.hub import metadata

NAME = "README.md"
_BEGIN = "<!-- adaptertools: how these files were made; this section is replaced by the next push -->"
_END = "<!-- adaptertools: end -->"
_SECTION = re.compile(rf"{re.escape(_BEGIN)}(?:(?!{re.escape(_BEGIN)})[\s\S])*?{re.escape(_END)}")
_BLOCK = re.compile(r"\s*---(?:\r\n|\r|\n)([\s\S]*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|$)")
"""As the Hub's server finds the metadata."""

_INTRODUCTION = "Uploaded with adaptertools"

_KINDS = {
    "adapter": "A LoRA adapter",
    "merge": "A model with LoRA adapters merged into its weights",
    None: "A model",
}
_OURS = ("peft", "transformers")
"""Libraries of which a push knows whether they load what it sends."""

CARRIED = ("license", "license_name", "license_link", "language", "datasets")
"""What holds for what is made of a source as well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """What a card is to say of the files beside it."""

    title: str
    relation: str | None
    """`adapter` or `merge`: how it relates to its base models; None where nothing says so."""
    base_models: tuple[str, ...] = ()
    """Their names on the Hub."""
    library: str | None = None
    """What loads the files; None for a format that no library of the Hub's list loads."""
    tags: tuple[str, ...] = ()
    steps: tuple[str, ...] = ()
    """The operations that made the files, in order, one line each."""
    carried: Mapping[str, Any] = field(default_factory=dict)
    """Licence, languages and datasets of the sources, for a card that does not say these."""


@dataclass(frozen=True, slots=True)
class Card:
    """A card in two parts. `block` is the metadata as it is written, without the lines of dashes."""

    block: str
    text: str
    data: Mapping[str, Any]


def read_card(content: str, label: str = NAME) -> Card:
    """Take a card apart.

    Raises: DamagedFileError if its metadata is not YAML, or is no mapping
    """
    content = content.removeprefix("\ufeff")
    found = _BLOCK.match(content)
    if found is None:
        return Card("", content, {})
    return Card(found[1], content[found.end() :], metadata.parse(found[1], label))


def write_card(existing: str | None, facts: CardFacts, label: str = NAME) -> str:
    """The card with these facts: a new one, or the existing one with its prose kept; messages call that `label`.

    Raises: DamagedFileError if the metadata of the existing one cannot be read
    """
    card = read_card(existing or "", label)
    data = _metadata(card.data, facts)
    text = _with_section(card.text if card.text.strip() else _prose(facts), _section(facts))
    block = card.block if data == card.data else metadata.edited(card.block, card.data, data)
    written = f"---\n{block}\n---\n{text}" if block.strip() else text
    return _one_kind_of_line_end(written, existing or "")


def has_prose(content: str) -> bool:
    """Whether a card holds words of somebody's own: more than metadata, headings and what is written here."""
    text = _SECTION.sub("", read_card(content).text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return any(not line.startswith("#") and not line.startswith(_INTRODUCTION) for line in lines)


def same_prose(one: str, other: str) -> bool:
    """Whether two cards say the same beside their metadata and the marked section."""
    first, second = (_SECTION.sub("", read_card(text).text).split() for text in (one, other))
    return first == second


def carried(cards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the metadata of these source cards says that holds for what is made of them too; the first one counts.

    The parts of a licence stay together: its name and its link are those of the card that names it.
    """
    found: dict[str, Any] = {}
    licensed = next((card for card in cards if _plain(card.get("license"))), {})
    for key in CARRIED:
        among = [licensed] if key.startswith("license") else cards
        value = next((plain for card in among if (plain := _plain(card.get(key)))), None)
        if value is not None:
            found[key] = value
    return found


def one_line(text: object) -> str:
    """Text from a file, fit to stand in a line of Markdown: nothing in it begins a tag, a comment or a line."""
    printable = "".join(char if char.isprintable() else " " for char in str(text))
    return re.sub(r"\s+", " ", printable).replace("`", "'").replace("<", "‹").replace(">", "›").strip()


def _plain(value: Any) -> Any:
    """A name or a list of names; anything else a card may hold there is not taken over."""
    if isinstance(value, str):
        return value.strip() or None
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return list(value)
    return None


def _metadata(old: Mapping[str, Any], facts: CardFacts) -> dict[str, Any]:
    data = dict(old)
    if facts.base_models:
        data["base_model"] = facts.base_models[0] if len(facts.base_models) == 1 else list(facts.base_models)
    if facts.relation and data.get("base_model"):
        data["base_model_relation"] = facts.relation
    if facts.library:
        data["library_name"] = facts.library
    elif data.get("library_name") in _OURS:
        del data["library_name"]  # said of a source in another format
    tags = [data["tags"]] if isinstance(data.get("tags"), str) else list(data.get("tags") or [])
    data["tags"] = [*tags, *(tag for tag in facts.tags if tag not in tags)]
    taken = {key for key in CARRIED if data.get(key)}
    for key, value in facts.carried.items():
        group_is_said = key.startswith("license") and any(name.startswith("license") for name in taken)
        if key not in taken and not group_is_said:
            data[key] = value
    return {key: value for key, value in data.items() if value not in (None, [])}


def _prose(facts: CardFacts) -> str:
    what = _KINDS[facts.relation]
    bases = " and ".join(f"`{one_line(name)}`" for name in facts.base_models)
    of = f", {'for' if facts.relation == 'adapter' else 'from'} {bases}" if bases else ""
    return f"\n# {one_line(facts.title)}\n\n{_INTRODUCTION}. {what}{of}.\n"


def _section(facts: CardFacts) -> str:
    if not facts.steps:
        return ""
    steps = "\n".join(f"{number}. {step}" for number, step in enumerate(facts.steps, 1))
    return f"{_BEGIN}\n\n## How these files were made\n\n{steps}\n\n{_END}"


def _with_section(text: str, section: str) -> str:
    """The text with the marked section in the place of an old one, or at its end."""
    pieces = _SECTION.split(text)
    if len(pieces) == 1:
        return f"{text.rstrip()}\n\n{section}\n" if section else text
    first, rest = pieces[0], "".join(pieces[1:])
    return first + section + rest if section else first.rstrip("\n") + "\n" + rest.lstrip("\r\n")


def _one_kind_of_line_end(written: str, existing: str) -> str:
    """A card of Windows lines stays one."""
    if "\r\n" not in existing:
        return written
    return written.replace("\r\n", "\n").replace("\n", "\r\n")
