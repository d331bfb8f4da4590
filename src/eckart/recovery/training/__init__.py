"""Training on transformers' Trainer, or a solution in closed form: examples, steps, what is kept, scores."""

from eckart.recovery.training.closed_form import solve
from eckart.recovery.training.examples import Examples, load_examples
from eckart.recovery.training.loop import train
from eckart.recovery.training.scorer import Scorer, better

__all__ = ["Examples", "Scorer", "better", "load_examples", "solve", "train"]
