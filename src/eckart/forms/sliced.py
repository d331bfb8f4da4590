"""Sliced: fewer neurons, and ordinary dense layers."""

from __future__ import annotations

from typing import ClassVar

from eckart.errors import UsageError
from eckart.forms.base import StoredSize
from eckart.forms.linear import Block, FactoredLinear


class Sliced(FactoredLinear):
    """`y = W'_S h_S + b`: k of the w neurons of a feed-forward layer, in the layers that make them and that read them.

    No module has this class: what is stored are the model's own Linear or Conv1D modules, smaller. The rank is the
    number of neurons k, and the block says what a weight holds of each: a column, (m, 1), in the weight that reads
    them, and a row (or two, where a gate is in the same matrix), (1, n), in one that makes them. All weights of a
    layer have the same k; in a plan, those that make the neurons name the one that reads them as their `basis`.
    """

    form: ClassVar[str] = "sliced"
    paper: ClassVar[str] = "Hassibi & Stork, NIPS 1992; Frantar & Alistarh, NeurIPS 2022, arXiv 2208.11580"
    use: ClassVar[str] = (
        "Feed-forward layers, where speed counts: what is left are dense layers, as fast as their size. With "
        "--stock, transformers alone loads the result."
    )
    weighted_exactly: ClassVar[bool] = False
    own_module: ClassVar[bool] = False
    shared_by: ClassVar[str] = "neurons"

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool = True, source: str = "linear"
    ) -> None:
        raise UsageError(
            f"form {self.form}: its modules are ordinary ones of another size. Load the model with eckart, which makes "
            "them."
        )

    @classmethod
    def blocks(cls, out_features: int, in_features: int) -> tuple[Block, ...]:
        """A column, a row, or two rows where there is an even number."""
        return ((out_features, 1), (1, in_features), *([(2, in_features)] if out_features % 2 == 0 else []))

    @classmethod
    def full_rank(cls, out_features: int, in_features: int, block: Block | None = None) -> int:
        """The number of neurons before.

        Raises:
            UsageError: for another block than whole rows or columns.
        """
        rows, columns = block or (out_features, 1)
        if rows == out_features and columns > 0 and in_features % columns == 0:
            return in_features // columns
        if columns == in_features and rows > 0 and out_features % rows == 0:
            return out_features // rows
        raise UsageError(
            f"form {cls.form}: blocks of {rows} x {columns} are neither whole columns nor whole rows of a weight of "
            f"{out_features} x {in_features}."
        )

    @classmethod
    def size(cls, out_features: int, in_features: int, rank: int, block: Block | None = None) -> StoredSize:
        """The share that k neurons have of the weight, stored and computed."""
        rows, columns = block or (out_features, 1)
        return StoredSize(rank * rows * columns, rank * rows * columns)
