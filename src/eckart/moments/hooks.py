"""Fill the accumulators from a model's own forward (and backward) passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from eckart.moments.accumulate import Fisher, Moments, SecondMoment


class BatchLike(Protocol):
    """What a batch must offer: model-ready inputs, example numbers, masks of real tokens by length."""

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the model's forward."""
        ...

    @property
    def examples(self) -> tuple[int, ...]:
        """For each row, its place in the data."""
        ...

    def masks(self) -> dict[int, Tensor]:
        """Sequence length -> (B, T) mask of real tokens."""
        ...


# Runs the model on a batch and returns the loss to differentiate; None: a forward pass is enough.
Step = Callable[[Any], Tensor | None]


def shared_inputs(model: nn.Module, names: Sequence[str], run: Callable[[], Any]) -> dict[str, tuple[str, ...]]:
    """Group modules that are called on one and the same tensor.

    Args:
        model: the model.
        names: modules to group.
        run: makes one small forward pass.

    Returns:
        Leader -> all members, leader first, in order of the first call. Modules never called are absent.
    """
    calls: dict[str, list[tuple[Any, ...]]] = {}
    alive: list[Tensor] = []  # a freed tensor's address would be reused by another

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = _argument(args, kwargs)
            alive.append(x)
            key = (x.data_ptr(), x.storage_offset(), tuple(x.shape), x.stride(), x._version)
            calls.setdefault(name, []).append(key)

        return hook

    with _hooks(model.get_submodule(name).register_forward_pre_hook(note(name), with_kwargs=True) for name in names):
        run()
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, keys in calls.items():
        groups.setdefault(tuple(keys), []).append(name)
    return {members[0]: tuple(members) for members in groups.values()}


def common_calls(
    model: nn.Module, names: Sequence[str], one: Callable[[], Any], two: Callable[[], Any]
) -> dict[str, frozenset[int]]:
    """Find the calls on something that all examples of a batch have in common: a table of relative positions.

    Such an input comes once a batch, not once an example, and the gradient at its output is already summed over
    examples: its statistics depend on how the data are cut into batches, unless sequences run one at a time.

    Args:
        model: the model.
        names: modules to look at.
        one: makes a forward pass of one example.
        two: makes a forward pass of two examples of the same length.

    Returns:
        Module -> which of its calls, counted from 0. Modules without such a call are absent.
    """
    shapes: list[dict[str, list[tuple[int, ...]]]] = []
    for run in (one, two):
        seen: dict[str, list[tuple[int, ...]]] = {}

        def note(name: str, seen: dict[str, list[tuple[int, ...]]] = seen) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                seen.setdefault(name, []).append(tuple(_argument(args, kwargs).shape))

            return hook

        handles = [model.get_submodule(n).register_forward_pre_hook(note(n), with_kwargs=True) for n in names]
        with _hooks(handles):
            run()
        shapes.append(seen)
    common = {}
    for name, first in shapes[0].items():
        pairs = zip(first, shapes[1].get(name, ()), strict=False)
        # Two axes are no sign: experts see as many tokens as happen to be sent to them.
        calls = frozenset(i for i, (a, b) in enumerate(pairs) if a == b and len(a) > 2)
        if calls:
            common[name] = calls
    return common


def gather(
    model: nn.Module,
    groups: Mapping[str, Sequence[str]],
    batches: Iterable[BatchLike],
    step: Step,
    *,
    needs: frozenset[str],
    common: Mapping[str, frozenset[int]] | None = None,
) -> dict[str, Moments]:
    """Accumulate what the metrics need over all batches.

    Args:
        model: in eval mode; its parameters need no gradients.
        groups: leader -> members, as :func:`shared_inputs` gives them. One Gram serves a group.
        batches: with masks; padded tokens are never counted.
        step: runs the model on a batch. Its loss is differentiated when gradients are needed.
        needs: any of "gram", "absolute", "gradients", "fisher".
        common: as :func:`common_calls` gives it; batches must then be of one example each.

    Returns:
        Site name -> moments. Members of a group share one `inputs` object.

    Raises:
        NumericalError: naming the site and batch of a value that is not finite.
    """
    backward = bool(needs & {"gradients", "fisher"})
    moments: dict[str, Moments] = {}
    widths = {name: _widths(model.get_submodule(name)) for members in groups.values() for name in members}
    for members in groups.values():
        inputs = SecondMoment(widths[members[0]][0], "gram" in needs, "absolute" in needs)
        for name in members:
            moments[name] = Moments(
                inputs,
                SecondMoment(widths[name][1]) if "gradients" in needs else None,
                Fisher() if "fisher" in needs else None,
            )
    current = _Current(common)
    handles: list[Any] = []
    for leader, members in groups.items():
        module = model.get_submodule(leader)
        handles.append(
            module.register_forward_pre_hook(_input_hook(leader, moments[leader], current), with_kwargs=True)
        )
        if backward:
            for name in members:
                hook = _output_hook(name, moments[name], current)
                handles.append(model.get_submodule(name).register_forward_hook(hook, with_kwargs=True))
    sequences = 0
    with _hooks(handles), _frozen(model), torch.set_grad_enabled(backward):
        for number, batch in enumerate(batches):
            current.begin(batch, number)
            loss = step(batch)
            if backward and loss is not None:
                loss.backward()
            current.finish(moments)
            sequences += len(batch.examples)
    for entry in moments.values():
        entry.sequences = sequences
    return moments


def real_rows(x: Tensor, batch: BatchLike) -> Tensor:
    """(tokens, n): the real tokens of what a module of the model is given on a batch, padding removed."""
    current = _Current()
    current.begin(batch, 0)
    return current.rows(x)


class _Current:
    """The batch that is running, for the hooks."""

    def __init__(self, common: Mapping[str, frozenset[int]] | None = None) -> None:
        self.common = common or {}
        self.masks: dict[int, Tensor] = {}
        self.examples = 0
        self.number = 0
        self.calls: Counter[str] = Counter()
        self.pending: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def begin(self, batch: BatchLike, number: int) -> None:
        self.masks = batch.masks()
        self.examples = len(batch.examples)
        self.number = number
        self.calls.clear()
        self.pending.clear()

    def is_common(self, name: str, call: int) -> bool:
        """Whether this call's input has no axis of examples, so that no mask belongs to it."""
        return call in self.common.get(name, ())

    def mask_of(self, x: Tensor) -> Tensor | None:
        """The mask of real tokens in the layout of x (..., n) without its last axis; None: all are real."""
        mask = None
        if x.dim() == 3:
            mask = self.masks.get(x.shape[1])
            if mask is None or mask.shape[0] != x.shape[0]:
                mask = self.masks[x.shape[0]].mT if self._time_first(x) else None
        elif x.dim() == 2:  # some models flatten (B, T, n) to (B T, n)
            mask = next((m.reshape(-1) for m in self.masks.values() if m.numel() == x.shape[0]), None)
        if mask is None or bool(mask.all()):
            return None
        return mask.to(x.device)

    def rows(self, x: Tensor, common: bool = False) -> Tensor:
        """(tokens, n): the real tokens of x (..., n)."""
        mask = None if common else self.mask_of(x)
        return x.reshape(-1, x.shape[-1]) if mask is None else x[mask]

    def by_sequence(self, x: Tensor, common: bool = False) -> Tensor:
        """(B, T, n) with padding zeroed; (B T, n), (B, n), (T, B, n) and (B W, T, n) are brought to that layout."""
        mask = None if common else self.mask_of(x)
        if mask is not None:
            x = x * mask.unsqueeze(-1)
        if self._time_first(x):
            return x.transpose(0, 1)
        if x.shape[0] % self.examples == 0:
            return x.reshape(self.examples, -1, x.shape[-1])
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def finish(self, moments: Mapping[str, Moments]) -> None:
        """Sum up the calls of modules that ran more than once: their weight has ONE gradient a sequence."""
        for name, calls in self.pending.items():
            fisher = moments[name].fisher
            assert fisher is not None
            inputs, gradients = (torch.cat(parts, dim=1) for parts in zip(*calls, strict=True))
            fisher.update(inputs, gradients)
        self.pending.clear()

    def _time_first(self, x: Tensor) -> bool:
        """Whether x is (T, B, n), as XLNet has it."""
        if x.dim() != 3 or x.shape[0] == self.examples:
            return False
        mask = self.masks.get(x.shape[0])
        return mask is not None and mask.shape[0] == x.shape[1]


def _input_hook(name: str, moments: Moments, current: _Current) -> Callable[..., None]:
    key = f"input of {name}"

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = _argument(args, kwargs).detach()
        common = current.is_common(name, current.calls[key])
        current.calls[key] += 1
        moments.inputs.update(current.rows(x, common), f"{key}, batch {current.number}")

    return hook


def _output_hook(name: str, moments: Moments, current: _Current) -> Callable[..., Tensor]:
    key = f"output gradient of {name}"

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x = _argument(args, kwargs).detach() if moments.fisher is not None else None
        common = current.is_common(name, current.calls[key])
        current.calls[key] += 1
        if not output.requires_grad:  # parameters are frozen: the graph starts at the first site
            # A clone, because some models change a projection's output in place, which no leaf allows.
            output = output.detach().requires_grad_().clone()

        def receive(gradient: Tensor) -> None:
            if moments.gradients is not None:
                moments.gradients.update(current.rows(gradient, common), f"{key}, batch {current.number}")
            if moments.fisher is not None and x is not None:
                pair = current.by_sequence(x, common), current.by_sequence(gradient, common)
                if current.calls[key] > 1:
                    current.pending.setdefault(name, []).append(pair)
                else:
                    moments.fisher.update(*pair)

        output.register_hook(receive)
        return output

    return hook


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def _widths(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a Linear, or of a Conv1D, whose weight is (in, out)."""
    if hasattr(module, "in_features"):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    rows, columns = module.weight.shape  # type: ignore[misc]
    return int(rows), int(columns)


@contextmanager
def _hooks(handles: Iterable[Any]) -> Iterator[None]:
    held = list(handles)
    try:
        yield
    finally:
        for handle in held:
            handle.remove()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter gathers a gradient; flags are put back afterwards."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
