"""Run models without training: evaluation mode, inputs on their device, a progress bar."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from eckart.data.explain import explaining
from eckart.data.last_token import padding_named, tell_padding
from eckart.progress import show_bar

T = TypeVar("T")

SECOND = 16_000
"""Samples of a second of sound."""


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the mode of every module is restored, after errors too.

    Yields:
        Nothing.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    if any(mode for _, mode in modes):  # it is entered for each block: what is set already is not set again
        for model in models:
            model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            if module.training != mode:
                module.training = mode


def device_of(model: nn.Module) -> torch.device:
    """Return the device that a model takes its inputs on.

    Args:
        model: The model.

    Returns:
        The device of its first parameter that is not on the meta device; the CPU if there is none. While weights are
        loaded block by block, that is an empty parameter on the device that computes: see
        :meth:`eckart.model.WeightLoader.streaming`.
    """
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))


def forward(model: nn.Module, inputs: dict[str, Tensor], **more: Any) -> Any:
    """Run a model on its own device, without a key-value cache.

    Its configuration stays as it is: classes with labels would write into it what kind of task they believe to have.

    Args:
        model: The model.
        inputs: Its keyword arguments; labels are left out, floating-point inputs get the model's dtype: that of its
            first parameter, as for :func:`device_of`.
        more: Further keyword arguments.

    Returns:
        What the model returns.
    """
    device = device_of(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    moved = {
        name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
        for name, value in inputs.items()
        if name != "labels"
    }
    for name in ("use_cache", "use_mems"):  # XLNet has another name for it
        if name in inspect.signature(model.forward).parameters:
            more.setdefault(name, False)
    config: Any = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None)
    try:
        moved, padding = tell_padding(model, moved)
        with padding_named(model, padding):
            return model(**moved, **more)
    finally:
        if getattr(config, "problem_type", None) != problem:
            config.problem_type = problem


def dummy_inputs(model: Any) -> dict[str, Tensor]:
    """One row of the inputs that transformers makes up for a model; a blank image or silence where it makes none."""
    made = {name: value[:1] for name, value in model.dummy_inputs.items() if isinstance(value, Tensor)}
    name, config = model.main_input_name, model.config
    if name in made:
        return made
    if name == "pixel_values":
        config = getattr(config, "vision_config", config)
        size = getattr(config, "image_size", 224)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return {name: torch.zeros(1, getattr(config, "num_channels", 3), height, width)}
    if name == "input_values":
        return {name: torch.zeros(1, SECOND)}
    if name == "input_features" and hasattr(config, "max_source_positions"):
        return {name: torch.zeros(1, config.num_mel_bins, 2 * config.max_source_positions)}
    return made


def run(model: nn.Module, inputs: dict[str, Tensor], **more: Any) -> Any:
    """Run a model as :func:`forward` does; what its own code raises on these inputs is explained.

    Raises:
        EckartError: see :func:`eckart.data.explain.explaining`.
    """
    with explaining(model, inputs):
        return forward(model, inputs, **more)


def progress(items: Iterable[T], *, what: str, total: int | None = None, disable: bool | None = None) -> Iterable[T]:
    """Show a bar over a loop.

    Args:
        items: The items of the loop.
        what: The bar's caption.
        total: Number of items, if `items` has no length.
        disable: True for no bar, None for a bar on a terminal only.
            `huggingface_hub.utils.disable_progress_bars` disables it in any case.

    Returns:
        The items.
    """
    shown: Iterable[T] = show_bar(items, what=what, total=total, disable=disable)
    return shown
