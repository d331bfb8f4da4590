"""Attention heads and hidden neurons: found by probing the model, and removed."""
