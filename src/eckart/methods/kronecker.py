"""Kronecker products: the nearest sum of them, and KnGPT2's use of one."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from eckart.methods.base import Method
from eckart.methods.svd import metric

if TYPE_CHECKING:
    from eckart.forms import Block

FACTOR = 2


def odd_blocks_halved(site: str, out_features: int, in_features: int) -> tuple[int, Block | None] | None:
    """One product for each weight of every odd block of the model: W (m, n) as A (m/2, n) (x) B (2, 1).

    Blocks are counted from 0, as their names count them: of twelve, 1, 3, 5, 7, 9 and 11. Stored: m n / 2 + 2.
    """
    number = re.search(r"(?:^|\.)(\d+)\.", site)
    if number is None or int(number.group(1)) % 2 == 0 or out_features % FACTOR:
        return None
    return 1, (FACTOR, 1)


METHOD = Method(
    name="kronecker",
    title="sum of Kronecker products",
    paper="Van Loan & Pitsianis, Approximation with Kronecker Products, in Linear Algebra for Large Scale and "
    "Real-Time Applications, 1993",
    metric=metric,
    exact_for="the error of the weights themselves, of each shape of block; approximate under the metric of another "
    "method that is not a Kronecker product itself",
    form="kronecker",
    fixed_form=True,
    use="You want to compare. At equal numbers it lost most of all methods on three of the four models of the survey.",
)
KNGPT2 = Method(
    name="kngpt2",
    title="KnGPT2's Kronecker products",
    paper="Edalati et al., Kronecker Decomposition for GPT Compression, 2021, arXiv 2110.08152: every odd layer at "
    "factor 2; its distillation is a step of its own",
    metric=metric,
    exact_for="the error of the weights themselves, of one product with blocks of 2 x 1",
    form="kronecker",
    fixed_form=True,
    allocation="paper",
    paper_sizes=odd_blocks_halved,
    use="You want the setting of the paper: every odd layer at half its numbers. Let the distillation of the same "
    "paper follow: eckart tune --recovery ilkd.",
)
