"""Behaviors on a model: its blocks and its own call know of them, its class and its parameters stay as they are."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eckart.adaptive.behavior import Behavior
from eckart.adaptive.walk import Walk
from eckart.errors import CheckpointError, ModelError, UsageError
from eckart.registry import BEHAVIORS

logger = logging.getLogger(__name__)

ATTRIBUTE = "eckart_adaptive"
"""Attribute of a model that holds its :class:`Controller`."""

_PASSES: ContextVar[tuple[tuple[Controller, Walk | None], ...]] = ContextVar("eckart_adaptive_passes", default=())
"""Passes that are under way in this thread, the innermost last; the walk is None where a model runs in full."""


class Controller:
    """Runs the behaviors of one model; copied with it."""

    def __init__(self, model: PreTrainedModel, blocks: Sequence[str]) -> None:
        self.model = model
        self.blocks = tuple(blocks)
        self.behaviors: dict[str, Behavior] = {}
        self.names = tuple(inspect.signature(model.forward).parameters)
        self.handles = [
            model.register_forward_pre_hook(_Enter(self), with_kwargs=True),
            model.register_forward_hook(_Leave(self), with_kwargs=True, always_call=True),
        ]
        for name in dict.fromkeys(self.blocks):
            block = model.get_submodule(name)
            vars(block)["forward"] = _BlockForward(self, block, vars(block).get("forward"))

    def remove(self) -> None:
        """Make the model and its blocks what they were."""
        for handle in self.handles:
            handle.remove()
        for name in dict.fromkeys(self.blocks):
            block = self.model.get_submodule(name)
            own = vars(block).get("forward")
            if isinstance(own, _BlockForward):
                del vars(block)["forward"]
                if own.before is not None:
                    vars(block)["forward"] = own.before
        self.behaviors = {}  # what has been wrapped around a block's forward meanwhile calls it as it is

    def current(self) -> Walk | None:
        """The pass under way; None where the model runs in full."""
        return next((walk for owner, walk in reversed(_PASSES.get()) if owner is self), None)

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A pass begins."""
        options = {
            name: {key: kwargs[key] for key in behavior.keywords if key in kwargs}
            for name, behavior in self.behaviors.items()
        }
        taken = {key for found in options.values() for key in found}
        kwargs = {key: value for key, value in kwargs.items() if key not in taken}
        walk = None
        if not self.model.training and not self._shows_inside(kwargs):
            walk = Walk(self.model, len(self.blocks), {**dict(zip(self.names, args, strict=False)), **kwargs}, options)
            for behavior in self.behaviors.values():
                behavior.begin(walk)
        others = (entry for entry in _PASSES.get() if entry[0] is not self)  # a pass that was interrupted has not left
        _PASSES.set((*others, (self, walk)))
        return args, kwargs

    def leave(self, output: Any) -> Any:
        """A pass has ended; output is None where it has failed."""
        passes = _PASSES.get()
        if not passes or passes[-1][0] is not self:
            return output
        _PASSES.set(passes[:-1])
        walk = passes[-1][1]
        if walk is None or output is None or not walk.is_last:
            return output
        for behavior in self.behaviors.values():
            output = behavior.end(walk, output)
        return output

    def run_block(self, walk: Walk, block: _BlockForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a block on what is left of the batch; the last one gives back a hidden state of the whole batch."""
        if walk.is_last:
            raise ModelError(
                f"{type(self.model).__name__} calls more blocks than the {walk.blocks} that its config.json describes "
                "as adaptive. Load it with the transformers that it was saved with."
            )
        stream = _stream_of(args or kwargs.get("hidden_states"))
        if not walk.started:
            walk.start(stream)
        if stream.shape[:2] != walk.hidden.shape[:2]:
            raise ModelError(
                f"{type(self.model).__name__} gives block {walk.done + 1} a hidden state of {tuple(stream.shape)}, and "
                f"{tuple(walk.hidden.shape)} are left: rows cannot leave its batch."
            )
        if len(walk.rows) or not walk.batch:
            walk.hidden = stream
            args, kwargs = walk.narrowed(args, stream), walk.narrowed(kwargs, stream)
            for behavior in self.behaviors.values():
                args, kwargs = behavior.before_block(walk, args, kwargs)
            walk.output = block.run(args, kwargs)
            walk.hidden = _stream_of(walk.output)
        walk.done += 1
        if len(walk.rows):
            for behavior in self.behaviors.values():
                behavior.after_block(walk)
                if not len(walk.rows):
                    break
        return _with_stream(walk.output, walk.restored() if walk.is_last else walk.hidden)

    def _shows_inside(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether the caller asks for what is between the blocks, which is of the whole batch."""
        config: Any = self.model.config
        for name in ("output_hidden_states", "output_attentions"):
            given = kwargs.get(name)
            if given or (given is None and getattr(config, name, False)):
                return True
        return False


class _Enter:
    """Hook before a model's call."""

    def __init__(self, controller: Controller) -> None:
        self.controller = controller

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return self.controller.enter(args, kwargs)


class _Leave:
    """Hook after a model's call."""

    def __init__(self, controller: Controller) -> None:
        self.controller = controller

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return self.controller.leave(output)


class _BlockForward:
    """In place of a block's `forward`: hooks cannot leave a block out."""

    def __init__(self, controller: Controller, block: nn.Module, before: Any) -> None:
        self.controller = controller
        self.block = block
        self.before = before  # what was set on this very block, such as accelerate's

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        walk = self.controller.current()
        return self.run(args, kwargs) if walk is None else self.controller.run_block(walk, self, args, kwargs)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The block's own forward."""
        if self.before is not None:
            return self.before(*args, **kwargs)
        return type(self.block).forward(self.block, *args, **kwargs)


def attach(model: PreTrainedModel, behavior: Behavior, blocks: Sequence[str]) -> None:
    """Let a model behave so, in place; a behavior of the same name is replaced.

    It does so in evaluation mode. In training mode, and where hidden states or attentions are asked for, the whole
    model runs on the whole batch.

    Args:
        model: its class and its own parameters stay as they are. What the behavior needs beside them is there
            afterwards, as ordinary modules.
        behavior: registered under its name.
        blocks: names of the blocks in the order in which a pass calls them; one that is called twice stands twice.

    Raises:
        ModelError: the model has other behaviors over other blocks, or cannot behave so.
    """
    controller = vars(model).get(ATTRIBUTE)
    if controller is not None and controller.blocks != tuple(blocks):
        raise ModelError(
            f"{type(model).__name__} has {', '.join(controller.behaviors)} over {len(controller.blocks)} blocks "
            f"already, and {behavior.name} is for {len(blocks)}, or others. Take them off first: "
            "eckart.adaptive.detach(model)"
        )
    why = behavior.misfit(model, len(blocks))
    if why is not None:
        raise ModelError(f"{behavior.name} cannot be put on {type(model).__name__}: {why}.")
    if controller is None:
        controller = Controller(model, blocks)
        vars(model)[ATTRIBUTE] = controller
    elif behavior.name in controller.behaviors:
        _take_off(model, controller.behaviors[behavior.name], controller.blocks)
    known = {**controller.behaviors, behavior.name: behavior}
    order = list(BEHAVIORS)
    controller.behaviors = {
        n: known[n] for n in sorted(known, key=lambda n: order.index(n) if n in order else len(order))
    }
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    for name, module in behavior.modules().items():
        model.add_module(name, module.to(like.device, like.dtype).train(model.training))
    behavior.attached(model, controller.blocks)


def attach_spec(model: PreTrainedModel, spec: Mapping[str, Any], blocks: Sequence[str] | None = None) -> list[str]:
    """Let a model behave as a checkpoint's config says, in place, before its weights are loaded.

    Args:
        model: on the meta device too.
        spec: as :func:`adaptive_spec` gave it.
        blocks: names of the blocks in this class of models; None for those of the spec.

    Returns:
        Attributes under which behaviors have modules that this class of models does not have; their tensors are left.

    Raises:
        CheckpointError: the spec is not one.
    """
    left: list[str] = []
    for name, content in spec["behaviors"].items():
        if name not in BEHAVIORS:
            raise CheckpointError(
                f"quantization_config.adaptive in config.json: behavior {name!r} is not known here "
                f"({', '.join(BEHAVIORS)} are). A newer eckart may know it: pip install -U eckart"
            )
        try:
            behavior: Behavior = BEHAVIORS[name].from_spec(content)
        except (UsageError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"quantization_config.adaptive in config.json, behavior {name}: {error}. Download config.json again, "
                "or load it with a newer eckart: pip install -U eckart"
            ) from error
        used = spec["blocks"] if blocks is None else blocks
        why = behavior.misfit(model, len(used)) if len(used) == len(spec["blocks"]) else "it has other blocks"
        if why is None:
            attach(model, behavior, used)
        elif type(model).__name__ in (model.config.architectures or ()):
            raise CheckpointError(
                f"quantization_config.adaptive in config.json gives {type(model).__name__} the behavior {name}, but "
                f"{why}. Download config.json again."
            )
        else:
            logger.warning("%s is loaded without its %s: %s", type(model).__name__, name, why)
            left += behavior.modules()
    return left


def detach(model: PreTrainedModel, name: str | None = None) -> None:
    """Take a behavior off a model, or all of them, in place; modules that it needed go with it.

    Args:
        model: may have none.
        name: of the behavior; None for all.
    """
    controller = vars(model).get(ATTRIBUTE)
    if controller is None:
        return
    for known in list(controller.behaviors) if name is None else [name]:
        behavior = controller.behaviors.pop(known, None)
        if behavior is not None:
            _take_off(model, behavior, controller.blocks)
    if not controller.behaviors:
        controller.remove()
        del vars(model)[ATTRIBUTE]


def behaviors_of(model: nn.Module) -> dict[str, Any]:
    """Name -> behavior of a model; empty for one that has none."""
    controller = vars(model).get(ATTRIBUTE)
    return {} if controller is None else dict(controller.behaviors)


def blocks_of_behaviors(model: nn.Module) -> tuple[str, ...]:
    """Names of the blocks between which the behaviors of a model act, in the order of their calls."""
    controller = vars(model).get(ATTRIBUTE)
    return () if controller is None else controller.blocks


def walk_of(model: nn.Module) -> Walk | None:
    """The pass of a model that is under way in this thread; None where it runs in full."""
    controller = vars(model).get(ATTRIBUTE)
    return None if controller is None else controller.current()


def adaptive_spec(model: nn.Module) -> dict[str, Any] | None:
    """JSON for a checkpoint's config: `blocks`, and `behaviors` with the spec of each; None where there is none."""
    found = behaviors_of(model)
    if not found:
        return None
    return {
        "blocks": list(blocks_of_behaviors(model)),
        "behaviors": {name: each.spec() for name, each in found.items()},
    }


def in_words(model: nn.Module) -> list[str]:
    """One line for each behavior."""
    blocks = len(blocks_of_behaviors(model))
    return [behavior.in_words(blocks) for behavior in behaviors_of(model).values()]


def refuse_adaptive(model: nn.Module, what: str, way_out: str) -> None:
    """Refuse a model with behaviors.

    Args:
        model: any.
        what: cannot be done, in words.
        way_out: what can.

    Raises:
        ModelError: it has some.
    """
    if found := behaviors_of(model):
        raise ModelError(f"{type(model).__name__} has {' and '.join(found)}, and {what}. {way_out}")


def _take_off(model: PreTrainedModel, behavior: Behavior, blocks: tuple[str, ...]) -> None:
    behavior.detached(model, blocks)
    for name in behavior.modules():
        delattr(model, name)


def _stream_of(value: Any) -> Tensor:
    """The hidden state among what a block is called with, or puts out: the first."""
    found = value[0] if isinstance(value, tuple | list) and value else value
    if not isinstance(found, Tensor) or found.dim() != 3:
        raise ModelError(
            f"a block is called with, or puts out, {type(found).__name__} first, and no hidden state (rows, tokens, "
            "features): rows cannot leave its batch."
        )
    return found


def _with_stream(output: Any, hidden: Tensor) -> Any:
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
