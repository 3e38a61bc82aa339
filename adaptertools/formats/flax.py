"""flax: the tree that flax.nnx's LoRA modules load, with names of the caller's choice.

    <path>/lora_a  (in, r)         <path>/lora_b  (r, out)
    flax_adapter.msgpack | .npz | .safetensors | .orbax/    the tree
    flax_adapter.json                                       the sidecar, see dialects/flax/sidecar.py

Scaling: nnx.LoRA computes x @ lora_a @ lora_b and has no scale, so ours is folded into lora_b. The sidecar keeps
alpha, rank and rule; where dividing by the scale gives lora_B back bit for bit (powers of two, and narrow dtypes, whose
fold is kept in float32), reading does so. Elsewhere the factors stay as they are stored, with scaling 1: ΔW then
differs from the original by the error that was reported, and by nothing more.
Read, not written: plain Linen modules (lora_A, lora_B beside a kernel), with alpha from the caller. Recognised and
refused: openpi, DoRA magnitudes, mixtures of experts.
Source: flax/nnx/nn/lora.py and flax/serialization.py in flax 0.12.8
"""

from adaptertools.adapter import Adapter, Feature
from adaptertools.containers.artifact import Artifact
from adaptertools.containers.source import Source
from adaptertools.dialects.flax import read as flax_read
from adaptertools.dialects.flax import source as flax_source
from adaptertools.dialects.flax import write as flax_write
from adaptertools.dialects.flax.options import Layout, Request
from adaptertools.dialects.flax.sidecar import NAME
from adaptertools.dialects.flax.tree import Dialect
from adaptertools.encoding import Encoder

SUMMARY = "Flax (nnx): flax_adapter.msgpack and flax_adapter.json; the scale is folded into lora_b"
CONTAINERS = ("msgpack", "npz", "safetensors", "orbax")
FOLDER = True
CONFIG = NAME
FILES = ("flax_adapter.*",)
CARRIES = frozenset({Feature.CHANGED_BASE})
KEEPS_SETTINGS = True

_DIALECTS = frozenset({Dialect.NNX, Dialect.LINEN, Dialect.OPENPI})
_NAMINGS = ("hf", "tunix-llama", "maxtext")


def detect(source: Source) -> bool:
    """Whether the leaves are lora_a and lora_b in a tree. With dots they are MLX's, unless the header says flax."""
    return flax_source.detect(source, _DIALECTS)


def read(
    source: Source,
    *,
    alpha: float | None = None,
    naming: str | None = None,
    layer_prefix: str | None = None,
    scan_axis: int | None = None,
    scan_at: str | None = None,
    ignore_other: bool = False,
) -> Adapter:
    """Read nnx LoRA factors.

    `alpha` is for modules that scale by alpha / rank on their own. `naming` is hf, tunix-llama or maxtext, else told by
    the paths; `layer_prefix` what stands before the layer index in Hugging Face's names, for namings that lack it.
    `scan_axis` is the axis of stacked layers where shapes do not tell, `scan_at` the part of the path that stands for
    them. `ignore_other` leaves aside whatever is no LoRA factor, such as the base model's own weights.

    Raises: MissingAlphaError for lora_A and lora_B, whose scaling nobody states;
            OptionError for an option that nothing here uses
    """
    return flax_read.read(
        source,
        Request(
            format="flax",
            dialects=_DIALECTS,
            namings=_NAMINGS,
            alpha=alpha,
            naming=naming,
            layer_prefix=layer_prefix,
            scan_axis=scan_axis,
            scan_at=scan_at,
            ignore_other=ignore_other,
        ),
    )


def write(
    adapter: Adapter,
    encoder: Encoder,
    *,
    container: str,
    naming: str = "hf",
    layer_prefix: str | None = None,
    scan_axis: int | None = None,
    scan_at: str = "layers",
    num_layers: int | None = None,
) -> Artifact:
    """Write a tree for nnx.LoRA.

    `naming` and `layer_prefix` as for `read`. With `scan_axis` the layers are stacked along that axis, `num_layers` of
    them where the adapter does not reach the last.

    Raises: UnsupportedFeatureError for names that the naming has no place for; ShapeError if layers do not stack;
            OptionError for an option that nothing here uses
    """
    layout = Layout(
        dialect=Dialect.NNX,
        naming=naming,
        layer_prefix=layer_prefix,
        scan_axis=scan_axis,
        scan_at=scan_at,
        num_layers=num_layers,
    )
    return flax_write.encode(adapter, encoder, layout, _NAMINGS, container)
