"""A folder with the model's own Python file: for vLLM, and for transformers without eckart."""
