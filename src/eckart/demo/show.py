"""The steps of the demo; each gives plain values, and the command prints them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from eckart.checkpoint.open import find_checkpoint, open_model
from eckart.compression.compare import compare
from eckart.compression.pipeline import compress
from eckart.compression.recipe import Recipe
from eckart.compression.result import Result
from eckart.data.documents import load_documents
from eckart.data.inference import progress
from eckart.errors import CheckpointError, EckartError
from eckart.evaluation.perplexity import measure_perplexity
from eckart.methods import METHODS

MODEL = Path(__file__).parent / "model"
DEFAULT = str(Recipe.model_fields["method"].default)
PROMPT = "class Reader:\n    def __init__(self"
TOLERANCE = 1e-4
"""Of the perplexity, between this process and a fresh one that loads the published folder."""


@dataclass(frozen=True)
class DemoRow:
    """What one method made of the model at one size."""

    method: str
    keep: float
    perplexity: float
    of_sites: float
    seconds: float


@dataclass(frozen=True)
class Reloaded:
    """What a fresh process found in the published folder."""

    perplexity: float
    text: str
    bytes: int


@dataclass
class Demo:
    """The demo at one size.

    Attributes:
        windows: of 256 tokens, to calibrate on.
        held_tokens: of modules that neither training nor calibration saw, to measure on.
        methods: to compare.
        keeps: to compare at.
    """

    windows: int = 24
    held_tokens: int = 8_192
    window: int = 256
    methods: Sequence[str] = tuple(METHODS)
    keeps: Sequence[float] = (0.7, 0.4)
    held: list[str] = field(default_factory=list)

    def recipe(self, **options: Any) -> Recipe:
        """The recipe of the demo."""
        return Recipe(
            model=str(MODEL),
            data="stdlib",
            num_samples=self.windows,
            max_seq_length=self.window,
            batch_size=4,
            **options,
        )

    @cached_property
    def source(self) -> Any:
        """The bundled model in float32."""
        if not (MODEL / "model.safetensors").is_file():
            raise CheckpointError(f"{MODEL} holds no model.safetensors. Install eckart again: it is part of it.")
        return open_model(find_checkpoint(MODEL), needs_text="the demo")

    def measure(self, model: PreTrainedModel) -> float:
        """Perplexity on held-out modules of the standard library."""
        if not self.held:
            self.held, _ = load_documents("stdlib", split="held", max_characters=12 * self.held_tokens)
        options: dict[str, Any] = {"window": self.window, "max_tokens": self.held_tokens}
        return float(measure_perplexity(model, self.source.tokenizer, self.held, **options)["perplexity"])

    def rows(self) -> Iterator[DemoRow]:
        """Every method at every size, as they are ready."""
        made = compare(
            self.source.model, self.source.tokenizer, methods=self.methods, keeps=self.keeps, recipe=self.recipe()
        )
        for name, keep, result in progress(made, what="methods", total=len(self.methods) * len(self.keeps)):
            seconds = result.report["seconds"]
            own = sum(seconds.get(step, 0.0) for step in ("factorization", "replacement", "refit"))
            yield DemoRow(name, keep, self.measure(result.model), result.report["kept"]["of_sites"], own)

    def publish(self, folder: Path, keep: float, overwrite: bool = False) -> tuple[Result, Path]:
        """Compress by the default method, from checkpoint to checkpoint."""
        result = compress(recipe=self.recipe(keep=keep), output_dir=folder, overwrite=overwrite)
        return result, result.folder or folder

    def reload(self, folder: Path) -> Reloaded:
        """Load the folder in a fresh process as anyone would, write some code with it, and measure it.

        Raises:
            EckartError: with the last words of the process, if it fails.
        """
        order = {"folder": str(folder), "prompt": PROMPT, "held": self.held_tokens, "window": self.window,
                 "threads": torch.get_num_threads()}  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", FRESH, json.dumps(order)],
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
        )
        if done.returncode:
            words = "\n".join(done.stderr.strip().splitlines()[-5:])
            raise EckartError(f"{folder} could not be loaded in a fresh process; please report this: {words}")
        found = json.loads(done.stdout.strip().splitlines()[-1])
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        return Reloaded(found["perplexity"], found["text"], size)


def check_same(here: float, there: float, folder: Path) -> None:
    """Hold the reloaded model's perplexity against that of the model in memory.

    Raises:
        EckartError: they differ.
    """
    if not math.isclose(here, there, rel_tol=TOLERANCE):
        raise EckartError(
            f"{folder} has perplexity {there:.4f} in a fresh process and {here:.4f} in this one: what was saved is "
            "not what was measured. Please report this with the output of `pip list`."
        )


FRESH = """
import json, sys
import torch
import eckart
from transformers import AutoModelForCausalLM, AutoTokenizer
from eckart.demo.show import Demo
order = json.loads(sys.argv[1])
torch.set_num_threads(order["threads"])
model = AutoModelForCausalLM.from_pretrained(order["folder"])
tokenizer = AutoTokenizer.from_pretrained(order["folder"])
inputs = tokenizer(order["prompt"], return_tensors="pt")
written = model.generate(**inputs, max_new_tokens=56, do_sample=False,
                         repetition_penalty=1.2, pad_token_id=tokenizer.eos_token_id)
demo = Demo(held_tokens=order["held"], window=order["window"])
text = tokenizer.decode(written[0], skip_special_tokens=True)
print(json.dumps({"perplexity": demo.measure(model), "text": text}))
"""
