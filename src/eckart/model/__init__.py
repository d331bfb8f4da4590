"""Modules of transformers models: find the weights that may be factored, replace them, bring them to a device."""

from eckart.model.attention_heads import (
    PrunedHeads,
    forget_pruned_heads,
    head_of_each_row,
    pruned_heads,
    select_features,
)
from eckart.model.clone import cast, shared_clone, unshare_storage
from eckart.model.embeddings import (
    EmbeddingTable,
    EmbeddingTables,
    find_embedding_tables,
    replace_embedding,
    saved_embedding_parameters,
    size_for_fraction,
)
from eckart.model.experts import SeparateExperts, fuse_experts, fused_experts, separate_experts, with_separate_experts
from eckart.model.preserve import preserve_random_state, preserve_state
from eckart.model.replace import (
    dense_module,
    deserialize_module,
    factored_modules,
    replace_module,
    replaced,
    serialize_module,
    set_dense_weight,
    store_factors,
    to_dense_modules,
)
from eckart.model.shared import parameter_owner, share_parameters, shared_parameters, unshare_parameters
from eckart.model.sites import Site, Sites, dense_weight, find_sites, has_output_head
from eckart.model.slicing import SlicedFeatures, forget_slicing, keep_slicing, sliced_features
from eckart.model.ties import declared_ties, tie_factored
from eckart.model.weights import ComputePlacement, WeightLoader

__all__ = [
    "ComputePlacement",
    "EmbeddingTable",
    "EmbeddingTables",
    "PrunedHeads",
    "SeparateExperts",
    "Site",
    "Sites",
    "SlicedFeatures",
    "WeightLoader",
    "cast",
    "declared_ties",
    "dense_module",
    "dense_weight",
    "deserialize_module",
    "factored_modules",
    "find_embedding_tables",
    "find_sites",
    "forget_pruned_heads",
    "forget_slicing",
    "fuse_experts",
    "fused_experts",
    "has_output_head",
    "head_of_each_row",
    "keep_slicing",
    "parameter_owner",
    "preserve_random_state",
    "preserve_state",
    "pruned_heads",
    "replace_embedding",
    "replace_module",
    "replaced",
    "saved_embedding_parameters",
    "select_features",
    "separate_experts",
    "serialize_module",
    "set_dense_weight",
    "share_parameters",
    "shared_clone",
    "shared_parameters",
    "size_for_fraction",
    "sliced_features",
    "store_factors",
    "tie_factored",
    "to_dense_modules",
    "unshare_parameters",
    "unshare_storage",
    "with_separate_experts",
]
