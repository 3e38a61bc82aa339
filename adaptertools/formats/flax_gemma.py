"""flax-gemma: the trees of the gemma library, from gm.nn.LoRA and gemma.peft.

    <path>/lora/a    the axes shared with the input, then r
    <path>/lora/b    r, then the weight's other axes
    flax_adapter.msgpack | .npz | .safetensors | .orbax/ and flax_adapter.json, as in the format flax

`<path>` ends in _LoRAEinsum_0 for the attention einsums and in _LoRAEinsum_<weight> for those of the feed-forward
layer; k and v share a leaf, gate and up share another.
Scaling: none, so ours is folded into b, as in the format flax.
Source: gemma/peft/_lora.py and gemma/gm/nn/_lora.py in google-deepmind/gemma 7691fd4 (gemma 3.3.0)
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

SUMMARY = "Flax for the gemma library: flax_adapter.msgpack and flax_adapter.json; the scale is folded into b"
CONTAINERS = ("msgpack", "npz", "safetensors", "orbax")
FOLDER = True
CONFIG = NAME
FILES = ("flax_adapter.*",)
CARRIES = frozenset({Feature.CHANGED_BASE})
KEEPS_SETTINGS = True

_DIALECTS = frozenset({Dialect.GEMMA})
_NAMINGS = ("hf", "gemma")


def detect(source: Source) -> bool:
    """Whether the leaves are lora/a and lora/b."""
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
    """Read gemma LoRA factors.

    `alpha` is for forks that scale by alpha / rank. `naming` is hf or gemma, else told by the paths; `layer_prefix`
    what stands before the layer index in Hugging Face's names, which for Gemma depends on the class of the model.
    `scan_axis` is the axis of stacked layers where shapes do not tell, `scan_at` the part of the path that stands for
    them. `ignore_other` leaves aside whatever is no LoRA factor, such as the base model's own weights.

    Raises: ShapeError, UnpairedFactorError, UnclaimedTensorError; OptionError for an option that nothing here uses
    """
    return flax_read.read(
        source,
        Request(
            format="flax-gemma",
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
    head_dim: int | None = None,
    fuse_qkv: bool | None = None,
    scan_axis: int | None = None,
    scan_at: str = "layers",
    num_layers: int | None = None,
) -> Artifact:
    """Write a tree for gm.nn.LoRA or gemma.peft.

    `naming=gemma` gives the library's own paths and needs `head_dim`; hf keeps each module a dense layer under its own
    name. `layer_prefix` as for `read`. `fuse_qkv` says whether the model fuses q with k and v, else told by their
    sizes. With `scan_axis` the layers are stacked along that axis, `num_layers` of them where the adapter does not
    reach the last.

    Raises: UnsupportedFeatureError for names that the naming has no place for; ShapeError if modules do not fit one
            leaf; OptionError without `head_dim` where it is needed, and for an option that nothing here uses
    """
    layout = Layout(
        dialect=Dialect.GEMMA,
        naming=naming,
        layer_prefix=layer_prefix,
        scan_axis=scan_axis,
        scan_at=scan_at,
        num_layers=num_layers,
        head_dim=head_dim,
        fuse_qkv=fuse_qkv,
    )
    return flax_write.encode(adapter, encoder, layout, _NAMINGS, container)
