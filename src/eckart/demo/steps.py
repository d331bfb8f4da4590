"""The steps of the demo on the bundled model; each gives plain values, and the command prints them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from eckart.checkpoint.open import OpenedModel, find_checkpoint, open_model
from eckart.compression.compare import OWN_STEPS, compare
from eckart.compression.pipeline import compress
from eckart.compression.recipe import Recipe
from eckart.compression.result import Result
from eckart.demo.held_out import HeldOutText
from eckart.errors import CheckpointError
from eckart.registry import METHODS

MODEL = Path(__file__).parent / "model"
DEFAULT = str(Recipe.model_fields["method"].default)


@dataclass(frozen=True)
class DemoRow:
    """What one method made of the model at one size; seconds are those of the steps that it takes by itself."""

    method: str
    keep: float
    perplexity: float
    of_sites: float
    seconds: float


@dataclass
class Demo:
    """The demo at one size.

    Attributes:
        windows: windows of text to calibrate on.
        held_tokens: tokens to measure on.
        window: tokens of a window.
        methods: to compare.
        keeps: fractions of the numbers to compare at.
    """

    windows: int = 24
    held_tokens: int = 8_192
    window: int = 256
    methods: Sequence[str] = tuple(METHODS)
    keeps: Sequence[float] = (0.7, 0.4)

    @cached_property
    def source(self) -> OpenedModel:
        """The bundled model in float32."""
        if not (MODEL / "model.safetensors").is_file():
            raise CheckpointError(f"{MODEL} holds no model.safetensors. Install eckart again: it is part of it.")
        return open_model(find_checkpoint(MODEL), needs_text="the demo")

    @cached_property
    def held_out(self) -> HeldOutText:
        return HeldOutText(self.held_tokens, self.window)

    def recipe(self, **options: Any) -> Recipe:
        return Recipe(
            model=str(MODEL),
            data="stdlib",
            num_samples=self.windows,
            max_seq_length=self.window,
            batch_size=4,
            **options,
        )

    def measure(self, model: PreTrainedModel) -> float:
        """Perplexity on held-out modules of the standard library."""
        return self.held_out.measure(model, self.source.tokenizer)

    def rows(self) -> Iterator[DemoRow]:
        """Every method at every size, as each is ready."""
        results = compare(
            self.source.model,
            self.source.tokenizer,
            methods=self.methods,
            keeps=self.keeps,
            recipe=self.recipe(latency=False),
        )
        for name, keep, result in results:
            seconds = sum(result.report["seconds"].get(step, 0.0) for step in OWN_STEPS)
            yield DemoRow(name, keep, self.measure(result.model), result.report["kept"]["of_sites"], seconds)

    def publish(self, folder: Path, keep: float, overwrite: bool = False) -> tuple[Result, Path]:
        """Compress by the default method, from checkpoint to checkpoint."""
        result = compress(recipe=self.recipe(keep=keep), output_dir=folder, overwrite=overwrite)
        return result, result.folder or folder
