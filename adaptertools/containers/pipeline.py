"""A base model that is several: the folders of a diffusers pipeline, each a model of its own."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from adaptertools.containers.checkpoint import CONFIG, WEIGHTS, Checkpoint
from adaptertools.containers.source import Located, located
from adaptertools.errors import OptionError, UnsupportedFeatureError

INDEX = "model_index.json"
"""What makes a pipeline of a folder of models."""

COMPONENTS = (
    "unet",
    "transformer",
    "transformer_2",
    "prior",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
)
"""The models of a pipeline that adapters are trained for."""

FACTOR = re.compile(r"(^|[._])lora_(A|B|down|up|embedding_A|embedding_B)(\.|$)")
"""What the name of a tensor has that belongs to an adapter."""

_CHANGED = (".weight", ".base_layer.weight")
"""What the name of the weight ends in that a factor of the same module changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """The headers of the models of a pipeline, by their folders.

    As one model it answers nothing: whoever asks for `shapes` or `config` is told to name one of its folders.

    Raises: OptionError from `shapes` and `config`
    """

    components: Mapping[str, Checkpoint]
    label: str

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        self.refuse()

    @property
    def config(self) -> Mapping[str, Any]:
        self.refuse()

    def refuse(self) -> NoReturn:
        """Raises: OptionError that tells to name one of its folders"""
        first = next(iter(self.components))
        raise OptionError(
            f"{self.label}: these are several models ({', '.join(self.components)}), and one is wanted. "
            f"Name the folder of one, such as {self.label}/{first}"
        )


Model = Checkpoint | Pipeline
"""What `--base` may be."""


def open_model(given: str | Path | Located, *, config_suffices: bool = False) -> Model:
    """A base model, or a pipeline of several. Opening reads headers alone.

    With `config_suffices` a config.json may stand without weights.

    Raises: SourceNotFoundError, UnknownFormatError, DamagedFileError and the like
    """
    place = located(given)
    path = place.path
    folders = [name for name in COMPONENTS if (path / name).is_dir()]
    plain = not (path / INDEX).is_file() and any((path / name).is_file() for name in WEIGHTS)
    if plain or not folders:
        alone = config_suffices and _is_config_alone(path)
        return Checkpoint.of_config(place) if alone else Checkpoint.open(place)
    return Pipeline(components={name: Checkpoint.open(place.at(path / name)) for name in folders}, label=place.label)


def open_checkpoint(given: str | Path | Located | Checkpoint) -> Checkpoint:
    """A model that is one, with its weights; one that is open already is returned as it is.

    Raises: OptionError for a pipeline, naming its models; UnsupportedFeatureError for an adapter; as `open_model` else
    """
    model = given if isinstance(given, Checkpoint) else open_model(given)
    if isinstance(model, Pipeline):
        model.refuse()
    if model.opened is not None and (factor := _factor_alone(model)) is not None:
        raise UnsupportedFeatureError(
            f"{model.label}: {factor} belongs to an adapter, and a whole model is expected here. `inspect` says what "
            "an adapter holds"
        )
    return model


def _factor_alone(model: Checkpoint) -> str | None:
    """A factor without the weight that it changes: some models hold adapters of their own, which stand beside it."""
    for name in model.shapes:
        found = FACTOR.search(name)
        if found and not any(f"{name[: found.start()]}{end}" in model.shapes for end in _CHANGED):
            return name
    return None


def _is_config_alone(path: Path) -> bool:
    if path.is_file():
        return path.name == CONFIG
    weights = any((path / name).is_file() for name in WEIGHTS) or any(path.glob("*.safetensors"))
    return (path / CONFIG).is_file() and not weights
