"""Private names of transformers and torch: each is where it is expected, and none is used that is not listed."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest
import torch

import eckart

SOURCE = Path(eckart.__file__).parent
INTERNALS = SOURCE / "forms/transformers_internals.py"

# name -> where transformers defines it: an attribute of a class, or a word in the text of a module
TRANSFORMERS = {
    "_is_hf_initialized": "transformers.initialization",
    "_keys_to_ignore_on_load_missing": "transformers.modeling_utils:PreTrainedModel",
    "_keys_to_ignore_on_load_unexpected": "transformers.modeling_utils:PreTrainedModel",
    "_keys_to_ignore_on_save": "transformers.modeling_utils:PreTrainedModel",
    "_adjust_bias": "transformers.modeling_utils:PreTrainedModel",
    "_is_quantized": "transformers.configuration_utils",
    "_hf_peft_config_loaded": "transformers.modeling_utils:PreTrainedModel",
    "_weight_conversions": "transformers.core_model_loading",
    "_from_config": "transformers.modeling_utils:PreTrainedModel",
    "_attn_implementation": "transformers.configuration_utils:PreTrainedConfig",
    "_keep_in_fp32_modules_strict": "transformers.modeling_utils:PreTrainedModel",
    "_keep_in_fp32_modules": "transformers.modeling_utils:PreTrainedModel",
    "_tied_weights_keys": "transformers.modeling_utils:PreTrainedModel",
    "_model_mapping": "transformers:AutoModel",
    "_apply_gate": "transformers.integrations.moe",
    "HF_DEACTIVATE_ASYNC_LOAD": "transformers.core_model_loading",
}

# Public by name, found nowhere in the documentation; the plug-in and the writer stand on them.
UNDOCUMENTED = {
    "all_tied_weights_keys": "transformers.modeling_utils",
    "get_expanded_tied_weights_keys": "transformers.modeling_utils:PreTrainedModel",
    "WeightConverter": "transformers.core_model_loading:",
    "AUTO_QUANTIZER_MAPPING": "transformers.quantizers.auto:",
    "AUTO_QUANTIZATION_CONFIG_MAPPING": "transformers.quantizers.auto:",
    "_process_model_before_weight_loading": "transformers.quantizers.base:HfQuantizer",
    "_process_model_after_weight_loading": "transformers.quantizers.base:HfQuantizer",
}

PRIVATE_OF_TRAINER = ("_get_train_sampler", "_save_checkpoint", "_load_from_checkpoint",
                      "_load_optimizer_and_scheduler", "_load_rng_state")  # fmt: skip

# Attributes of every torch module, and what else of torch has no public name.
MODULE = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_forward_hooks", "_forward_pre_hooks",
          "_state_dict_hooks", "_apply"}  # fmt: skip
TENSOR = {"_version"}
OTHERS = {"_exit": "os", "_C": "torch", "_functorch": "torch._C", "_pytree": "torch.utils"}
STORAGE = {"_cdata"}


@pytest.mark.parametrize("name", [*TRANSFORMERS, *UNDOCUMENTED])
def test_private_name_of_transformers_is_still_there(name):
    where, colon, holder = (TRANSFORMERS | UNDOCUMENTED)[name].partition(":")
    module = importlib.import_module(where)
    if colon:
        found = hasattr(getattr(module, holder) if holder else module, name)
    else:
        found = name in inspect.getsource(module)
    assert found, f"{where} has no {name} any more: see what replaced it, and change {INTERNALS.name}"
    if name in TRANSFORMERS:
        assert name in INTERNALS.read_text(), f"{name} is not used any more: take it off this list"


@pytest.mark.parametrize("name", sorted(MODULE | TENSOR | STORAGE | OTHERS.keys()))
def test_private_name_of_torch_is_still_there(name):
    holder = importlib.import_module(OTHERS[name]) if name in OTHERS else torch.zeros(1)
    holder = holder.untyped_storage() if name in STORAGE else holder
    assert hasattr(torch.nn.Linear(1, 1) if name in MODULE else holder, name)
    assert hasattr(torch._C, "DisableTorchFunctionSubclass")


def test_private_methods_of_the_trainer_that_are_replaced_are_still_there():
    """A method that the Trainer no longer calls would be passed over in silence."""
    from transformers import Trainer

    from eckart.recovery.training import loop

    for kind in vars(loop).values():
        if isinstance(kind, type) and issubclass(kind, Trainer) and kind is not Trainer:
            replaced = [name for name in vars(kind) if name in PRIVATE_OF_TRAINER]
            assert replaced, "none is replaced any more: take this test away"
            gone = [name for name in replaced if not hasattr(Trainer, name)]
            assert not gone, f"transformers.Trainer has no {', '.join(gone)} any more: see {loop.__file__}"


def test_private_names_are_used_only_where_they_are_listed():
    trees = {path: ast.parse(path.read_text()) for path in sorted(SOURCE.rglob("*.py"))}
    own = set()  # private names that eckart gives itself
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and path != INTERNALS:
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and _is_self(node.value) and isinstance(node.ctx, ast.Store):
                own.add(node.attr)
    own |= {"_dense", "_source", "_accessed"}  # of lazy weights
    problems = []
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                name, foreign = node.attr, not _is_self(node.value)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                name, foreign = node.value, node.value in TRANSFORMERS
            else:
                continue
            private = (name.startswith("_") and not name.endswith("__")) or name in TRANSFORMERS
            if not private or not foreign or name in own | MODULE | TENSOR | STORAGE | OTHERS.keys():
                continue
            if path != INTERNALS or name not in TRANSFORMERS:
                problems.append(f"{path.relative_to(SOURCE)}:{node.lineno}: {name}")
    assert not problems, (
        f"private names of other libraries; they belong into {INTERNALS.name} and this list: {problems}"
    )


def _is_self(node: ast.expr) -> bool:
    called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"
    return called or (isinstance(node, ast.Name) and node.id in ("self", "cls"))
