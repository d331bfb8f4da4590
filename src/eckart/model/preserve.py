"""Leave a caller's model as it was."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig

CONFIG_NAMES = ("config", "generation_config")


@contextmanager
def preserve_state(*models: nn.Module) -> Iterator[None]:
    """Restore, on leaving, what a computation may change about models beside their numbers.

    That is: configuration and generation configuration, training mode of every module, `requires_grad`, device and
    dtype of parameters and buffers, and the global random state. Modules that were replaced and numbers that were
    written over stay so: for these, work on :func:`eckart.model.shared_clone`.

    Args:
        models: any number of them; with none, only the random state is restored.

    Yields:
        Nothing; the state is restored after errors too.
    """
    modules = list({id(module): module for model in models for module in model.modules()}.values())
    modes = [(module, module.training) for module in modules]
    configs = _configs(modules)
    keep = {id(config): config for config in configs.values()}
    settings = [(config, copy.deepcopy(vars(config), dict(keep))) for config in configs.values()]
    named = [(module, name, vars(module)[name]) for module in modules for name in CONFIG_NAMES if name in vars(module)]
    parameters = [
        (p, p.data, p.requires_grad) for module in modules for p in module._parameters.values() if p is not None
    ]
    buffers = [(module._buffers, name, buffer) for module in modules for name, buffer in module._buffers.items()]
    try:
        with preserve_random_state():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for config, before in settings:
            vars(config).clear()
            vars(config).update(before)
        for module, name, config in named:
            setattr(module, name, config)
        for parameter, data, trains in parameters:
            if _moved(parameter.data, data):
                parameter.data = data
            parameter.requires_grad_(trains)
        for table, name, buffer in buffers:
            now = table.get(name)
            if buffer is not None and now is not None and _moved(now, buffer):
                table[name] = buffer


@contextmanager
def preserve_random_state() -> Iterator[None]:
    """Restore, on leaving, the global generators of Python, NumPy and torch on every device that is in use."""
    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if mps is not None:
            torch.mps.set_rng_state(mps)


def _configs(modules: list[nn.Module]) -> dict[int, Any]:
    """Every configuration object of the modules, those inside others included, by id."""
    found: dict[int, Any] = {}
    pending = [vars(module)[name] for module in modules for name in CONFIG_NAMES if name in vars(module)]
    while pending:
        config = pending.pop()
        if isinstance(config, PretrainedConfig | GenerationConfig) and id(config) not in found:
            found[id(config)] = config
            pending += vars(config).values()
    return found


def _moved(now: Tensor, before: Tensor) -> bool:
    return now.device != before.device or now.dtype != before.dtype
