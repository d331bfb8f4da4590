"""Models that do less for easy inputs: rows and tokens leave a batch between the blocks of an encoder.

:mod:`eckart.adaptive.narrow` takes rows and tokens out of what a block is called with, :mod:`eckart.adaptive.walk`
knows which are left in one pass, :mod:`eckart.adaptive.attach` puts behaviors on a model. A behavior is one file with
one class on :class:`Behavior`, and one line in :data:`eckart.registry.BEHAVIORS`.
"""

from eckart.adaptive.attach import adaptive_spec, attach, attach_spec, behaviors_of, detach, in_words, refuse_adaptive
from eckart.adaptive.behavior import Behavior
from eckart.adaptive.walk import Walk

__all__ = [
    "Behavior",
    "Walk",
    "adaptive_spec",
    "attach",
    "attach_spec",
    "behaviors_of",
    "detach",
    "in_words",
    "refuse_adaptive",
]
