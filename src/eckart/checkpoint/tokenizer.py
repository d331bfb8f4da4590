"""The tokenizer that lies beside a model, or word that there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from eckart.checkpoint.model_config import read_model_config
from eckart.errors import CheckpointError
from eckart.storage.layout import model_folder

# Any one of these makes a tokenizer: without them transformers may build an empty one from the model's type.
FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
         "source.spm", "tekken.json")  # fmt: skip
PATTERNS = ("*.model", "*.tiktoken", "*.spm")


def load_tokenizer(folder: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a model folder.

    Args:
        folder: the model folder; of sentence-transformers the one with ``modules.json`` will do.
        trust_remote_code: allow the tokenizer's own Python code to run.

    Returns:
        The tokenizer, or None where the folder holds none.

    Raises:
        CheckpointError: its files are there and cannot be read.
    """
    homes = dict.fromkeys([model_folder(Path(folder)), Path(folder)])
    for home in homes:
        if any((home / name).is_file() for name in FILES) or any(any(home.glob(pattern)) for pattern in PATTERNS):
            if (
                home / "config.json"
            ).is_file():  # the tokenizer's class reads it, and its faults are not the tokenizer's
                read_model_config(home, trust_remote_code=trust_remote_code)
            try:
                return AutoTokenizer.from_pretrained(home, local_files_only=True, trust_remote_code=trust_remote_code)
            except Exception as error:  # each tokenizer library raises its own
                raise CheckpointError(
                    f"The tokenizer in {home} cannot be read ({type(error).__name__}: {error}). Download the folder "
                    "again, or save the tokenizer again with save_pretrained."
                ) from error
    return None
