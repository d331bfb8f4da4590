"""The compression of a model: recipe in, smaller model out; `pipeline.py` tells the order."""
