"""flax-qwix: the trees of qwix, by which tunix and MaxText train LoRA.

    <path>/<weight>_lora_a    dot_general: (prod in, r);  einsum: the axes shared with the input, then r
    <path>/<weight>_lora_b    dot_general: (r, prod out); einsum: r, then the weight's other axes
    flax_adapter.msgpack | .npz | .safetensors | .orbax/ and flax_adapter.json, as in the format flax

`<weight>` is `kernel` of a Linear or `w` of a tunix Einsum.
Scaling: alpha / rank, both from the caller's LoraProvider or LoraRule and in no file, except that MaxText saves them as
custom metadata of its Orbax checkpoints. The factors are kept as they are and alpha stands in the sidecar; the scale is
folded only where modules of different scaling share one leaf.
Read, not written: MaxText's adapters from before qwix (lora_a.kernel, with an adapter_config.json beside them).
Source: qwix/_src/providers/lora.py at aa623ac, google/tunix c7d8950, AI-Hypercomputer/maxtext e591f30
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

SUMMARY = "Flax for qwix, tunix and MaxText: flax_adapter.msgpack and flax_adapter.json, which states alpha"
CONTAINERS = ("msgpack", "npz", "safetensors", "orbax")
FOLDER = True
CONFIG = NAME
FILES = ("flax_adapter.*",)
CARRIES = frozenset({Feature.CHANGED_BASE})
KEEPS_SETTINGS = True

_DIALECTS = frozenset({Dialect.QWIX, Dialect.MAXTEXT_LEGACY})
_NAMINGS = ("hf", "tunix-llama", "tunix-gemma", "maxtext")


def detect(source: Source) -> bool:
    """Whether the leaves are <weight>_lora_a and <weight>_lora_b, or MaxText's lora_a.kernel and lora_b.kernel."""
    return flax_source.detect(source, _DIALECTS)


def read(
    source: Source,
    *,
    alpha: float | None = None,
    naming: str | None = None,
    layer_prefix: str | None = None,
    scan_axis: int | None = None,
    scan_at: str | None = None,
    arch: str | None = None,
    head_dim: int | None = None,
    ignore_other: bool = False,
) -> Adapter:
    """Read qwix LoRA factors.

    `alpha` is that of the training run. `naming` is hf, tunix-llama (also for Qwen), tunix-gemma or maxtext, else told
    by the paths; `layer_prefix` what stands before the layer index in Hugging Face's names. `scan_axis` is the axis of
    stacked layers where shapes do not tell, `scan_at` the part of the path that stands for them. `arch=llama3.1` with
    `head_dim` undoes the row order and the query scale that MaxText gives that model. `ignore_other` leaves aside
    whatever is no LoRA factor, such as the base model's own weights.

    Raises: MissingAlphaError where nobody states alpha; OptionError for an option that nothing here uses
    """
    return flax_read.read(
        source,
        Request(
            format="flax-qwix",
            dialects=_DIALECTS,
            namings=_NAMINGS,
            alpha=alpha,
            naming=naming,
            layer_prefix=layer_prefix,
            scan_axis=scan_axis,
            scan_at=scan_at,
            arch=arch,
            head_dim=head_dim,
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
    head_dim: int | None = None,
    fuse_qkv: bool | None = None,
    arch: str | None = None,
) -> Artifact:
    """Write a tree for qwix.apply_lora_to_model.

    `naming` and `layer_prefix` as for `read`; tunix's einsums need `head_dim`. `fuse_qkv` says whether Gemma fuses q
    with k and v, else told by their sizes. With `scan_axis` the layers are stacked along that axis (MaxText: 1),
    `num_layers` of them where the adapter does not reach the last. `arch=llama3.1` gives MaxText's row order and query
    scale.

    Raises: UnsupportedFeatureError for names that the naming has no place for; ShapeError if modules do not fit one
            leaf; OptionError without `head_dim` where it is needed, and for an option that nothing here uses
    """
    layout = Layout(
        dialect=Dialect.QWIX,
        naming=naming,
        layer_prefix=layer_prefix,
        scan_axis=scan_axis,
        scan_at=scan_at,
        num_layers=num_layers,
        head_dim=head_dim,
        fuse_qkv=fuse_qkv,
        arch=arch,
    )
    return flax_write.encode(adapter, encoder, layout, _NAMINGS, container)
