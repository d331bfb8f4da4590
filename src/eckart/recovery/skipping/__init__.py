"""Token skipping in training: a trial of the model, soft masks whose levels are learned, and hard ones."""
