"""Attention heads and hidden neurons: found by trying the model, and removed."""
