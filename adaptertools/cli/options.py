"""Options that commands share, gathered into one object each, so that a command takes them in one line."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from adaptertools.adapter import Adapter
    from adaptertools.containers.source import Located
    from adaptertools.operations.truncate import Measure

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def names_in(folder: Path) -> list[str]:
    """The names that the files of a folder of modules stand for, without importing one. A leading underscore hides."""
    stems = (path.stem for path in folder.glob("*.py"))
    return sorted(stem.replace("_", "-") for stem in stems if not stem.startswith("_"))


FORMAT = click.Choice(names_in(Path(__file__).parents[1] / "formats"))
"""A format by name; importing the formats themselves would load torch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How to read an adapter, as the reading options say."""

    source_format: str | None
    source_alpha: float | None
    slots: str | None
    base: str | None
    allow_nonfinite: bool
    in_options: Sequence[str]
    revision: str | None
    token: str | None

    def locate(self, src: str, output: "Output", *, headers: bool = False) -> "Located":
        """The files of the source, downloaded if it is an address on the Hub; of large ones the headers alone.

        Raises: HubError, OptionError
        """
        from adaptertools import api
        from adaptertools.cli._progress import progress

        with progress("download", output) as advance:
            return api.localize(src, revision=self.revision, token=self.token, headers=headers, on_progress=advance)

    def arguments(self, src: "str | Located") -> dict[str, Any]:
        """The keyword arguments of `adaptertools.read` for this source.

        Raises: OptionError, SourceNotFoundError, UnknownFormatError, AmbiguousFormatError
        """
        from adaptertools import api
        from adaptertools.cli._values import parse_assignments

        name = self.source_format or api.detect(src)
        own = parse_assignments("--in", name, self.in_options, api.read_options(name))
        given = {"alpha": self.source_alpha, "slots": self.slots, "base": self.base, "token": self.token}
        return {"format": name, **given, **own}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """How to read several adapters, as the reading options for many say."""

    source_formats: Sequence[str]
    source_alphas: Sequence[float]
    slots: str | None
    in_options: Sequence[str]
    token: str | None
    base: str | None = None
    allow_nonfinite: bool = False

    def locate(self, srcs: Sequence[str], output: "Output") -> "list[Located]":
        """The files of the sources, in order, downloaded where they are addresses on the Hub.

        Raises: HubError, OptionError
        """
        from adaptertools import api
        from adaptertools.cli._progress import progress

        with progress("download", output) as advance:
            return api.localize_all(srcs, token=self.token, on_progress=advance)

    def locate_model(self, model: str, output: "Output") -> "Located":
        """The files of a base model, or of a merged one.

        Raises: HubError, OptionError
        """
        from adaptertools import api
        from adaptertools.cli._progress import progress

        with progress("download", output) as advance:
            return api.localize(model, "model", token=self.token, on_progress=advance)

    def read_all(self, srcs: "Sequence[Located]") -> "list[Adapter]":
        """The adapters at these places, in order.

        Raises: AdapterToolsError; OptionError for an option that is meant for none of them
        """
        from adaptertools.cli._sources import read_sources

        return read_sources(self, srcs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """How to write an adapter, as the writing options say."""

    container: str | None
    dtype: str | None
    drop: Sequence[str]
    overwrite: bool
    out_options: Sequence[str]

    def arguments(self, format: str) -> dict[str, Any]:
        """The keyword arguments of `adaptertools.write` for this format, without the format itself.

        Raises: OptionError
        """
        from adaptertools import api
        from adaptertools.cli._values import parse_assignments

        own = parse_assignments("--out", format, self.out_options, api.write_options(format))
        return {"container": self.container, "dtype": self.dtype, "drop": self.drop, "overwrite": self.overwrite, **own}

    def arguments_like(self, adapter: "Adapter") -> dict[str, Any]:
        """The keyword arguments of `adaptertools.write` that write what was read: its format, container and layout.

        Raises: OptionError
        """
        from adaptertools import formats

        origin = adapter.origin
        assert origin is not None
        given = self.arguments(origin.format)
        if self.container is None and origin.container in formats.get(origin.format).CONTAINERS:
            given["container"] = origin.container
        return {**origin.options, **given, "format": origin.format}


def measure(how: Mapping[str, Any], dst: str | None = None) -> "Measure":
    """What files take that are written to `dst` with these arguments of `adaptertools.write`, in any dtype."""
    from adaptertools import api

    options = {name: value for name, value in how.items() if name not in ("overwrite", "dtype", "allow_nonfinite")}
    return lambda adapter, dtype: api.stored_size(adapter, dtype=dtype, path=dst, **options)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankChoice:
    """The rank that modules are given, as the rank options say, and where that is computed."""

    rank: int | None
    energy: float | None
    error: float | None
    size: str | None
    max_rank: int | None
    device: str

    @property
    def given(self) -> bool:
        """Whether any option asks for truncation; `--device` alone does not."""
        return any(value is not None for value in (self.rank, self.energy, self.error, self.size, self.max_rank))

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `adaptertools.truncate`, without `dtype`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What goes to stdout: `--json` and `-q`."""

    as_json: bool
    quiet: bool

    def show(self, text: Callable[[], str], document: Callable[[], dict[str, Any]]) -> None:
        """Print a result: as one JSON object, as text, or not at all.

        Raises: click.ClickException if stdout cannot be written to
        """
        if self.as_json:
            from adaptertools.cli._values import to_json

            _print(to_json(document()))
        elif not self.quiet:
            _print(text())


def _print(text: str) -> None:
    try:
        click.echo(text)
    except BrokenPipeError:
        raise  # a reader that has gone is no failure to talk about
    except OSError as error:
        raise click.ClickException(f"cannot write to standard output: {error.strerror}") from None


def reading_options(*alpha: str) -> Decorator:
    """The options of every command that reads an adapter, as its argument `reading`; `alpha` names that one anew."""
    return _gathered(
        "reading",
        Reading,
        click.option("--from", "source_format", type=FORMAT, help="Format of SRC. [default: told by its content]"),
        click.option(
            "--source-alpha", *alpha, "source_alpha", type=float, metavar="A", help="Alpha, where SRC cannot state it."
        ),
        click.option("--slots", metavar="SLOTS", help="Adapted slots of fused projections, where SRC has none."),
        click.option("--base", metavar="BASE", help="Base model, whose headers settle names and shapes."),
        click.option("--allow-nonfinite", is_flag=True, help="Carry NaN and infinity along."),
        click.option(
            "--in", "in_options", multiple=True, metavar="NAME=VALUE", help="Option of SRC's format; repeatable."
        ),
        revision_option(),
        token_option(),
    )


def sources_options(*, writes: bool = True, base: bool = True) -> Decorator:
    """The options of every command that reads several adapters, as its argument `sources`.

    One that writes nothing has no NaN to carry along; one that takes the base model as an argument has no `--base`.
    """
    model = [click.option("--base", metavar="BASE", help="Base model, whose headers settle names and shapes.")]
    nonfinite = [click.option("--allow-nonfinite", is_flag=True, help="Carry NaN and infinity along.")]
    return _gathered(
        "sources",
        Sources,
        click.option(
            "--from",
            "source_formats",
            type=FORMAT,
            multiple=True,
            help="Format of the sources: once for all, or once for each in order. [default: told by their content]",
        ),
        click.option(
            "--source-alpha",
            "source_alphas",
            type=float,
            multiple=True,
            metavar="A",
            help="Alpha of the sources that cannot state it: once for all of these, or once for each in order.",
        ),
        click.option("--slots", metavar="SLOTS", help="Adapted slots of fused projections, where a source has none."),
        *(model if base else []),
        *(nonfinite if writes else []),
        click.option(
            "--in",
            "in_options",
            multiple=True,
            metavar="NAME=VALUE",
            help="Option of a source's format, for every source whose format has it; repeatable.",
        ),
        token_option(),
    )


def writing_options() -> Decorator:
    """The options of every command that writes an adapter, as its argument `writing`."""
    return _gathered(
        "writing",
        Writing,
        click.option("--container", metavar="C", help="Kind of file to write, such as safetensors."),
        click.option("--dtype", type=click.Choice(["f32", "f16", "bf16"]), help="Cast every tensor. [default: keep]"),
        click.option(
            "--drop", multiple=True, metavar="KIND", help="Give up what DST cannot carry, as dora; repeatable."
        ),
        click.option("--overwrite", is_flag=True, help="Replace DST if it is an adapter."),
        click.option(
            "--out", "out_options", multiple=True, metavar="NAME=VALUE", help="Option of DST's format; repeatable."
        ),
    )


def selection_options() -> Decorator:
    """`--only`, `--exclude` and `--rename`, as the arguments `only`, `exclude` and `rename`."""
    return _all(
        click.option("--only", multiple=True, metavar="GLOB", help="Keep these target modules alone; repeatable."),
        click.option("--exclude", multiple=True, metavar="GLOB", help="Leave out these target modules; repeatable."),
        click.option("--rename", multiple=True, metavar="REGEX=NEW", help="Rename target modules; repeatable."),
    )


def rank_options() -> Decorator:
    """How far to lower the rank, and `--device`, as the argument `ranks`."""
    return _gathered(
        "ranks",
        RankChoice,
        click.option("--rank", type=int, metavar="N", help="At most N in every module."),
        click.option("--energy", type=float, metavar="F", help="Keep the share F of each module's squared norm."),
        click.option("--error", type=float, metavar="F", help="The smallest file within the relative error F in all."),
        click.option("--size", metavar="BYTES", help="The best that fits: 20MB, 1.5MiB, 300000 or 50%."),
        click.option("--max-rank", type=int, metavar="N", help="At most N, whatever the other options say."),
        device_option(),
    )


def device_option() -> Decorator:
    """`--device`, as the argument `device`."""
    return click.option(
        "--device",
        metavar="D",
        default="auto",
        show_default=True,
        help="Where to compute: auto, cpu, cuda, cuda:N, or mps (untested; products of merges alone).",
    )


def revision_option() -> Decorator:
    """`--revision`, as the argument `revision`."""
    return click.option("--revision", metavar="R", help="Branch, tag or commit of an address on the Hub.")


def token_option() -> Decorator:
    """`--token`, as the argument `token`."""
    return click.option("--token", metavar="TOKEN", help="Token for the Hub. [default: HF_TOKEN, or that of `hf auth`]")


def output_options() -> Decorator:
    """`--json` and `-q`, as the argument `output`."""
    return _gathered(
        "output",
        Output,
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
        click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors and what --json asks for."),
    )


def _gathered(name: str, kind: type[Any], *options: Decorator) -> Decorator:
    """Options that a command takes as one argument `name`, an object with a field for each."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def command(*args: Any, **given: Any) -> Any:
            values = {field.name: given.pop(field.name) for field in fields(kind) if field.name in given}
            return function(*args, **{name: kind(**values)}, **given)

        return _all(*options)(command)

    return decorate


def _all(*options: Decorator) -> Decorator:
    return lambda function: functools.reduce(lambda made, option: option(made), reversed(options), function)
