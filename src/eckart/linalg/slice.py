"""Whole neurons taken away: which ones, and what the others have to do for them.

The neurons h (w) of a layer are read by W (m, w), `y = W h`. Without those outside a set S of k neurons the best that
is left is `W' h_S`, and its error in a metric H of the outputs, with `C = E[h h^T]`, is

    || H^(1/2) (W - W' S^T) C^(1/2) ||_F^2,      W' = W C S (S^T C S)^-1

(S also the (w, k) matrix of its columns). The neurons go one after another, the cheapest first, by the rule of the
optimal brain surgeon (Hassibi & Stork, NIPS 1992; for whole columns under a metric of inputs: Frantar & Alistarh,
NeurIPS 2022, arXiv 2208.11580): removing neuron i and correcting the others for it costs

    (w_i^T H w_i) / [C^-1]_ii,

w_i its column as corrected so far and C^-1 the inverse for the neurons that are still there. One pass gives the order,
and with it every size: with the neurons in the order in which they are worth keeping and `C = L L^T` in that order, the
k that are kept are the first k, `W' = (W L)_k L_k^-1` of the first k columns and the leading k x k of L, and the error
is the sum of the squared columns of `H^(1/2) W L` after the k-th.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from eckart.errors import NumericalError
from eckart.linalg.blocks import blocks
from eckart.linalg.decompose import WIDE, require_finite
from eckart.linalg.metric import Metric, weighted_error
from eckart.linalg.solve import Problem

STEPS = 128
"""Neurons that are taken before what they change is applied to the matrices as a whole: products instead of sweeps."""

LEVERAGE_RIDGE = 0.01
"""Of the mean diagonal of C: the ridge of the leverage scores."""

FLOORS = (1e-10, 1e-8, 1e-6, 1e-4, 1e-2)
"""Of the mean diagonal, added to C: the first that makes it invertible. A dead neuron then costs next to nothing."""


@dataclass(frozen=True)
class Slicing:
    """The neurons of a layer in the order in which they are worth keeping, and the corrections of every size.

    Attributes:
        order: (w,) int64, numbers of the neurons, the last one to be taken away first.
        mixed: `W L`, (m, s), the first s columns; s is w, or the limit of :meth:`kept`.
        lower: L, (s, s), lower triangular.
        squared: (w,) float64, what each neuron in the order saves of the squared error.
        notes: fallbacks taken on the way, for the report.
    """

    order: Tensor
    mixed: Tensor
    lower: Tensor
    squared: Tensor
    notes: tuple[str, ...] = ()

    @cached_property
    def curve(self) -> Tensor:
        """(w + 1,) squared error with 0, 1, ..., w neurons kept, float64; the last entry is 0."""
        tail = self.squared.flip(0).cumsum(0).flip(0)
        return torch.cat([tail, tail.new_zeros(1)])

    @property
    def limit(self) -> int:
        """The largest number of kept neurons of which the corrections are known."""
        return len(self.lower)

    def corrected(self, count: int) -> tuple[Tensor, Tensor]:
        """The neurons that are kept, (k,) ascending, and the weight that reads them, W' (m, k).

        Raises:
            ValueError: for less than one, or more than the limit.
        """
        if not 1 <= count <= self.limit:
            raise ValueError(f"{count} neurons: corrections are known of 1 to {self.limit}.")
        lower = self.lower[:count, :count]
        weight = torch.linalg.solve_triangular(lower, self.mixed[:, :count], upper=False, left=False)
        kept, places = self.order[:count].sort()
        return kept, weight[:, places]

    def kept(self, limit: int) -> Slicing:
        """The same for sizes up to `limit` alone, in memory of its own; the curve stays whole."""
        limit = min(limit, self.limit)
        return Slicing(
            self.order.clone(),
            self.mixed[:, :limit].clone(),
            self.lower[:limit, :limit].clone(),
            self.squared.clone(),
            self.notes,
        )


def slice_neurons(problem: Problem, what: str = "weight") -> Slicing:
    """Order the neurons that a weight reads by what they cost to remove, and correct the others for them.

    Args:
        problem: the weight W (m, w) as its target, H (m, m) the metric of its outputs, C (w, w) that of the neurons'
            activations. A singular C gets a relative floor. Computed in float64, or in float32 where W is and w is
            above :data:`eckart.linalg.WIDE`.
        what: the site's name, used in errors and notes.

    Returns:
        Order, curve and corrections of every size.

    Raises:
        NumericalError: if the weight or a metric is not finite.
    """
    target, left = problem.target.detach(), problem.left
    require_finite(target, what)
    width = target.shape[1]
    dtype = torch.float32 if target.dtype != torch.float64 and width > WIDE else torch.float64
    weight = target.to(dtype)
    activations = _matrix(problem.right, width, weight)
    require_finite(activations, f"{what}: metric of its neurons")
    silent = not bool(activations.diagonal().amax() > 0)
    if silent:  # nothing is lost with any of them; the weights alone say which are worth keeping
        activations = torch.eye(width, dtype=dtype, device=weight.device)
    inverse, notes = _inverted(activations, what)
    order = _order(inverse, _sandwich(left, weight), weight, left)
    del inverse
    return _in_order(order, weight, activations, left, what, notes, silent=silent)


def slice_in_order(problem: Problem, order: Tensor, what: str = "weight") -> Slicing:
    """Correct the neurons that are kept for those that go, in an order that is given: see :func:`slice_neurons`.

    Args:
        problem: as there.
        order: (w,) int64, the last one to be taken away first.
        what: as there.
    """
    weight, left = problem.target.detach(), problem.left
    require_finite(weight, what)
    activations = _matrix(problem.right, weight.shape[1], weight)
    require_finite(activations, f"{what}: metric of its neurons")
    silent = not bool(activations.diagonal().amax() > 0)
    if silent:
        activations = torch.eye(len(activations), dtype=weight.dtype, device=weight.device)
    _, notes = _inverted(activations, what)
    return _in_order(order, weight, activations, left, what, notes, silent=silent)


def slice_by_leverage(problem: Problem, what: str = "weight") -> Slicing:
    """Order the neurons by their ridge leverage scores, and correct those that are kept: a Nystrom approximation.

    The score of neuron i is `[C (C + lambda I)^-1]_ii` (MoDeGPT: Lin et al., ICLR 2025, arXiv 2408.09632), whatever
    reads it. The correction is that of :func:`slice_neurons`, `W' = W C S (S^T C S)^-1`.

    Args:
        problem: as there.
        what: as there.
    """
    width = problem.target.shape[1]
    weight = problem.target.detach().double()
    activations = _matrix(problem.right, width, weight)
    require_finite(activations, f"{what}: metric of its neurons")
    ridge = LEVERAGE_RIDGE * activations.diagonal().mean()
    left_over = torch.zeros(width, dtype=torch.float64, device=weight.device)  # 1 - score
    if bool(ridge > 0):
        activations.diagonal().add_(ridge)
        left_over = ridge * torch.cholesky_inverse(torch.linalg.cholesky(activations)).diagonal()
    return slice_in_order(Problem(weight, problem.left, problem.right), left_over.argsort(stable=True), what)


def _in_order(
    order: Tensor, weight: Tensor, activations: Tensor, left: Metric, what: str, notes: tuple[str, ...], *, silent: bool
) -> Slicing:
    """Corrections and errors of every size, with an invertible C."""
    lower = _root(activations[order][:, order])
    mixed = weight[:, order] @ lower
    squared = (mixed * left.times(mixed)).sum(0, dtype=torch.float64).clamp_min(0)
    require_finite(squared, f"{what}: metric of its outputs")
    return Slicing(order, mixed, lower, torch.zeros_like(squared) if silent else squared, notes)


def _matrix(metric: Metric, width: int, like: Tensor) -> Tensor:
    if metric.is_identity:
        return torch.eye(width, dtype=like.dtype, device=like.device)
    return metric.dense(like.dtype).to(like.device)


def _sandwich(left: Metric, weight: Tensor) -> Tensor:
    """`W^T H W`, (w, w)."""
    return weight.mT @ left.times(weight)


def _inverted(matrix: Tensor, what: str) -> tuple[Tensor, tuple[str, ...]]:
    """`C^-1`; the first floor that makes C positive definite is added to it, in place."""
    scale = matrix.diagonal().mean()
    before = 0.0
    for floor in FLOORS:
        if matrix.dtype == torch.float32 and floor < FLOORS[2]:
            continue  # below the rounding of the sum that it is
        matrix.diagonal().add_((floor - before) * scale)
        before = floor
        lower, info = torch.linalg.cholesky_ex(matrix)
        if int(info) == 0:
            notes = () if floor <= FLOORS[2] else (f"{what}: a singular metric of its neurons was raised by {floor:g}",)
            return torch.cholesky_inverse(lower), notes
    raise NumericalError(
        f"{what}: the metric of its neurons is not positive semi-definite. Leave this layer out with --ignore and "
        "report the model."
    )


def _root(matrix: Tensor) -> Tensor:
    """L with `L L^T = C`; C could be decomposed in another order before."""
    lower, info = torch.linalg.cholesky_ex(matrix)
    if int(info):
        matrix.diagonal().add_(FLOORS[-2] * matrix.diagonal().mean())
        lower = torch.linalg.cholesky(matrix)
    return lower


def _order(inverse: Tensor, costs: Tensor, weight: Tensor, left: Metric) -> Tensor:
    """The neurons, the last to be removed first.

    Removing neuron i is one step of elimination: with `c = P_i / P_ii`, P the inverse,

        P <- P - P_ii c c^T,    W <- W - w_i c^T,    K = W^T H W <- K - K_i c^T - c K_i^T + K_ii c c^T.

    Of P and K only the diagonals and the rows of the neurons that go are needed at once: the updates of `STEPS` steps
    are applied to the rest together. No step waits for a number from the device.

    Args:
        inverse: P, (w, w); it is overwritten.
        costs: K, (w, w); it is overwritten.
        weight: W, (m, w).
        left: H.
    """
    width = len(inverse)
    alive = torch.arange(width, device=inverse.device)  # of each row of P and K that are left
    gone = torch.zeros(width, dtype=torch.bool, device=inverse.device)
    removed: list[Tensor] = []
    done, dropped = 0, 0
    while done < width:
        steps = min(STEPS, width - done)
        taken = _eliminate(inverse, costs, gone, steps)
        removed.append(alive[taken])
        done += steps
        dropped += steps
        if dropped * 8 >= len(alive) and done < width:  # the rows of those that have gone cost time for nothing
            left_over = torch.argsort(gone.to(torch.uint8), stable=True)[: width - done]
            inverse, costs = (part[left_over][:, left_over] for part in (inverse, costs))
            alive, gone, dropped = alive[left_over], gone[left_over], 0
    return torch.cat(removed).flip(0)


def _eliminate(inverse: Tensor, costs: Tensor, gone: Tensor, steps: int) -> Tensor:
    """Take `steps` neurons away; P, K and `gone` are updated in place. Returns their numbers, (steps,)."""
    n = len(inverse)
    ratios = inverse.new_zeros(steps, n)  # c of each step
    scaled = inverse.new_zeros(steps, n)  # P_ii c
    products = inverse.new_zeros(steps, n)  # w_i^T H W, w_i as corrected, W as at the first step
    inner = inverse.new_zeros(steps, steps)  # w_i^T H w_j, both as corrected when they went
    pivots, errors = inverse.diagonal().clone(), costs.diagonal().clone()
    taken: list[Tensor] = []
    for step in range(steps):
        price = (errors / pivots).masked_fill_(gone, torch.inf)
        i = price.argmin().reshape(1)
        c_i = ratios[:step].index_select(1, i)  # (step, 1)
        row = inverse.index_select(0, i)[0] - (c_i.mT @ scaled[:step])[0]
        product = costs.index_select(0, i)[0] - (c_i.mT @ products[:step])[0]
        pivot, error = pivots.index_select(0, i), errors.index_select(0, i)
        own = products[:step].index_select(1, i) - inner[:step, :step] @ c_i  # (step, 1), w_j^T H w_i
        now = product - (own.mT @ ratios[:step])[0]  # w_i^T H W, W as it is now
        c = row / pivot
        ratios[step], scaled[step], products[step] = c, row, product
        inner[step, :step] = inner[:step, step] = own[:, 0]
        inner[step, step] = error[0]
        errors = (errors - 2 * now * c + error * c.square()).clamp_min_(0)
        # A pivot that rounding makes vanish would look dear: as little as is left of it counts.
        pivots = torch.maximum(pivots - row * c, pivots * torch.finfo(pivots.dtype).eps)
        gone.index_fill_(0, i, True)
        taken.append(i)
    for part in blocks(n):
        inverse[part] -= scaled[:, part].mT @ ratios
        half = products - inner @ ratios / 2
        costs[part] -= half[:, part].mT @ ratios + ratios[:, part].mT @ half
    return torch.cat(taken)


def slicing_curve_under(solved: Slicing, problem: Problem, points: int = 33) -> Tensor:
    """Squared error of every size, measured in another problem's metric.

    Args:
        solved: order and corrections of all sizes.
        problem: target and the metrics to measure in.
        points: so many sizes, evenly spaced, are measured; between them the curve is a straight line.

    Returns:
        (w + 1,) float64, at 0, 1, ..., w neurons; the last entry is 0.
    """
    target = problem.target.detach().to(solved.mixed.dtype)
    width = target.shape[1]
    counts = sorted({round(width * i / (points - 1)) for i in range(points)})
    found: list[float] = []
    for count in counts:
        error = target.clone()
        if count:
            kept, weight = solved.corrected(count)
            error[:, kept] -= weight
        found.append(float(weighted_error(error, problem.left, problem.right)) if count < width else 0.0)
    curve = torch.zeros(width + 1, dtype=torch.float64, device=target.device)
    for (i, one), (j, other) in pairwise(zip(counts, found, strict=True)):
        curve[i : j + 1] = torch.linspace(one, other, j - i + 1, dtype=torch.float64)
    return curve
