"""What a method is: a metric from a paper, and the paper's settings for everything else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

    from eckart.forms import Block
    from eckart.linalg import Problem
    from eckart.moments import Moments

# (weight (out, in), moments) -> problem. Moments hold what the method's `needs` ask for.
MetricFunction: TypeAlias = "Callable[[Tensor, Moments], Problem]"

# (site, out, in) -> (rank, shape of block or None); None for a site that stays dense.
SizeRule: TypeAlias = "Callable[[str, int, int], tuple[int, Block | None] | None]"


@dataclass(frozen=True)
class Method:
    """A paper's whole procedure under its name.

    The file of a method imports neither torch nor `eckart.linalg` at its top: its metric does. So the table of methods
    is shown without loading torch.

    Attributes:
        name: as `--method` takes it.
        title: one line for tables.
        paper: authors, venue, year, identifier.
        metric: makes the weighted problem of a weight (out, in) from the statistics of its site.
        exact_for: what error the factors are optimal for, in words.
        needs: statistics that the metric reads, names of :data:`eckart.registry.STATISTICS`; empty: no data.
        form: the stored form of the paper.
        smallest_form: the form to take where stored numbers count and speed does not; None for `form`.
        slices: whether feed-forward layers may lose neurons where that is predicted to lose less, and no form is named.
        by_leverage: whether feed-forward layers lose the neurons of least ridge leverage, where no form is named, and
            only the other weights are factored.
        allocation: "uniform", "loss", or "paper": what `paper_sizes` says.
        centered: whether means are folded into the bias of sites that have one, and the metric is centered.
        refit: whether each group of sites is fitted again on the compressed model's own inputs.
        calibrated_curves: whether predicted losses are scaled by what cuts do to the whole model's output.
        refined: whether blocks are trained one after another to put out what the original's do.
        distilled: whether all blocks are trained together to predict what the original predicts; one after another,
            where both are set, only where that cannot be.
        fixed_form: whether the method is its form: stored in another one, nothing of it would be left.
        paper_sizes: the sizes of the paper, where it states them: (site, out, in) -> (rank, shape of block or None), or
            None for a site that stays dense.
        use: when to take it, in words, for its page in the documentation.
    """

    name: str
    title: str
    paper: str
    metric: MetricFunction
    exact_for: str
    needs: frozenset[str] = field(default_factory=frozenset)
    form: str = "lowrank"
    smallest_form: str | None = None
    slices: bool = False
    by_leverage: bool = False
    allocation: str = "uniform"
    centered: bool = False
    refit: bool = False
    calibrated_curves: bool = False
    refined: bool = False
    distilled: bool = False
    fixed_form: bool = False
    paper_sizes: SizeRule | None = None
    use: str = ""

    @property
    def needs_data(self) -> bool:
        """Whether calibration text is needed at all."""
        return bool(self.needs) or self.allocation == "loss" or self.refit

    @property
    def needs_gradients(self) -> bool:
        """Whether backward passes are needed."""
        from eckart.moments import needs_backward  # tables of methods come without torch

        return self.allocation == "loss" or needs_backward(self.needs)
