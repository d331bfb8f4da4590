"""Ways to make quality come back after factoring."""

from eckart.recover.adapter import Adapter, load_adapter, save_adapter
from eckart.recover.dsee import Dsee
from eckart.recover.losparse import LoSparse, LoSparseDistilled
from eckart.recover.refit import Refit, refittable

__all__ = ["Adapter", "Dsee", "LoSparse", "LoSparseDistilled", "Refit", "load_adapter", "refittable", "save_adapter"]
