"""Runs llama.cpp's own converters, each many times in one process: they take longer to start than to work.

    python llama_cpp_conversion.py SOURCE < jobs.json

SOURCE is a folder with llama.cpp's convert_lora_to_gguf.py, conversion and gguf-py. A job is {"model": folder, "to":
file} for a base model, which becomes F32 without a vocabulary, or {"adapter": folder, "base": folder, "to": file,
"type": …}. What fails is printed as JSON: the job's number and the reason.
"""

import contextlib
import json
import runpy
import sys
from pathlib import Path
from typing import Any

SOURCE = Path(sys.argv[1])
sys.path[:0] = [str(SOURCE), str(SOURCE / "gguf-py")]

import gguf  # noqa: E402
import torch  # noqa: E402
from conversion import ModelBase, ModelType, get_model_architecture, get_model_class  # noqa: E402


def convert_model(model: Path, to: Path) -> None:
    hparams = ModelBase.load_hparams(model, False)
    kind = get_model_class(get_model_architecture(hparams, ModelType.TEXT))

    class WithoutVocabulary(kind):  # type: ignore[misc, valid-type]
        model_arch = kind.model_arch

        def set_vocab(self) -> None:
            self.gguf_writer.add_tokenizer_model("no_vocab")

        def set_gguf_parameters(self) -> None:
            super().set_gguf_parameters()
            key = f"{gguf.MODEL_ARCH_NAMES[self.model_arch]}.vocab_size"
            if not any(key in pairs for pairs in self.gguf_writer.kv_data):
                self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])

    with torch.inference_mode():
        WithoutVocabulary(model, gguf.LlamaFileType.ALL_F32, to, hparams=hparams).write()


def convert_adapter(job: dict[str, Any]) -> None:
    script = str(SOURCE / "convert_lora_to_gguf.py")
    sys.argv = [script, "--base", job["base"], "--outfile", job["to"], "--outtype", job["type"], job["adapter"]]
    runpy.run_path(script, run_name="__main__")


failed: dict[str, str] = {}
with contextlib.redirect_stdout(sys.stderr):
    for number, job in enumerate(json.load(sys.stdin)):
        try:
            convert_model(Path(job["model"]), Path(job["to"])) if "model" in job else convert_adapter(job)
        except (Exception, SystemExit) as error:
            failed[str(number)] = f"{type(error).__name__}: {error}"
print(json.dumps(failed))
