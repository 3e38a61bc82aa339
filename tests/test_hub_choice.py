"""Which files of a repository are fetched: one format, one kind of weights, and nothing of training."""

import pytest

from adaptertools.errors import AmbiguousFormatError, HubNotFoundError, UnknownFormatError, UnsafeFileError
from adaptertools.hub.address import parse_address
from adaptertools.hub.cache import RemoteFile
from adaptertools.hub.choice import choose_adapter_files, has_adapter
from adaptertools.hub.models import choose_model_files, has_model
from adaptertools.hub.revision import Revision, check_names

TRAINING = [
    *("README.md", ".gitattributes", "optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state.pth"),
    *("training_args.bin", "trainer_state.json", "runs/events.out.tfevents.1", "tokenizer.json"),
    "global_step5/mp_rank_00_model_states.pt",
]


def revision(names: str, at: str = "org/name", sizes: int = 10) -> Revision:
    return Revision(address=parse_address(at), sha="a" * 40, files={name: RemoteFile(sizes) for name in names.split()})


def test_of_a_peft_adapter_its_configuration_and_one_kind_of_weights_are_fetched() -> None:
    found = revision("adapter_config.json adapter_model.safetensors adapter_model.bin " + " ".join(TRAINING))
    choice = choose_adapter_files(found)
    assert set(choice) == {"adapter_config.json", "adapter_model.safetensors"}
    assert set(choice.left_out) == {"adapter_model.bin", *TRAINING}


def test_the_history_beside_a_peft_adapter_comes_along() -> None:
    found = revision("adapter_config.json adaptertools.json adapter_model.bin")
    assert set(choose_adapter_files(found, allow_pickle=True)) == set(found.files)


def test_all_shards_of_a_peft_adapter_and_their_index_are_fetched() -> None:
    shards = [f"adapter_model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    names = ["adapter_config.json", *shards, "adapter_model.safetensors.index.json", "adapter_model.bin.index.json"]
    assert set(choose_adapter_files(revision(" ".join(names)))) == set(names[:-1])
    one = revision(" ".join(names), f"hf://org/name/{shards[1]}")
    assert set(choose_adapter_files(one)) == set(names[:-1])


def test_an_adapter_in_a_folder_below_is_found_and_several_are_asked_about() -> None:
    assert set(choose_adapter_files(revision("fr/adapter_config.json fr/adapter_model.safetensors x.txt"))) == {
        "fr/adapter_config.json",
        "fr/adapter_model.safetensors",
    }
    both = "fr/adapter_config.json fr/adapter_model.safetensors de/adapter_config.json de/adapter_model.safetensors"
    with pytest.raises(AmbiguousFormatError, match=r"de, fr. Name one: hf://org/name@main/de"):
        choose_adapter_files(revision(both))
    assert choose_adapter_files(revision(both, "hf://org/name/fr")).at == "fr"


def test_checkpoints_of_the_training_beside_an_adapter_are_left_where_they_are() -> None:
    own = "adapter_config.json adapter_model.safetensors "
    later = "checkpoint-9/adapter_config.json checkpoint-9/adapter_model.safetensors checkpoint-9/optimizer.pt"
    assert set(choose_adapter_files(revision(own + later))) == set(own.split())


@pytest.mark.parametrize("suffix", ["msgpack", "npz", "safetensors"])
def test_a_flax_adapter_comes_with_its_sidecar(suffix: str) -> None:
    names = f"flax_adapter.{suffix} flax_adapter.json"
    assert set(choose_adapter_files(revision(names + " README.md"))) == set(names.split())
    assert set(choose_adapter_files(revision(names, f"hf://org/name/flax_adapter.{suffix}"))) == set(names.split())


def test_an_orbax_folder_comes_whole() -> None:
    tree = "flax_adapter.orbax/_METADATA flax_adapter.orbax/d/0 flax_adapter.json"
    choice = choose_adapter_files(revision(tree + " README.md"))
    assert set(choice) == set(tree.split())
    assert choice.at == ""
    foreign = choose_adapter_files(revision("run/3/items/_METADATA run/3/items/d/0 run/3/_CHECKPOINT_METADATA"))
    assert (set(foreign), foreign.at) == ({"run/3/items/_METADATA", "run/3/items/d/0"}, "run/3/items")


def test_a_file_by_itself_is_an_adapter_and_comes_with_what_belongs_to_it() -> None:
    names = "lora.safetensors lora.safetensors.adaptertools.json"
    choice = choose_adapter_files(revision(names + " lora.pt optimizer.safetensors"))
    assert (set(choice), choice.at) == (set(names.split()), "lora.safetensors")
    assert choose_adapter_files(revision("made made.adaptertools.json README.md")).at == "made"
    with pytest.raises(AmbiguousFormatError, match=r"a.safetensors, b.safetensors may each be the adapter"):
        choose_adapter_files(revision("a.safetensors b.safetensors"))
    assert choose_adapter_files(revision("a.safetensors b.safetensors", "hf://org/name/b.safetensors")).at == (
        "b.safetensors"
    )


@pytest.mark.parametrize("names", ["adapter_config.json adapter_model.bin", "lora.pt", "model.9.pt README.md"])
def test_a_pickle_alone_is_fetched_only_where_it_is_asked_for(names: str) -> None:
    with pytest.raises(UnsafeFileError, match=r"a pickle, which can hold code.*--allow-pickle"):
        choose_adapter_files(revision(names))
    assert set(choose_adapter_files(revision(names), allow_pickle=True)) == set(names.split()) - {"README.md"}


@pytest.mark.parametrize("names", ["", "README.md", "adapter_config.json", " ".join(TRAINING), "model.safetensors"])
def test_a_repository_without_an_adapter_is_said_to_be_one(names: str) -> None:
    with pytest.raises(UnknownFormatError, match="no adapter in it"):
        choose_adapter_files(revision(names))
    assert not has_adapter(revision(names))


def test_a_folder_that_is_not_there_is_named() -> None:
    for choose in (choose_adapter_files, choose_model_files):
        with pytest.raises(HubNotFoundError, match="no file and no folder fr"):
            choose(revision("adapter_config.json", "hf://org/name/fr"))


def test_of_a_model_one_kind_of_weights_and_what_uses_them_is_fetched() -> None:
    wanted = "config.json model.safetensors tokenizer.json tokenizer.model modeling.py chat_template.jinja LICENSE"
    others = "pytorch_model.bin model.fp16.safetensors tf_model.h5 original/params.json onnx/model.onnx optimizer.pt "
    others += "README.md training_args.bin trainer_state.json .gitattributes model.gguf flax_model.msgpack"
    choice = choose_model_files(revision(f"{wanted} {others}"))
    assert set(choice) == set(wanted.split())
    assert set(choice.left_out) == set(others.split())


def test_the_weights_of_one_component_are_fetched_from_its_folder() -> None:
    names = "unet/config.json unet/diffusion_pytorch_model.safetensors vae/diffusion_pytorch_model.safetensors"
    choice = choose_model_files(revision(names, "hf://org/name/unet"))
    assert (set(choice), choice.at) == (set(names.split()[:2]), "unet")


def test_what_stands_behind_the_model_in_a_pipeline_of_sentences_comes_along() -> None:
    wanted = "modules.json config.json model.safetensors 1_Pooling/config.json 2_Dense/config.json "
    wanted += "2_Dense/model.safetensors"
    choice = choose_model_files(revision(wanted + " 2_Dense/pytorch_model.bin onnx/model.onnx"))
    assert set(choice) == set(wanted.split())


def test_a_repository_with_a_model_and_other_files_of_tensors_is_one_of_a_model() -> None:
    for others in ("", "other.bin", "vae.safetensors", "lora/adapter_config.json lora/adapter_model.safetensors"):
        found = revision(f"config.json model.safetensors {others}")
        assert has_model(found)
        assert not has_adapter(found)
    assert has_adapter(revision("config.json model.safetensors adapter_config.json adapter_model.safetensors"))


def test_a_huge_file_beside_the_weights_is_left_where_it_is() -> None:
    assert set(choose_model_files(revision("model.safetensors data.json", sizes=1 << 30))) == {"model.safetensors"}


def test_a_model_of_pickles_alone_is_fetched_only_where_it_is_asked_for() -> None:
    for names in ("config.json pytorch_model.bin", "config.json pytorch_model.bin.index.json x-1.bin"):
        with pytest.raises(UnsafeFileError, match="weights of this model"):
            choose_model_files(revision(names))
    assert "pytorch_model.bin" in set(choose_model_files(revision("pytorch_model.bin"), allow_pickle=True))


def test_a_repository_without_a_model_is_said_to_be_one() -> None:
    with pytest.raises(UnknownFormatError, match=r"expected one of model.safetensors.index.json"):
        choose_model_files(revision("config.json a.safetensors b.safetensors"))
    assert not has_model(revision("adapter_config.json adapter_model.safetensors"))
    assert has_model(revision("model.safetensors"))


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/etc/passwd",
        "a/../../x",
        "a//b",
        "./a",
        "..",
        "a\\..\\..\\b",
        "C:/x",
        "C:x",
        "a\x00b",
        "a\nb",
        "a\x1b[2J",
    ],
)
def test_path_like_names_are_refused(name: str) -> None:
    with pytest.raises(UnsafeFileError, match="outside its folder"):
        check_names(parse_address("org/name"), {"adapter_config.json": 1, name: 2})


def test_ordinary_names_are_not_refused() -> None:
    check_names(parse_address("org/name"), dict.fromkeys(["a b", ".gitattributes", "…/ü.txt", "a..b", "ab:c", "x/y.z"]))
