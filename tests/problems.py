"""Weights, spectra and statistics that the tests of the numerical core share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from eckart.forms import FORMS
from eckart.linalg import Problem, factorize, weighted_error
from eckart.methods import Method, method_named
from eckart.moments import Moments
from eckart.moments.absolute import Absolute
from eckart.moments.fisher import Fisher
from eckart.moments.gradients import GradientGram
from eckart.moments.gram import Gram
from eckart.moments.mean import Mean
from eckart.moments.robust_gradients import RobustGradientGram

# Derandomized: the same examples on every run.
few_examples = settings(
    max_examples=8, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_spectrum(rows: int, columns: int, values: Tensor, seed: int = 0) -> Tensor:
    """A matrix (rows, columns) of the given singular values and random singular vectors."""
    left = torch.linalg.qr(normal(rows, len(values), seed=seed)).Q
    right = torch.linalg.qr(normal(columns, len(values), seed=seed + 1)).Q
    return left * values @ right.mT


def close(value: Tensor, expected: Tensor, tolerance: float) -> None:
    """`value` equals `expected` up to a fraction of the largest expected entry."""
    value, expected = value.detach(), expected.detach()
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(value.to(expected.dtype), expected, rtol=0, atol=tolerance * max(largest, 1e-300))


@dataclass(frozen=True)
class Layer:
    """A weight with the inputs and output gradients it saw.

    Attributes:
        weight: (m, n).
        inputs: (sequences, tokens, n).
        gradients: (sequences, tokens, m).
    """

    weight: Tensor
    inputs: Tensor
    gradients: Tensor

    @property
    def moments(self) -> Moments:
        """Its statistics, summed in float64."""
        x, g = (rows.reshape(-1, rows.shape[-1]) for rows in (self.inputs, self.gradients))
        statistics = {
            "mean": Mean(len(x), x.sum(0)),
            "gram": Gram(len(x), x.mT @ x),
            "absolute": Absolute(len(x), x.abs().sum(0)),
            "gradients": GradientGram(len(g), g.mT @ g),
            "robust-gradients": RobustGradientGram(len(g), g.mT @ g),  # as if none had to be clipped
            "fisher": self._fisher(),
        }
        return Moments(statistics, sequences=len(self.inputs))

    def _fisher(self) -> Fisher:
        squared = (self.gradients.mT @ self.inputs).square()  # (sequences, m, n)
        return Fisher(squared.sum((0, 2)), squared.sum((0, 1)), len(squared))

    def problem_of(self, method: Method | str, centered: bool = False) -> Problem:
        """The method's problem for this layer; centered: the bias takes the means."""
        return method_named(method).metric(self.weight, replace(self.moments, centered=centered))

    def take(self, outputs: Tensor, inputs: Tensor) -> Layer:
        """The layer with its outputs and inputs in another order."""
        return Layer(self.weight[outputs][:, inputs], self.inputs[..., inputs], self.gradients[..., outputs])

    def rescaled(self, outputs: Tensor, inputs: Tensor) -> Layer:
        """The same function of inputs that are `inputs` times larger and outputs `outputs` times larger."""
        weight = outputs[:, None] * self.weight / inputs
        return Layer(weight, self.inputs * inputs, self.gradients / outputs)

    def with_weight(self, weight: Tensor) -> Layer:
        """The same statistics around another weight."""
        return replace(self, weight=weight)


def layer(
    rows: int, columns: int, *, sequences: int = 8, tokens: int = 12, decay: float = 0.9, rank: int = 0, seed: int = 0
) -> Layer:
    """A random layer whose singular values fall by `decay`; correlated inputs and gradients.

    Args:
        rows: m.
        columns: n.
        sequences: how many were seen.
        tokens: of each sequence.
        decay: of the spectrum.
        rank: of the weight; 0: full.
        seed: of all draws.
    """
    values = decay ** torch.arange(rank or min(rows, columns), dtype=torch.float64)
    mix_in, mix_out = normal(columns, columns, seed=seed + 2), normal(rows, rows, seed=seed + 3)
    return Layer(
        with_spectrum(rows, columns, values, seed),
        normal(sequences, tokens, columns, seed=seed + 4) @ mix_in / columns**0.5 + 0.1,
        normal(sequences, tokens, rows, seed=seed + 5) @ mix_out / rows**0.5,
    )


def _dead(found: Layer) -> Layer:
    """Every third input is always zero, and every fourth output has no gradient."""
    inputs, gradients = found.inputs.clone(), found.gradients.clone()
    inputs[..., ::3] = 0
    gradients[..., ::4] = 0
    return replace(found, inputs=inputs, gradients=gradients)


# The shapes and degeneracies that every method must stand.
LAYERS: dict[str, Layer] = {
    "tall": layer(20, 12),
    "wide": layer(12, 20),
    "square": layer(16, 16),
    "one-output": layer(1, 9),
    "one-input": layer(9, 1),
    "rank-deficient-tall": layer(18, 12, rank=5),
    "rank-deficient-wide": layer(12, 18, rank=5),
    "few-tokens-tall": layer(20, 16, sequences=2, tokens=3),
    "few-tokens-wide": layer(16, 20, sequences=2, tokens=3),
    "one-token": layer(10, 14, sequences=1, tokens=1),
    "dead-tall": _dead(layer(20, 12)),
    "dead-wide": _dead(layer(12, 20)),
    "zero-weight": layer(12, 9).with_weight(torch.zeros(12, 9, dtype=torch.float64)),
    "tiny-weight": layer(12, 9).with_weight(1e-12 * layer(12, 9).weight),
}
# Enough tokens and a full spectrum: the optimum is unique.
REGULAR = ("tall", "wide", "square")

every_regular_layer = pytest.mark.parametrize("found", [LAYERS[name] for name in REGULAR], ids=REGULAR)
# Forms that hold any matrix of a rank; those that cut a weight into blocks have tests of their own.
RANK_FORMS = [name for name, form in FORMS.items() if form.blocks(8, 8) == (None,)]
every_form = pytest.mark.parametrize("form", RANK_FORMS)


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    """Layers of any small shape, spectrum and number of tokens."""
    rows, columns = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    return layer(
        rows,
        columns,
        sequences=draw(st.integers(1, 6)),
        tokens=draw(st.integers(1, 12)),
        decay=draw(st.sampled_from([0.3, 0.8, 1.0])),
        rank=draw(st.integers(0, min(rows, columns))),
        seed=draw(st.integers(0, 1000)),
    )


def error_of(problem: Problem, answer: Tensor) -> float:
    """`|| L (T - answer) R ||^2`."""
    return float(weighted_error(problem.target - answer, problem.left, problem.right))


def answer_of(problem: Problem, rank: int) -> Tensor:
    """The solver's W' of that rank."""
    left, right = factorize(problem).truncated(rank)
    return left @ right


@contextmanager
def unchanged(*tensors: Tensor) -> Iterator[None]:
    """Nothing inside writes to these tensors."""
    before = [tensor.clone() for tensor in tensors]
    yield
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor, old)


def kronecker_sum(left: Tensor, right: Tensor, rows: int, columns: int, block: tuple[int, int]) -> Tensor:
    """`sum_i A_i (x) B_i` by its definition, of factors that hold the A_i and B_i row by row."""
    outer = (rows // block[0], columns // block[1])
    terms = zip(left.mT, right, strict=True)
    return sum(torch.kron(a.reshape(outer).contiguous(), b.reshape(block).contiguous()) for a, b in terms)
