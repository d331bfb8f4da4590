"""Factored checkpoints: the transformers plug-in, safe reading, publishing, model card.

Import from the modules themselves (``from eckart.checkpoint.save import save``); importing
``eckart.checkpoint.plugin`` registers the format with transformers.
"""
