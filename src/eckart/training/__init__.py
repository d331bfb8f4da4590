"""Training on transformers' Trainer: examples, steps, what is kept to go on from, scores."""

from eckart.training.exam import Exam, better
from eckart.training.examples import Examples, load_examples
from eckart.training.loop import train

__all__ = ["Exam", "Examples", "better", "load_examples", "train"]
