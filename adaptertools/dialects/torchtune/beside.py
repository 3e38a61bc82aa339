"""What to say of an export to PEFT that stands beside the raw file of torchtune that it was made of."""

from contextlib import suppress

from adaptertools.containers.source import Source
from adaptertools.dialects.torchtune.families import Family, Rows
from adaptertools.dialects.torchtune.keys import MAGNITUDE, adapted, adapter_files, sort_keys
from adaptertools.errors import AdapterToolsError

_MODEL_CONFIG = "config.json"
_ADVICE = "--from torchtune reads the raw file"


def export_notes(source: Source) -> tuple[str, ...]:
    """What is wrong with the export, as far as the files tell; nothing where no raw file stands beside it.

    torchtune reorders lora_b of q and k for every family of models, though Qwen's needs none, and never magnitude.
    """
    if source.path is None:
        return ()
    home = source if source.is_folder else source.beside()
    names = adapter_files(home)
    if not names:
        return ()
    raw = f"{names[0]} beside it is the raw file of torchtune"
    modules = {}
    with suppress(AdapterToolsError):
        modules = sort_keys(home.tensors(names[0]))
    turned = adapted(modules, "q_proj", "k_proj")
    dora = [name for name in turned if MAGNITUDE in modules[name]]
    family = _family(home)
    if turned and family is not None and family.rows is Rows.HALVES:
        reason = f"it reorders the rows of q and k, which {family.name} has in the right order already"
    elif dora and (family is None or family.rows is Rows.PAIRED):
        reason = "it reorders the rows of lora_b of q and k, and leaves their DoRA magnitudes as they were"
    elif turned and family is None:
        return (f"{raw}; its export to PEFT, which is read here, is right for all models but Qwen. {_ADVICE}",)
    else:
        return (f"{raw}, of the same adapter; {_ADVICE}",)
    return (f"{raw}; its export to PEFT, which is read here, is not the adapter that was trained: {reason}. {_ADVICE}",)


def _family(home: Source) -> Family | None:
    with suppress(AdapterToolsError):
        config = home.document(_MODEL_CONFIG)
        return Family.of(config, _MODEL_CONFIG) if config is not None else None
    return None
