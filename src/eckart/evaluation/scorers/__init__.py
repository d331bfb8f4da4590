"""How each task scores a model; one file for tasks that read the same kind of data."""
