"""The training loop and the solution in closed form: data, steps, the state that is kept, scores."""

from eckart.recovery.training.closed_form import solve
from eckart.recovery.training.data import TrainingData, load_training_data
from eckart.recovery.training.loop import count_steps, train
from eckart.recovery.training.scorer import Scorer, is_better

__all__ = ["Scorer", "TrainingData", "count_steps", "is_better", "load_training_data", "solve", "train"]
