"""The rooms that know transformers' module types: find sites, replace them."""

from eckart.model.clone import cast, own_storage, shared_clone
from eckart.model.replace import (
    dense_module,
    factored_modules,
    pack,
    replace,
    set_dense,
    store,
    to_dense_modules,
    unpack,
)
from eckart.model.sites import Site, Sites, dense_weight, find_sites, has_head
from eckart.model.weights import Compute, Weights

__all__ = [
    "Compute",
    "Site",
    "Sites",
    "Weights",
    "cast",
    "dense_module",
    "dense_weight",
    "factored_modules",
    "find_sites",
    "has_head",
    "own_storage",
    "pack",
    "replace",
    "set_dense",
    "shared_clone",
    "store",
    "to_dense_modules",
    "unpack",
]
