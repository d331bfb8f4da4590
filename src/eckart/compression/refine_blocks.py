"""Train a smaller model block by block beside its original.

Both run side by side, as in the refit: the original says what a block should put out, the smaller model what the block
reads after all blocks before it have been trained.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from eckart.calibration.backward_probe import NO_GRADIENTS
from eckart.calibration.layerwise import LayerwiseError, LayerwiseRunner
from eckart.compression.output_error import OutputError, mixed_precision
from eckart.compression.train_block import BlockFit, BlockTraining, measure_error, train_block
from eckart.compression.training_text import Examples, TrainingText, batches_of
from eckart.data import Batch
from eckart.distributed import Processes
from eckart.errors import NumericalError, is_out_of_memory
from eckart.evaluation.output_distance import OutputDistance
from eckart.forms import Factored
from eckart.moments import real_tokens

LISTED = 5
"""Names in a note."""

Keep = Callable[[int, dict[str, Tensor], BlockFit | None], None]


class NoBackwardError(LayerwiseError):
    """A block runs, but no gradients can be had of it."""


@dataclass(frozen=True)
class BlockRefinement:
    """Trains one block after another.

    Attributes:
        before: runs the original on the text's batches.
        now: runs the smaller model in float32 on the same.
        text: its batches, cut into steps.
        distance: of the models' outputs: what is made small in the last block, which nothing comes after that could
            mend it; None for the distance of what the block puts out.
        training: how.
        processes: share the rows.
    """

    before: LayerwiseRunner
    now: LayerwiseRunner
    text: TrainingText
    distance: OutputDistance | None = None
    training: BlockTraining = field(default_factory=BlockTraining)
    processes: Processes = field(default_factory=Processes)

    def run(self, steps: Iterable[int], done: Collection[int], keep: Keep) -> None:
        """Train the blocks of steps that follow one another.

        Args:
            steps: both models have finished the one before the first.
            done: steps whose blocks have been trained, and are in place.
            keep: puts what was found into the model; nothing where the block stays as it is.
        """
        for step in steps:
            self.follow(step)
            if step not in done:
                keep(step, *(self.train(step) or ({}, None)))
            if step + 1 < self.now.schedule.tail:
                self.advance(step)

    def train(self, step: int) -> tuple[dict[str, Tensor], BlockFit] | None:
        """Train the block of a step; both models have finished the step before it, and the original this one.

        The model stays as it is.

        Returns:
            Name in the block -> new value in the stored type, of all parameters that are trained, and how near the
            block is with them. None where there is nothing to train, or it is no nearer.

        Raises:
            NoBackwardError: no backward pass runs through the block.
        """
        name = self.now.schedule.steps[step]
        block = self.now.model.get_submodule(name)
        types = {key: p.dtype for key, p in block.named_parameters()}
        frozen = untrained(self.now, name)
        training = replace(self.training, seed=self.training.seed + step)
        with self.before.context(None), self.now.resident(step), training_copies(block, frozen) as copies:
            if not copies:
                return None
            steps = [self._batches([examples]) for examples in self.text.steps]
            held = self._batches(self.text.held)

            distance = self.distance if step + 1 == self.now.schedule.tail else None

            def error(batch: Batch) -> tuple[Tensor, Tensor]:
                return self._error(step, batch)

            parameters, scale = list(copies.values()), None
            if distance is not None:  # which costs a pass through the output head: half of the epochs do
                wrong, power = measure_error(held, error, self.processes)
                error, scale = self._output_error(distance), math.sqrt(wrong / power) if power else 0.0
                training = replace(training, epochs=-(-training.epochs // 2))
            try:
                with torch.enable_grad():
                    fit = train_block(parameters, steps, held, error, training, self.processes, scale)
            except NO_GRADIENTS as failure:
                if is_out_of_memory(failure):
                    raise
                reason = f"{type(failure).__name__}: {failure}"
                raise NoBackwardError(f"no backward pass runs through {name}: {reason}") from failure
            if not fit.epoch:
                return None
            values = {key: rounded(f"{name}.{key}", p, types[key]) for key, p in copies.items()}
        return values, fit

    def advance(self, step: int) -> None:
        """Bring the smaller model to the end of a step too, and drop what no later step reads."""
        with self.processes.failing_together():
            self.now.advance(step)
        self.before.drop_stream(step - 1)

    def follow(self, step: int) -> None:
        """Bring the original to the end of a step; what the step before has put out is kept till both are."""
        with self.processes.failing_together(), self.before.resident(step):
            for batch in self.before.batches:
                self.before.run_block(step, batch)

    def _batches(self, steps: Sequence[Examples]) -> list[Batch]:
        return batches_of(self.now.batches, steps)

    def _error(self, step: int, batch: Batch) -> tuple[Tensor, Tensor]:
        target = real_tokens(self.before.kept_stream(step, batch), batch).float()
        with mixed_precision(self.before.model, self.now.device):
            found = real_tokens(self.now.run_stream(step, batch), batch).float()
        return (found - target).square().sum(), target.square().sum()

    def _output_error(self, distance: OutputDistance) -> OutputError:
        return OutputError(
            distance, self.before.model, self.now.model, self.before.run_tail, self.now.run_last, self.now.device
        )


def untrained(runner: LayerwiseRunner, block: str) -> set[str]:
    """Names in a block of what is not trained: parameters that others hold too, all of a block that runs twice."""
    model = runner.model
    if Counter(runner.schedule.steps)[block] > 1:
        return {name for name, _ in model.get_submodule(block).named_parameters()}
    places = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    module = model.get_submodule(block)
    inside = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    return {name for name, p in module.named_parameters() if places[id(p)] > inside[id(p)]}


def left_as_they_are(runner: LayerwiseRunner) -> list[str]:
    """Notes of parameters that were not trained."""
    left = [f"{block}.{name}" for block in runner.schedule.steps for name in sorted(untrained(runner, block))]
    if not left:
        return []
    listed = ", ".join(dict.fromkeys(left[:LISTED]))
    return [f"not refined, held by other layers too: {listed}{', ...' if len(left) > LISTED else ''}"]


@contextmanager
def without_gradients(model: nn.Module) -> Iterator[None]:
    """No parameter of a model requires gradients meanwhile; afterwards those do that did, by their names."""
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    model.requires_grad_(False)
    try:
        yield
    finally:
        for name, p in model.named_parameters():
            if before.get(name, False):
                p.requires_grad_(True)


@contextmanager
def training_copies(block: nn.Module, frozen: Collection[str]) -> Iterator[dict[str, nn.Parameter]]:
    """Copies in float32 of a block's floating-point parameters, which stand in their places meanwhile.

    Args:
        block: the module; where its parameters are shared inside it, so are the copies.
        frozen: names that stay as they are.

    Yields:
        Name -> copy.
    """
    names = {id(p): name for name, p in block.named_parameters() if name not in frozen and p.is_floating_point()}
    places = [
        (module._parameters, key, p)
        for module in block.modules()
        for key, p in module._parameters.items()
        if id(p) in names and p is not None
    ]
    copies: dict[str, nn.Parameter] = {}
    try:
        for table, key, p in places:
            name = names[id(p)]
            if name not in copies:
                copies[name] = nn.Parameter(p.detach().to(torch.float32, copy=True))
            table[key] = copies[name]
        yield copies
    finally:
        for table, key, p in places:
            table[key] = p


def put_values(model: nn.Module, block: str, values: Mapping[str, Tensor]) -> None:
    """Give parameters of a block other values, in new parameters: clones that share the old ones keep theirs.

    Args:
        model: holds the block; its weights are where they are stored.
        block: name.
        values: name in the block -> value.
    """
    module = model.get_submodule(block)
    names = {id(p): name for name, p in module.named_parameters() if name in values}
    new = {
        name: nn.Parameter(values[name], requires_grad=p.requires_grad)
        for name, p in module.named_parameters()
        if name in values
    }
    for part in module.modules():
        for key, p in part._parameters.items():
            if p is not None and id(p) in names:
                part._parameters[key] = new[names[id(p)]]
        if isinstance(part, Factored):
            part.refresh()


def rounded(name: str, parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """A trained parameter in the type in which it is stored.

    Raises:
        NumericalError: it does not fit.
    """
    value = parameter.detach().to(dtype)
    if not bool(value.isfinite().all()):
        raise NumericalError(
            f"{name}: a value of magnitude {float(parameter.abs().amax()):.3g} does not fit {dtype}; store in bfloat16 "
            "or float32 with --dtype."
        )
    return value
