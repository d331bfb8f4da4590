"""A clone computes elsewhere and the original stays as it was; so does a model whose state is preserved."""

import copy
import random

import numpy
import pytest
import torch
from architectures import BY_NAME
from safetensors.torch import load_file, save_file

from eckart.model import preserve_state, shared_clone


def layout(model):
    """Everything about a model's tensors that moving, casting or untying would change."""
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    return {name: (id(t), t.data_ptr(), t.device, t.dtype, t.requires_grad) for name, t in tensors.items()}


@pytest.fixture
def model():
    return BY_NAME["llama-tied"].model()


def test_clone_moved_to_another_device_leaves_the_original_where_it_was(model, tmp_path):
    save_file({"table": torch.ones(64, 64)}, tmp_path / "mapped.safetensors")
    mapped = load_file(tmp_path / "mapped.safetensors")["table"]
    body = model.base_model
    body.mapped = torch.nn.Parameter(mapped)
    body.register_buffer("count", torch.arange(3.0))
    before = layout(model)
    clone = shared_clone(model)
    assert {name: entry[1] for name, entry in layout(clone).items()} == {n: entry[1] for n, entry in before.items()}
    clone.requires_grad_(False)
    clone.to(torch.float64)
    assert layout(model) == before
    assert clone.get_input_embeddings().weight is clone.get_output_embeddings().weight
    clone.to("meta")  # stands for any other device
    assert layout(model) == before
    assert all(t.is_meta for t in (*clone.parameters(), *clone.buffers()))


def disturb(model):
    model.eval().requires_grad_(True).to(torch.float64)
    model.config.use_cache = not model.config.use_cache
    model.config.id2label[7] = "more"
    model.config.added = 1
    model.config = copy.deepcopy(model.config)
    random.random()
    numpy.random.rand()
    torch.rand(1)
    raise KeyError


def test_preserved_state_is_restored_after_an_error(model):
    model.train()
    model.base_model.eval()
    next(model.parameters()).requires_grad_(False)
    before, modes = layout(model), [module.training for module in model.modules()]
    config, settings = model.config, copy.deepcopy(model.config.to_dict())
    draws = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()
    with pytest.raises(KeyError), preserve_state(model):
        disturb(model)
    assert layout(model) == before
    assert [module.training for module in model.modules()] == modes
    assert model.config is config
    assert model.config.to_dict() == settings
    assert not hasattr(model.config, "added")
    assert random.getstate() == draws[0]
    assert numpy.random.get_state()[1].tolist() == draws[1]
    assert torch.equal(torch.get_rng_state(), draws[2])


def test_preserved_state_keeps_the_configurations_inside_a_configuration():
    model = BY_NAME["t5"].model()
    inner = model.encoder.config
    assert inner is not model.config
    with preserve_state(model):
        inner.dropout_rate = 0.5
        model.generation_config.max_length = 3
    assert model.encoder.config is inner
    assert inner.dropout_rate != 0.5
    assert model.generation_config.max_length != 3
