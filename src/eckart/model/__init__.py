"""What knows transformers' module types: find sites, replace them."""

from eckart.model.clone import cast, own_storage, shared_clone
from eckart.model.embeddings import Table, Tables, chosen_size, find_tables, put_table, saved_numbers
from eckart.model.experts import Experts, experts_apart, fuse, fused_experts, with_single_experts
from eckart.model.heads import HeadCut, cut_heads, cut_layer, forget_cut, heads_of_rows
from eckart.model.preserve import preserve_random_state, preserve_state
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
from eckart.model.shared import owner_of, share, shared_parameters, unshare
from eckart.model.sites import Site, Sites, dense_weight, find_sites, has_output_head
from eckart.model.ties import ties_of, ties_of_factored
from eckart.model.weights import Compute, Weights

__all__ = [
    "Compute",
    "Experts",
    "HeadCut",
    "Site",
    "Sites",
    "Table",
    "Tables",
    "Weights",
    "cast",
    "chosen_size",
    "cut_heads",
    "cut_layer",
    "dense_module",
    "dense_weight",
    "experts_apart",
    "factored_modules",
    "find_sites",
    "find_tables",
    "forget_cut",
    "fuse",
    "fused_experts",
    "has_output_head",
    "heads_of_rows",
    "own_storage",
    "owner_of",
    "pack",
    "preserve_random_state",
    "preserve_state",
    "put_table",
    "replace",
    "saved_numbers",
    "set_dense",
    "share",
    "shared_clone",
    "shared_parameters",
    "store",
    "ties_of",
    "ties_of_factored",
    "to_dense_modules",
    "unpack",
    "unshare",
    "with_single_experts",
]
