"""Training on transformers' Trainer, or a solution in closed form: examples, steps, what is kept, scores."""

from eckart.training.exam import Exam, better
from eckart.training.examples import Examples, load_examples
from eckart.training.loop import train
from eckart.training.solving import solve

__all__ = ["Exam", "Examples", "better", "load_examples", "solve", "train"]
