"""Factored checkpoints in the format of transformers: find, check, open, load, save, export.

Import from the modules themselves (``from eckart.checkpoint.save import save``). This file imports nothing, so that
:mod:`eckart.checkpoint.register` can be used without torch.
"""
