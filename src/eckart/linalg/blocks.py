"""Wide matrices a block of columns at a time, so that no second one of their size is made."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

# Wide enough for matrix products to run at full speed; a block of 11,008 rows is 45 MB in float32.
BLOCK = 1024


def blocks(size: int, width: int = BLOCK) -> Iterator[slice]:
    """Cut `range(size)` into slices of at most `width`."""
    for start in range(0, size, width):
        yield slice(start, min(start + width, size))


def symmetrize(matrix: Tensor) -> None:
    """Replace a square matrix by the mean of itself and its transpose, in place."""
    for part in blocks(len(matrix)):
        mean = (matrix[part, part.start :] + matrix[part.start :, part].mT) / 2
        matrix[part, part.start :] = mean
        matrix[part.start :, part] = mean.mT
