"""Everything that adaptertools raises on purpose.

AdapterToolsError
├── FileError(ValueError)               the bytes are at fault
│   ├── EmptyFileError                  nothing in it
│   ├── DamagedFileError                truncated, over-long, or a header that lies
│   ├── UnsafeFileError                 would run code, expand without bound, or leave its folder
│   └── LfsPointerError                 a Git LFS pointer where weights should be
├── FormatError(ValueError)             which format is it?
│   ├── UnknownFormatError
│   ├── AmbiguousFormatError
│   └── NotLoraError                    IA3, AdaLoRA, VeRA, LoHa … by name
├── AdapterError(ValueError)            the adapter that the bytes describe is at fault
│   ├── ConfigError                     a configuration that is missing, malformed or not understood
│   ├── MissingAlphaError               the file cannot state alpha and the caller did not
│   ├── UnpairedFactorError             lora_A without lora_B, or the reverse
│   ├── EmptyFactorError                size-0 or 1-D factors, as ZeRO-3 leaves them
│   ├── ShapeError                      ranks or shapes that disagree
│   ├── NonFiniteError                  NaN or inf
│   ├── DuplicateTargetError            two modules that change the same weight
│   └── UnclaimedTensorError            a tensor that belongs to nothing known
├── MatchError(ValueError)              a module that fits no tensor of the base model, or several
├── UnsupportedFeatureError(ValueError) the format cannot carry it, or the operation cannot do it
├── OptionError(ValueError)             an argument that makes no sense here
├── MissingExtraError(ImportError)      an optional package is not installed
├── DestinationError(OSError)           the result cannot be put there
│   ├── DestinationExistsError(FileExistsError)
│   └── StoppedMergeError               it stopped half-way, and the same call resumes it
├── SourceNotFoundError(FileNotFoundError)
└── HubError(OSError)                   the Hub, or the way to it
    ├── HubNotFoundError(FileNotFoundError)  no such repository, revision or file, or none that this token may see
    ├── HubAccessError(PermissionError) gated, a wrong token, no right to write
    ├── HubMovedError                   the repository moved on meanwhile
    └── HubUnavailableError(ConnectionError)  network or server fail, and the same call goes on from what is there

A message says where (file, key), what was found, what was expected, and what to do.
"""

from collections.abc import Iterable


class AdapterToolsError(Exception):
    """Base of every error that adaptertools raises on purpose."""


class FileError(AdapterToolsError, ValueError):
    """The bytes of a file are at fault."""


class EmptyFileError(FileError):
    """A file without content, or without any tensor."""


class DamagedFileError(FileError):
    """A file that is truncated, over-long, or whose header lies about its content."""


class UnsafeFileError(FileError):
    """A file that would run code, expand without bound, or write outside its folder."""


class LfsPointerError(FileError):
    """A Git LFS pointer stands where the weights should be."""


class FormatError(AdapterToolsError, ValueError):
    """The format of an adapter could not be settled."""


class UnknownFormatError(FormatError):
    """No format recognises the content."""


class AmbiguousFormatError(FormatError):
    """Several formats, or several adapters, stand in one place."""


class NotLoraError(FormatError):
    """An adapter of another kind than LoRA."""


class AdapterError(AdapterToolsError, ValueError):
    """The bytes are sound, but the adapter that they describe is not."""


class ConfigError(AdapterError):
    """An adapter configuration that is missing, malformed or not understood."""


class MissingAlphaError(AdapterError):
    """The format cannot state alpha, and the caller did not."""


class UnpairedFactorError(AdapterError):
    """lora_A without lora_B, or lora_B without lora_A."""


class EmptyFactorError(AdapterError):
    """A factor of size 0 or of one dimension."""


class ShapeError(AdapterError):
    """Ranks or shapes that disagree."""


class NonFiniteError(AdapterError):
    """NaN or infinity among the values."""


class DuplicateTargetError(AdapterError):
    """Two modules that change the same weight."""


class UnclaimedTensorError(AdapterError):
    """A tensor that belongs to no module and to nothing else that is known."""


class MatchError(AdapterToolsError, ValueError):
    """A module or a whole weight that fits no tensor of the base model, or several."""


class UnsupportedFeatureError(AdapterToolsError, ValueError):
    """A format cannot carry, or an operation cannot handle, what the adapter holds."""


class OptionError(AdapterToolsError, ValueError):
    """An argument that makes no sense here."""


class MissingExtraError(AdapterToolsError, ImportError):
    """An optional package is needed and not installed."""


class DestinationError(AdapterToolsError, OSError):
    """The result cannot be put where it was asked for."""


class DestinationExistsError(DestinationError, FileExistsError):
    """The destination exists and may not be replaced."""


class StoppedMergeError(DestinationError):
    """A merge that stopped half-way: what is finished was kept, and the same call resumes it."""


class SourceNotFoundError(AdapterToolsError, FileNotFoundError):
    """There is nothing at the place to read from."""


class HubError(AdapterToolsError, OSError):
    """The Hub did not do what it was asked."""


class HubNotFoundError(HubError, FileNotFoundError):
    """No such repository, revision or file, or none that the token may see."""


class HubAccessError(HubError, PermissionError):
    """A gated repository, a wrong token, or one that may not write there."""


class HubMovedError(HubError):
    """Someone else changed the repository between reading and writing it."""


class HubUnavailableError(HubError, ConnectionError):
    """The network or the server fails for now; the same call goes on from what is there."""


def check_flags(**given: object) -> None:
    """Make sure that these arguments are true or false, by their names: "no" would count as true.

    Raises: OptionError
    """
    for name, value in given.items():
        if not isinstance(value, bool):
            raise OptionError(f"{name} is {value!r}, expected True or False")


def count(number: int, noun: str, verbs: tuple[str, str] | None = None) -> str:
    """How many, for messages and notes: `1 module`, `24 modules`; with ("has", "have") `1 module has`."""
    is_one = number == 1
    said = f"{number:,} {noun}{'' if is_one else 's'}"
    return said if verbs is None else f"{said} {verbs[0] if is_one else verbs[1]}"


def few(names: Iterable[str], most: int = 3) -> str:
    """The first of them, and how many more there are, for messages and notes."""
    listed = list(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
