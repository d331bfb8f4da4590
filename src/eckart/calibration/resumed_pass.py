"""Forward passes that begin at a block: what the blocks before it put out is known from a pass of the original."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from eckart.calibration.layerwise import all_blocks, block_of


class ResumedPass:
    """One batch's forward pass, recorded, so that it can be run again from any block on.

    A module inside a block can be replaced between two passes: what comes before its block stays as it was, and is not
    computed again. Half of the work is saved on average where every module of a deep model is replaced in turn.

    Args:
        model: in evaluation mode.
        run: runs the model on the batch.
    """

    def __init__(self, model: nn.Module, run: Callable[[], Any]) -> None:
        self.model = model
        self._run = run
        self._calls: list[str] = []
        self._outputs: list[Any] = []
        with self._replaced(self._recording):
            self.output = run()
        """What the model put out when it was recorded."""

    def start_of(self, modules: Sequence[str]) -> int:
        """The first call of a block that holds one of the modules; 0, which is a whole pass, where one is in none."""
        blocks = [block_of(name, self.model) for name in modules]
        calls = [self._calls.index(block) if block in self._calls else 0 for block in blocks]
        return min(calls, default=0)

    def run_from(self, call: int) -> Any:
        """Run the model with what the calls of blocks before this one have put out, and return its output."""
        self._position, self._start = 0, call
        with self._replaced(self._resuming):
            return self._run()

    # -- inside --------------------------------------------------------------------------------------------------

    def _recording(self, name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            place = len(self._calls)
            self._calls.append(name)
            self._outputs.append(None)
            output = own(*args, **kwargs)
            self._outputs[place] = _copied(output)  # what follows may change it in place
            return output

        return forward

    def _resuming(self, name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            here = self._position
            self._position += 1
            return _copied(self._outputs[here]) if here < self._start else own(*args, **kwargs)

        return forward

    @contextmanager
    def _replaced(self, make: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
        """Put other forwards in place of the blocks' own."""
        blocks = {name: self.model.get_submodule(name) for name in all_blocks(self.model)}
        before = {name: vars(module).get("forward") for name, module in blocks.items()}
        for name, module in blocks.items():
            module.forward = make(name, module.forward)
        try:
            with torch.no_grad():
                yield
        finally:
            for name, module in blocks.items():
                if before[name] is None:
                    del module.forward
                else:
                    vars(module)["forward"] = before[name]


def _copied(output: Any) -> Any:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output)
