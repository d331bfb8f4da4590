"""What goes wrong when a model meets the data for the first time, told in terms of both."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from eckart.data.batch import Batch
from eckart.errors import DataError, EckartError, UsageError, is_out_of_memory

NOT_DATA = ("labels", "use_cache", "past_key_values", "return_dict", "cache_position", "logits_to_keep", "use_mems",
            "mems")  # fmt: skip
"""Parameters of a model's forward that are no inputs."""


@contextmanager
def explaining(model: nn.Module, inputs: Mapping[str, Tensor]) -> Iterator[None]:
    """Turn what a model's own code raises on its inputs into a message that names what it takes and what it was given.

    Memory that runs out is raised as it is: callers run smaller batches then.

    Raises:
        UsageError: the model reads something else than it was given.
        DataError: it cannot read what it was given.
    """
    try:
        yield
    except EckartError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise explain_failure(model, inputs, error) from error


def explain_failure(model: nn.Module, inputs: Mapping[str, Tensor], error: Exception) -> EckartError:
    """The error of a pass as a message: what was given, what the model takes, and what it said."""
    taken = inputs_of(model)
    main = getattr(model, "main_input_name", None)
    given = ", ".join(f"{name} {tuple(value.shape)}" for name, value in inputs.items() if name != "labels")
    said = (str(error).strip().splitlines() or [""])[0]
    kind = UsageError if main in taken and main not in inputs else DataError
    hint = ""
    if type(model).__name__.endswith("ForMultipleChoice"):
        hint = " Its input_ids are of (batch, choices, tokens)."
    elif "decoder_input_ids" in taken and not inputs.keys() & {"decoder_input_ids", "labels"}:
        hint = " A model of two sides needs decoder_input_ids or labels too."
    return kind(
        f"data: {type(model).__name__} cannot run on {given or 'nothing'} ({type(error).__name__}: {said}). "
        f"It reads {main or 'other inputs'}; all that it takes: {', '.join(taken)}.{hint} Pass batches of these from "
        "Python: data=[{...}, ...]"
    )


def inputs_of(model: nn.Module) -> list[str]:
    """The inputs that a model's forward takes, options left out."""
    parameters = inspect.signature(model.forward).parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return [name for name in named if name not in NOT_DATA and not name.startswith(("output_", "return_"))]


def require_known_tokens(
    batches: Iterable[Batch | Mapping[str, Tensor]], model: Any, config: Any, tokenizer: Any
) -> None:
    """Refuse token ids that the model has no embedding for, before it runs: on a GPU that would end the process.

    Raises:
        DataError: naming the token.
    """
    rows = embedding_rows(model, config)
    if rows is None:
        return
    for batch in batches:
        inputs = batch.inputs if isinstance(batch, Batch) else batch
        ids = inputs.get("input_ids")
        if ids is None or ids.is_floating_point() or not ids.numel():
            continue
        mask = inputs.get("attention_mask")
        for token in (int(ids.max()), int(ids.min())):
            if 0 <= token < rows:
                continue
            place = "a masked one" if mask is not None and not bool((ids == token)[mask.bool()].any()) else "a real one"
            name = _name_of(token, tokenizer)
            raise DataError(
                f"data: token {token}{name}, {place}, lies beyond the model's {rows} embeddings: give the tokenizer "
                "that belongs to this model, or let the model grow: model.resize_token_embeddings(len(tokenizer))"
            )


def embedding_rows(model: Any, config: Any) -> int | None:
    """How many tokens a model has embeddings for; None where nothing says so."""
    try:
        rows = getattr(model.get_input_embeddings(), "num_embeddings", None) if model is not None else None
    except (NotImplementedError, AttributeError):
        rows = None
    if rows is None and config is not None:
        rows = getattr(config.get_text_config(), "vocab_size", None)
    return rows if isinstance(rows, int) and rows > 0 else None


def _name_of(token: int, tokenizer: Any) -> str:
    try:
        return f" ({tokenizer.convert_ids_to_tokens(token)!r})"
    except Exception:  # no tokenizer, or none that knows it
        return ""
