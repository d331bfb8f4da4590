"""Decompositions that check their input and say so when they had to fall back."""

from __future__ import annotations

import torch
from torch import Tensor

from eckart.errors import NumericalError
from eckart.linalg.blocks import symmetrize

# Above this width a float32 matrix is decomposed as it is: the products that made it carry the same rounding, and
# float64 takes two to three times as long on a CPU, and far longer on most GPUs.
WIDE = 2048


def require_finite(tensor: Tensor, what: str) -> None:
    """Refuse a tensor that holds NaN or infinity.

    Args:
        tensor: any shape.
        what: the tensor's name in the message (a site, a statistic).

    Raises:
        NumericalError: naming the tensor and how many of its entries are not finite.
    """
    if not bool(torch.isfinite(tensor.sum())):  # one cheap pass; the exact count only when it is needed
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise NumericalError(
                f"{what}: {bad} of {tensor.numel()} entries are NaN or infinite. "
                "Check the checkpoint (or the calibration data that produced this statistic), "
                "or load the model in float32."
            )


def checked_eigh(matrix: Tensor, what: str = "matrix") -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Eigenvalues (descending, clamped at 0) and eigenvectors of a positive semi-definite matrix.

    Computed in float64: an eigenvalue of a Gram is the square of a singular value, so float32 would
    lose half the digits of the small ones. A float32 matrix that is wider than `WIDE` is decomposed in float32.

    Args:
        matrix: (n, n) symmetric positive semi-definite; only rounding may break the symmetry.
        what: name used in errors and notes.

    Returns:
        values (n,) descending, float64; vectors (n, n) with the matching columns, in the type that was computed in;
        and notes of any fallback taken.

    Raises:
        NumericalError: if the matrix is not finite, or no solver converges.
    """
    require_finite(matrix, what)
    # LAPACK writes the eigenvectors, column by column, over the matrix that it is given: this is its copy.
    dtype = matrix.dtype if matrix.dtype == torch.float32 and len(matrix) > WIDE else torch.float64
    vectors = _symmetric(matrix, dtype).mT
    values = vectors.new_empty(len(vectors))
    try:
        torch.linalg.eigh(vectors, out=(values, vectors))
    except torch.linalg.LinAlgError:
        note = f"{what}: eigh did not converge on {matrix.device}; took the SVD on the CPU in float64"
        left, values, _ = _last_resort_svd(_symmetric(matrix, torch.float64), what)
        return values.to(matrix.device), left.to(matrix.device), (note,)
    return values.double().flip(0).clamp_min(0), vectors.flip(1), ()


def _symmetric(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy without the rounding that broke the symmetry."""
    copy = matrix.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
    symmetrize(copy)
    return copy


def checked_svd(matrix: Tensor, what: str = "matrix") -> tuple[Tensor, Tensor, Tensor, tuple[str, ...]]:
    """Thin singular value decomposition in float64: `matrix = U diag(s) V^T`.

    Args:
        matrix: (m, n).
        what: name used in errors and notes.

    Returns:
        U (m, r), s (r,) descending, V^T (r, n), r = min(m, n), and notes of any fallback taken.

    Raises:
        NumericalError: if the matrix is not finite, or no solver converges.
    """
    require_finite(matrix, what)
    try:
        left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    except torch.linalg.LinAlgError:
        left, values, right = _last_resort_svd(matrix.double(), what)
        note = f"{what}: svd did not converge on {matrix.device}; repeated on the CPU in float64"
        return left.to(matrix.device), values.to(matrix.device), right.to(matrix.device), (note,)
    return left, values, right, ()


def _last_resort_svd(matrix: Tensor, what: str) -> tuple[Tensor, Tensor, Tensor]:
    """SVD on the CPU; scaled, and as `(A^T)` when A itself does not converge."""
    host = matrix.cpu()
    scale = host.abs().amax().clamp_min(torch.finfo(torch.float64).tiny)
    for transposed in (False, True):
        try:
            left, values, right = torch.linalg.svd((host.mT if transposed else host) / scale, full_matrices=False)
        except torch.linalg.LinAlgError:
            continue
        return (right.mT, values * scale, left.mT) if transposed else (left, values * scale, right)
    raise NumericalError(
        f"{what}: neither eigh nor svd converged, in float64 on the CPU either. "
        "Leave this weight dense with --ignore and report the model."
    )
