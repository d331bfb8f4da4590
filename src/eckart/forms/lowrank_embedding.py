"""Low-rank embedding: `e_i = P c_i`."""

from __future__ import annotations

from typing import ClassVar

from eckart.forms.embedding import FactoredEmbedding


class LowRankEmbedding(FactoredEmbedding):
    """`e_i = P c_i`: k (v + d) numbers."""

    form: ClassVar[str] = "lowrank-embedding"
    needs: ClassVar[str] = "data"
    exact_for: ClassVar[str] = (
        "the squared error of the rows that the calibration text looks up; with a tied head's error added, approximate"
    )
    paper: ClassVar[str] = "SVD of rows weighted by how often tokens occur"
    use: ClassVar[str] = (
        "The token embeddings are a large part of the model, as in small encoders of many languages. The one "
        "to begin with."
    )
