"""What a model is worth and what it costs: scores, distance from the original, sizes; one measurement a file."""
