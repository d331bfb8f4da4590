"""Whether gradients can be had of a model: tried on one example before the long work starts."""

from __future__ import annotations

from collections.abc import Callable

import torch

from eckart.calibration.layerwise import LayerwiseError
from eckart.errors import DataError, EckartError, is_out_of_memory

NO_GRADIENTS = (RuntimeError, NotImplementedError)
"""What autograd raises where an operation has no derivative, or an output does not depend on differentiable inputs."""


def why_no_backward(backward: Callable[[], object], forward: Callable[[], object], *, of_labels: bool) -> str | None:
    """What stopped a backward pass, in words, or None if it runs.

    Only what fails with gradients and runs without them says that gradients cannot be had. All other errors are raised:
    they are about the data, the numbers or the model's own code, and another method would not be the answer.

    Args:
        backward: gathers statistics of one example, with gradients.
        forward: the same loss of the same example, without gradients.
        of_labels: whether the loss is that of the data's labels.

    Raises:
        DataError: the model makes no loss of the data's labels.
        Exception: what `backward` or `forward` raises of its own.
    """
    try:
        backward()
    except (EckartError, LayerwiseError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        try:
            with torch.no_grad():
                forward()
        except EckartError:
            raise
        except Exception as same:
            if of_labels and not is_out_of_memory(same):
                raise DataError(
                    f"labels: the model makes no loss of them ({type(same).__name__}: {same}). Give labels of this "
                    "model's own task (--data-label-column), or --curvature sampled, which needs none."
                ) from same
            raise
        if not isinstance(error, NO_GRADIENTS):
            raise
        return f"{type(error).__name__}: {error}"
    return None
