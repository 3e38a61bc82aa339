"""LyCORIS: kohya's file with LoHa or LoKr in it, read as the low-rank products that these are. Read only.

    LoCon    lora_down.weight, lora_up.weight[, lora_mid.weight]      as in the format kohya
    LoHa     hada_w1_a (out, r), hada_w1_b (r, in), hada_w2_a, hada_w2_b        ΔW = α/r · (w1_a·w1_b)∘(w2_a·w2_b)
             with hada_t1, hada_t2 (r, r, k, k): w*_a (r, out), w*_b (r, in)
    LoKr     lokr_w1 or lokr_w1_a·lokr_w1_b, lokr_w2 or lokr_w2_a·lokr_w2_b     ΔW = c · w1⊗w2
             with lokr_t2 (r, r, k, k): w2_a (r, c), w2_b (r, d)
             c = α/r if a half is stored as factors, else 1 whatever alpha says
    alpha, dora_scale and flat names as in the format kohya; sd-scripts' own LoHa and LoKr are the same

LoHa becomes LoRA of rank r², LoKr of rank rank(w1)·rank(w2), exactly; never beyond the smaller size of the weight,
where the dense weight takes its place: a LoKr of two whole halves is as large as the weights that it changes.
`truncate` then lowers the rank. Where the kernel of a convolution was flattened, the file does not say that it is one:
`base` does.

Refused by name: full differences (diff), norms, OFT, BOFT, (IA)³, GLoRA, T-LoRA. `ignore_other` leaves these out.
LyCORIS's `get_diff_weight` and `get_merged_weight` apply the scale of LoHa and LoKr twice; its forward, its
`get_weight` and ComfyUI apply it once, and so is it read.

Source: KohakuBlueleaf/LyCORIS 4.1.3: modules/; kohya-ss/sd-scripts networks/loha.py, networks/lokr.py
"""

from dataclasses import replace

from adaptertools.adapter import Adapter, Feature, Kind, merge_notes
from adaptertools.containers.artifact import Artifact
from adaptertools.containers.pipeline import Model
from adaptertools.containers.source import Source
from adaptertools.dialects.kohya import keys
from adaptertools.dialects.kohya import read as kohya_read
from adaptertools.dialects.kohya.factors import Pair, Rounding, lora_pair
from adaptertools.dialects.kohya.keys import Group
from adaptertools.dialects.kohya.lowrank import loha_pair, lokr_pair
from adaptertools.encoding import Encoder
from adaptertools.errors import ShapeError, UnsupportedFeatureError, count

SUMMARY = "LyCORIS: LoHa and LoKr, as exact low-rank factors"
CONTAINERS: tuple[str, ...] = ()
FOLDER = False
CONFIG = kohya_read.CONFIG
FILES = ()
CARRIES = frozenset({Feature.CONV, Feature.DORA})


def detect(source: Source) -> bool:
    """Whether it is one file, or a folder with one, of flat names with parts of LyCORIS beyond LoCon."""
    return len(keys.adapter_files(source, keys.is_lycoris)) == 1


def read(source: Source, *, base: Model | None = None, ignore_other: bool = False) -> Adapter:
    """Read a LyCORIS file. `base` turns flat names back and tells convolutions; `ignore_other` leaves aside what is no
    low-rank product, such as norms.

    Memory: the factors of all LoHa and LoKr modules: (out + in) times r² or rank(w1)·rank(w2), in float32
    Raises: NotLoraError for methods that are no low-rank product; and what reading a kohya file raises
    """
    adapter = kohya_read.read_adapter(
        source,
        keys.adapter_file(source, keys.is_lycoris, "LyCORIS's hada_ or lokr_ factors"),
        format="lycoris",
        base=base,
        claimed=keys.LORA | keys.LOHA | keys.LOKR,
        factorise=_factorise,
        ignore_other=ignore_other,
    )
    unsure = [module for module in adapter.modules if module.target.opaque and module.kind is Kind.LINEAR]
    if not unsure:
        return adapter
    note = (
        f"{count(len(unsure), 'module')} taken for linear, such as {unsure[0].target}. A convolution whose kernel "
        "LyCORIS flattened looks the same: give --base to tell them apart"
    )
    return replace(adapter, notes=merge_notes(adapter.notes, [note]))


def write(adapter: Adapter, encoder: Encoder, *, container: str) -> Artifact:
    """Raises: UnsupportedFeatureError: low-rank factors are written as kohya, which LyCORIS reads as LoCon."""
    raise UnsupportedFeatureError("lycoris is only read: write kohya, whose files LyCORIS reads as LoCon")


def _factorise(group: Group, rounding: Rounding) -> Pair:
    methods = {
        method: make
        for method, parts, make in (
            ("LoRA", keys.LORA, lora_pair),
            ("LoHa", keys.LOHA, loha_pair),
            ("LoKr", keys.LOKR, lokr_pair),
        )
        if parts.intersection(group.parts)
    }
    if len(methods) > 1:
        raise ShapeError(f"{group.name} is {' and '.join(methods)} at once; which one is meant?")
    (make,) = methods.values()
    return make(group, rounding)
