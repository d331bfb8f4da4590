"""Which errors of what a block puts out matter, for the training of blocks one after another.

A squared error counts all directions alike, and is large where hidden states are large, which says little about what
the model makes of them. What counts here is what the output of the original model loses:

    e^T W_b e,    W_b = (1 - s) G_b / mean(diag G_b) + s I

G_b is the Fisher information of what block b puts out (:mod:`eckart.calibration.layerwise.output_fisher`). The share s
of the plain squared error holds what the gradients of the text at hand do not see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eckart.calibration import show_steps
from eckart.calibration.backward_probe import why_no_backward
from eckart.calibration.layerwise import LayerwiseError, LayerwiseRunner, gather_output_fisher
from eckart.calibration.losses import loss_or_output, sampled_step
from eckart.data import Batch, Pooling
from eckart.distributed import Processes
from eckart.storage.store import EntryStore

STAGE = "output-metrics"
"""The stage of a run under which the metrics are stored."""

PLAIN = 0.05
"""The share of the plain squared error in a metric."""

ALL_ALIKE = "errors of blocks count alike in all directions"

ALL = "all"
"""The entry that is written when all metrics are there."""

Keep = Callable[[str, dict[str, Tensor]], None]
"""Stores an entry, in every process."""


@dataclass(frozen=True)
class OutputMetrics:
    """The metrics that a store holds.

    Attributes:
        store: under :data:`STAGE` it has an entry for each step whose errors do not count alike.
    """

    store: EntryStore

    def factor(self, step: int) -> Tensor | None:
        """L (n, n) with `L L^T = W`, so that an error e, a row, counts `|| e L ||^2`; None for `|| e ||^2`."""
        if str(step) not in self.store.entries(STAGE):
            return None
        return self.store.read(STAGE, str(step))[0].get("factor")


def metric_factor(fisher: Tensor, plain: float = PLAIN) -> Tensor:
    """The lower triangle L with `L L^T = (1 - s) G / mean(diag G) + s I`.

    Args:
        fisher: G (n, n), positive semidefinite, not all zero.
        plain: s, in (0, 1].

    Returns:
        L (n, n) in float32.
    """
    scaled = (1 - plain) * fisher.double() / fisher.diagonal().double().mean()
    scaled.diagonal().add_(plain)
    factor: Tensor = torch.linalg.cholesky(scaled)
    return factor.float()


@dataclass(frozen=True)
class OutputMetricSource:
    """Gathers the metrics of a model's blocks.

    Attributes:
        model: the original.
        start: makes a runner of it, before its first step, over batches.
        batches: this process's part of the text.
        example: a batch of one row.
        pooling: how sentence embeddings are made, for embedding models.
        seed: of the targets that are drawn.
        processes: share the text.
    """

    model: PreTrainedModel
    start: Callable[[Sequence[Batch]], LayerwiseRunner]
    batches: Sequence[Batch]
    example: Batch
    pooling: Pooling | None
    seed: int
    processes: Processes

    def gather(self, store: EntryStore, keep: Keep) -> tuple[OutputMetrics, list[str]]:
        """Gather what the store does not hold yet.

        Returns:
            The metrics, and notes: why there are none.

        Raises:
            LayerwiseError: some of the text takes another way through the model than the example.
        """
        metrics = OutputMetrics(store)
        if ALL in self.processes.broadcast(({}, {"there": store.entries(STAGE)}))[1]["there"]:
            return metrics, []
        try:
            reason = self._why_not()
        except LayerwiseError as error:
            reason = f"it cannot be run backwards block by block ({error})"
        if reason is not None:
            return metrics, [f"{ALL_ALIKE}: {reason}"]
        runner = self._with_loss(self.start(self.batches))
        for step, fisher in gather_output_fisher(runner, show_steps):
            sums = {} if fisher is None else {"fisher": fisher}
            self.processes.all_reduce(sums)
            if sums and float(sums["fisher"].diagonal().sum()) > 0:
                keep(str(step), {"factor": metric_factor(sums["fisher"]).cpu()})
        keep(ALL, {})
        return metrics, []

    def _why_not(self) -> str | None:
        """What keeps a gradient from the blocks of the example, or None."""
        runner = self._with_loss(self.start([self.example]))

        def backward() -> None:
            for _ in gather_output_fisher(runner):
                pass

        def plain() -> None:
            with runner.context(None):
                runner.chain.run(self.example)

        return why_no_backward(backward, plain, of_labels=False)

    def _with_loss(self, runner: LayerwiseRunner) -> LayerwiseRunner:
        step = sampled_step(self.model, self.seed, self.pooling)
        runner.chain.run = loss_or_output(step, self.model)
        return runner
