"""Measure a profile: layers of random numbers, run as a model runs them."""

from __future__ import annotations

import copy
import itertools
import logging
import math
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eckart.forms import form_named
from eckart.speed.clock import Run, measure_in_turn, steady_stopwatch
from eckart.speed.profile import DENSE, JOINT, SLICED, Curve, Key, LayerRequest, Profile, name_of_dtype

logger = logging.getLogger(__name__)

COLD_BYTES = 64 * 2**20
"""What runs between two calls of a layer reads so many bytes of weights: in a whole model they have left the cache."""

COPIES = 8
"""The most copies of a layer."""

SECONDS = 0.1
"""That a layer is measured for, at least, in the mean of those that take turns."""

MODEL = "whole model"


@torch.no_grad()
def measure_profile(
    requests: Iterable[LayerRequest | tuple[Any, ...]],
    *,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    bias: bool = False,
    forward: Run | None = None,
    repeats: int = 5,
    min_seconds: float = SECONDS,
    report_progress: Callable[[str], None] = logger.info,
) -> Profile:
    """Measure every distinct layer of the requests on this device; all that read inputs of one width take turns.

    Layers have random numbers and run as in a model: without gradients, on an input of `tokens` rows, weights that
    have left the cache. The global random state stays as it is. With one thread on a CPU, the seconds are those that
    the processor works, so that a busy machine changes them little.

    Args:
        requests: layers, or their fields as tuples (form, in_features, heights, ranks). What stands twice is measured
            once, at the ranks of both.
        tokens: rows of the input: batch x length.
        dtype: of weights and input.
        device: where they compute.
        bias: whether the layers have a bias.
        forward: one forward of the whole dense model on as many tokens, for `model_seconds`.
        repeats: turns of each layer, at least.
        min_seconds: seconds that a layer is measured for, at least, in the mean of those that take turns.
        report_progress: told what is measured.

    Raises:
        UsageError: a form is not known, or a rank is not possible.
    """
    device = torch.device(device)
    grids: dict[Key, set[int]] = {}
    for request in requests:
        request = request if isinstance(request, LayerRequest) else LayerRequest(*request)
        for key in request.keys:
            grids.setdefault(key, set()).update({0} if request.form == DENSE else request.ranks)
    stopwatch = steady_stopwatch(device)
    seconds: dict[tuple[Key, int], float] = {}
    stream = torch.Generator(device).manual_seed(0)
    for width in sorted({width for _, width, _ in grids}):
        points = [(key, rank) for key, ranks in grids.items() if key[1] == width for rank in sorted(ranks)]
        report_progress(f"measuring {len(points)} layers that read {width} features, {tokens} tokens at a time")
        x = torch.randn(tokens, width, generator=stream, device=device).to(dtype)
        runs = dict(_runs(points, x, bias, stream))
        timings = measure_in_turn(runs, repeats=repeats, min_seconds=min_seconds, device=device, stopwatch=stopwatch)
        seconds |= {point: timings[str(number)].median for number, point in enumerate(points)}
        del runs
    whole = None
    if forward is not None:
        report_progress("measuring the whole model")
        whole = measure_in_turn(
            {MODEL: forward}, repeats=repeats, min_seconds=min_seconds, device=device, stopwatch=stopwatch
        )[MODEL].median
    return Profile(
        device=device.type,
        device_name=name_of_device(device),
        threads=torch.get_num_threads(),
        dtype=name_of_dtype(dtype),
        tokens=tokens,
        bias=bias,
        curves={
            key: Curve(tuple(sorted(ranks)), tuple(seconds[key, rank] for rank in sorted(ranks)))
            for key, ranks in grids.items()
            if ranks
        },
        model_seconds=whole,
    )


def name_of_device(device: torch.device) -> str:
    """What the processor or GPU calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# -- layers of random numbers ----------------------------------------------------------------------------------


def _runs(
    points: Sequence[tuple[Key, int]], x: Tensor, bias: bool, stream: torch.Generator
) -> Iterator[tuple[str, Run]]:
    """Calls of all layers by their numbers; each goes on to its next copy at every call."""
    empty = [_layers(key, rank, bias) for key, rank in points]
    stored = [sum(p.numel() for layer in layers for p in layer.parameters()) * x.element_size() for layers in empty]
    for number, ((key, _), layers) in enumerate(zip(points, empty, strict=True)):
        count = _count_copies(stored[number], sum(stored), x.device.type)
        copies = [[_fill(copy.deepcopy(layer), x, stream) for layer in layers] for _ in range(count)]
        run = {JOINT: _run_joint, SLICED: _run_sliced}.get(key[0], _run_each)
        yield str(number), partial(_run_next, run, itertools.cycle(copies), x)


def _count_copies(own: int, together: int, device: str) -> int:
    """How many copies of a layer take turns: those of a turn read one another's cache out.

    A turn on a CPU is one call of each layer, on a GPU many calls of one.

    Args:
        own: bytes of the layer.
        together: bytes of all layers that take turns.
        device: kind of device.
    """
    between = own if device == "cuda" else together
    return min(COPIES, max(1, math.ceil(COLD_BYTES / between)))


def _run_next(run: Callable[[Sequence[nn.Module], Tensor], None], copies: Iterator[list[nn.Module]], x: Tensor) -> None:
    run(next(copies), x)


def _layers(key: Key, rank: int, bias: bool) -> list[nn.Module]:
    """The layers without their numbers."""
    form, width, heights = key

    def linear(inputs: int, outputs: int, bias: bool = bias) -> nn.Module:
        return nn.Linear(inputs, outputs, bias, device="meta")

    if form == DENSE:
        return [linear(width, height) for height in heights]
    if form == JOINT:
        return [linear(width, rank, False), *(linear(rank, height) for height in heights)]
    if form == SLICED:
        return [*(linear(width, rank) for _ in heights[:-1]), linear(rank, heights[-1])]
    return [form_named(form).empty(height, width, rank, bias=bias, device="meta") for height in heights]


def _fill(layer: nn.Module, x: Tensor, stream: torch.Generator) -> nn.Module:
    """Random numbers that keep outputs of the input's size, and random orders for integers: time depends on neither."""
    layer = layer.to(x.dtype).to_empty(device=x.device).eval().requires_grad_(False)
    for tensor in (*layer.parameters(), *layer.buffers()):
        if tensor.is_floating_point():
            tensor.normal_(0, max(1, tensor.shape[-1]) ** -0.5, generator=stream)
        else:
            order = torch.randperm(tensor.numel(), generator=stream, device=tensor.device)
            tensor.copy_(order.view(tensor.shape))
    return layer


def _run_each(layers: Sequence[nn.Module], x: Tensor) -> None:
    for layer in layers:
        layer(x)


def _run_joint(layers: Sequence[nn.Module], x: Tensor) -> None:
    hidden = layers[0](x)
    for layer in layers[1:]:
        layer(hidden)


def _run_sliced(layers: Sequence[nn.Module], x: Tensor) -> None:
    hidden = [layer(x) for layer in layers[:-1]]
    layers[-1](hidden[-1])
