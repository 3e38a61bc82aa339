"""What is checked: an adapter together with the files that it stands in, and what is known of the base model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from adaptertools.adapter import Adapter


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Subject:
    """An adapter as a consumer meets it.

    `files` and `keys` are the names of its files and of its tensors, `config` is the JSON document beside them; all are
    empty for an adapter that stands in no file yet, which keeps the rules about them. `unmatched` are the modules that
    change nothing in the base model, `misshapen` those that it has in another size; None where no names of a base model
    are known, even if `has_base` says that there is one. `nonfinite` are the tensors that hold NaN or infinity; None
    where they were not read. `base_option` is what converting to the consumer's format needs of `--base`. `model_type`
    and `num_layers` are those of its configuration, and `tied` that its output head is its input embedding.
    """

    adapter: Adapter
    format: str
    cap: int | None = None
    files: tuple[str, ...] = ()
    keys: frozenset[str] = frozenset()
    config: Mapping[str, Any] = field(default_factory=dict)
    nonfinite: tuple[str, ...] | None = ()
    unmatched: tuple[str, ...] | None = None
    misshapen: tuple[str, ...] | None = None
    has_base: bool = False
    base_option: tuple[str, ...] = ()
    model_type: str | None = None
    num_layers: int | None = None
    tied: bool = False
