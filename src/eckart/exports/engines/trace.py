"""One trace of a model as engines take it: tensors in and out by name, batch and length left open, plain attention."""

from __future__ import annotations

import contextlib
import inspect
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

from eckart.data import Pooling
from eckart.data.model_kind import max_positions, model_kind
from eckart.errors import ModelError
from eckart.exports.engines.ports import BATCH, LENGTH, PAST, TOTAL, TRACED, TRACED_CAUSAL, Port, Shape, make_batch
from eckart.forms.transformers_internals import attention_of

SMALLEST = {TOTAL: 4}
"""The least size of an axis that the tracer is told; graphs run below it all the same, and are tried there."""

NOT_OUTPUTS = ("loss", "past_key_values", "hidden_states", "attentions", "cross_attentions")
WAY_OUT = "Export the dense model instead (--format dense), or the model's own class (--format remote-code)."


@dataclass(frozen=True)
class Graph:
    """A model as a function of named tensors.

    Attributes:
        function: of the tensors in the order of `inputs`; returns a tuple in the order of `outputs`.
        inputs: what it reads.
        outputs: names of what it returns.
        model: the model, in evaluation mode.
        tokenizer: or None.
    """

    function: nn.Module
    inputs: tuple[Port, ...]
    outputs: tuple[str, ...]
    model: PreTrainedModel
    tokenizer: Any

    @property
    def causal(self) -> bool:
        """Whether it reads and returns keys and values."""
        return any(PAST in port.axes for port in self.inputs)

    def batch(self, shape: Shape, seed: int = 0) -> dict[str, Tensor]:
        """Random inputs."""
        return make_batch(self.model, self.tokenizer, self.inputs, shape, seed)

    def run(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What PyTorch computes."""
        with torch.no_grad():
            made = self.function(*(batch[port.name] for port in self.inputs))
        return dict(zip(self.outputs, made, strict=True))


def describe(model: PreTrainedModel, tokenizer: Any, pooling: Pooling | None = None) -> Graph:
    """See what a model reads and returns, by running it once.

    Args:
        model: in evaluation mode, of float32 numbers.
        tokenizer: says which inputs its texts become; None for what the model takes.
        pooling: how the model's sentence embeddings are made, where it makes them; they become an output.

    Returns:
        The graph, before it is traced.

    Raises:
        ModelError: it is no model that a graph can hold.
    """
    taken = inspect.signature(model.forward).parameters
    if model.config.is_encoder_decoder and model_kind(model.config, model) == "encoder-decoder":
        raise ModelError(f"{type(model).__name__} is an encoder-decoder, which no graph is written for. {WAY_OUT}")
    if model.main_input_name == "pixel_values":
        inputs: tuple[Port, ...] = (_pixels(model),)
        return _seen(model, tokenizer, inputs, None)
    if "input_ids" not in taken or "attention_mask" not in taken:
        raise ModelError(
            f"{type(model).__name__} reads {model.main_input_name} and no attention_mask, which no graph is written "
            f"for. {WAY_OUT}"
        )
    if model_kind(model.config, model) == "causal" and "past_key_values" in taken and model.get_output_embeddings():
        return _with_cache(model, tokenizer, "position_ids" in taken)
    names = ["input_ids", "attention_mask"]
    wanted = getattr(tokenizer, "model_input_names", None)
    kinds = int(getattr(model.config, "type_vocab_size", 0) or 0)
    if "token_type_ids" in taken and ("token_type_ids" in wanted if wanted is not None else kinds > 1):
        names.append("token_type_ids")
    return _seen(model, tokenizer, tuple(Port(name, (BATCH, LENGTH)) for name in names), pooling)


def trace(graph: Graph) -> ExportedProgram:
    """Trace it, with batch and length left open.

    Raises:
        ModelError: the model's code cannot be traced, or only for fixed sizes.
    """
    batch = graph.batch(TRACED_CAUSAL if graph.causal else TRACED)
    inputs = tuple(batch[port.name] for port in graph.inputs)
    axes = sorted({axis for port in graph.inputs for axis in port.axes if isinstance(axis, str)})
    most = None if graph.causal else max_positions(graph.model.config, graph.model)
    dims = {axis: Dim(axis, min=SMALLEST.get(axis), max=most if axis == LENGTH else None) for axis in axes}
    reason = ""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            shapes = tuple({i: dims[axis] for i, axis in enumerate(port.axes) if axis in dims} for port in graph.inputs)
            try:
                return torch.export.export(
                    graph.function, inputs, dynamic_shapes={"tensors": shapes}, strict=False,
                    prefer_deferred_runtime_asserts_over_guards=True,
                )  # fmt: skip
            except Exception as error:  # whatever the model's code, or the tracer, runs into
                reason = in_a_line(error)
                bounds, others = _asked_bounds(str(error))
                if others or not bounds:
                    reason = "; ".join(others) or reason
                    break
                dims |= bounds
    raise ModelError(f"{type(graph.model).__name__} cannot be traced with open sizes ({reason}). {WAY_OUT}")


def in_a_line(error: BaseException) -> str:
    """What went wrong, by the first line of its first cause: the tools add pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


FUSED = "eckart-fused"
"""Attention as one operator, with a mask that is added: a text of padding alone gives numbers, whatever the engine."""


@contextlib.contextmanager
def attention(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Let a model compute its attention in one way for a while; one that has no choice stays as it is.

    Args:
        model: the model.
        implementation: "eager", or :data:`FUSED`.
    """
    AttentionInterface.register(FUSED, sdpa_attention_forward)
    AttentionMaskInterface.register(FUSED, eager_mask)
    before = attention_of(model.config) or "eager"
    try:
        model.set_attn_implementation(implementation)
    except (ValueError, ImportError):
        yield
        return
    try:
        yield
    finally:
        model.set_attn_implementation(before)


class _Plain(nn.Module):
    """A model without keys and values."""

    def __init__(self, model: PreTrainedModel, inputs: Sequence[str], outputs: Sequence[str], pooling: Pooling | None):
        super().__init__()
        self.model, self.inputs, self.outputs, self.pooling = model, tuple(inputs), tuple(outputs), pooling
        self.options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(self.inputs, tensors, strict=True))
        made = self.model(**named, **self.options, return_dict=True)
        found = [made[name] for name in self.outputs if name != SENTENCE]
        if self.pooling is not None:
            found.append(self.pooling(made, named["attention_mask"]))
        return tuple(found)


class _Cached(nn.Module):
    """A causal model that reads and returns keys and values, layer by layer."""

    def __init__(self, model: PreTrainedModel, inputs: Sequence[str], layers: int) -> None:
        super().__init__()
        self.model, self.inputs, self.layers = model, tuple(inputs), layers

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(self.inputs, tensors[: len(self.inputs)], strict=True))
        past = tensors[len(self.inputs) :]
        layers = []
        for i in range(self.layers):
            layer = DynamicLayer()
            layer.lazy_initialization(past[2 * i], past[2 * i + 1])
            # Not by `update`: it joins them to tensors without axes, which not every engine takes.
            layer.keys, layer.values = past[2 * i], past[2 * i + 1]
            layers.append(layer)
        cache = DynamicCache()
        cache.layers.extend(layers)
        made = self.model(**named, past_key_values=cache, use_cache=True, return_dict=True)
        return (made.logits, *(tensor for layer in layers for tensor in (layer.keys, layer.values)))


SENTENCE = "sentence_embedding"


def _seen(model: PreTrainedModel, tokenizer: Any, inputs: tuple[Port, ...], pooling: Pooling | None) -> Graph:
    names = [port.name for port in inputs]
    draft = Graph(_Plain(model, names, (), None), inputs, (), model, tokenizer)
    with torch.no_grad():
        made = model(**draft.batch(TRACED), return_dict=True)
    unused = (*NOT_OUTPUTS, "pooler_output") if pooling is not None else NOT_OUTPUTS
    found = [name for name, value in made.items() if isinstance(value, Tensor) and name not in unused]
    if not found:
        raise ModelError(f"{type(model).__name__} returns no tensor by name, so that no graph is written. {WAY_OUT}")
    outputs = (*found, *([SENTENCE] if pooling is not None else []))
    return Graph(_Plain(model, names, outputs, pooling), inputs, outputs, model, tokenizer)


def _with_cache(model: PreTrainedModel, tokenizer: Any, positions: bool) -> Graph:
    with torch.no_grad():
        made = model(torch.zeros(1, 2, dtype=torch.long), use_cache=True, return_dict=True)
    cache = getattr(made, "past_key_values", None)
    layers = list(getattr(cache, "layers", ()))
    kept: list[tuple[Any, Any]] = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    if not layers or not all(isinstance(t, Tensor) and t.dim() == 4 and t.shape[2] == 2 for pair in kept for t in pair):
        raise ModelError(
            f"{type(model).__name__} keeps other states than keys and values of every layer, which no graph is written "
            f"for. {WAY_OUT}"
        )
    first = [Port("input_ids", (BATCH, LENGTH)), Port("attention_mask", (BATCH, TOTAL))]
    first += [Port("position_ids", (BATCH, LENGTH))] if positions else []
    past, present = [], []
    for i, pair in enumerate(kept):
        for part, tensor in zip(("key", "value"), pair, strict=True):
            past.append(Port(f"past_key_values.{i}.{part}", (BATCH, tensor.shape[1], PAST, tensor.shape[3]), True))
            present.append(f"present.{i}.{part}")
    function = _Cached(model, [port.name for port in first], len(layers))
    return Graph(function, (*first, *past), ("logits", *present), model, tokenizer)


def _pixels(model: PreTrainedModel) -> Port:
    size = getattr(model.config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    return Port("pixel_values", (BATCH, getattr(model.config, "num_channels", 3), height, width), True)


def _asked_bounds(said: str) -> tuple[dict[str, Dim], list[str]]:
    """What the tracer suggests: bounds of open axes, which are taken; and anything else, such as a fixed size."""
    bounds, others = {}, []
    for line in said.partition("Suggested fixes:")[2].strip().partition("\n\n")[0].splitlines():
        found = re.fullmatch(r"(\w+) = Dim\('\w+'(?:, min=(\d+))?(?:, max=(\d+))?\)", line.strip())
        if found is None:
            others.append(line.strip())
        else:
            name, low, high = found.groups()
            bounds[name] = Dim(name, min=int(low) if low else None, max=int(high) if high else None)
    return bounds, others
