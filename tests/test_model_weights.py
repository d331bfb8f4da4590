"""Weights are where they compute for as long as they are used, and the originals are back afterwards."""

import gc
import weakref
from contextlib import contextmanager

import pytest
import torch
from architectures import BY_NAME, ZOO, output
from problems import RANK_FORMS
from torch import nn

from eckart.data.inference import device_of, evaluating, forward
from eckart.forms import FORMS
from eckart.forms.lazy import LazyWeight
from eckart.model import ComputePlacement, WeightLoader, cast, replace_module, shared_clone, weights

CPU = torch.device("cpu")
FLOAT32 = ComputePlacement(CPU, torch.float32)


def blocks_of(model):
    """The items of the outermost ModuleLists."""
    found, lists = [], []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists.append(name)
            found += [f"{name}.{i}" for i in range(len(module))]
    return found


def stored(name, dtype=torch.bfloat16):
    """A model as a checkpoint of that type would be, and the same numbers in float32."""
    model = BY_NAME[name].model()
    cast(model, dtype)
    wide = shared_clone(model)
    cast(wide, torch.float32)
    return model, wide


def tables(model):
    """Every parameter and buffer object by its place."""
    return {
        (name, key): tensor
        for name, module in model.named_modules()
        for table in (module._parameters, module._buffers)
        for key, tensor in table.items()
    }


def same(one, other):
    return one.keys() == other.keys() and all(one[key] is other[key] for key in one)


@contextmanager
def counting(model, blocks):
    """For every call of a block, how many blocks show float32 only; what is not held shows the stored type."""
    seen, units = [], [model.get_submodule(name) for name in blocks]

    def wide(unit):
        return all(p.dtype == torch.float32 for p in unit.parameters() if p.is_floating_point())

    handles = [
        next(leaf for leaf in unit.modules() if isinstance(leaf, nn.Linear | nn.LayerNorm)).register_forward_hook(
            lambda *_: seen.append(sum(wide(unit) for unit in units))
        )
        for unit in units
    ]
    yield seen
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("large", [0, weights.LARGE], ids=["everything-apart", "as-it-is"])
@pytest.mark.parametrize("architecture", ZOO, ids=lambda architecture: architecture.name)
def test_a_streamed_model_computes_what_the_wide_model_does(architecture, large, monkeypatch):
    monkeypatch.setattr(weights, "LARGE", large)
    model, wide = stored(architecture.name)
    before, state = tables(model), set(model.state_dict())
    inputs = architecture.batches(count=1)[0]
    floats = {k: v.to(torch.float32) if v.is_floating_point() else v for k, v in inputs.items()}
    with evaluating(model), WeightLoader(model, FLOAT32).streaming(blocks_of(model)):
        found = output(model, floats)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, output(wide, floats), rtol=1e-6, atol=1e-6)
    assert same(tables(model), before)
    assert set(model.state_dict()) == state
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    "name", ["bert", "modernbert", "albert", "xlnet", "opt", "bloom", "llama", "t5", "vit", "mamba"]
)
def test_everything_that_computes_is_on_the_device(name):
    # The meta device stands for any other: it has no numbers, and refuses to compute with tensors of the CPU.
    meta = torch.device("meta")
    model, _ = stored(name)
    before = tables(model)
    inputs = {k: v.to(meta) for k, v in BY_NAME[name].batches(count=1)[0].items() if "mask" not in k}
    if name == "llama":
        rows, length = inputs["input_ids"].shape
        inputs["attention_mask"] = torch.ones(rows, 1, length, length, dtype=torch.bool, device=meta)
    if model.can_generate():
        inputs["use_cache"] = False
    with WeightLoader(model, ComputePlacement(meta, torch.float32)).streaming(blocks_of(model)):
        found = output(model, inputs)
    assert (found.device, found.dtype) == (meta, torch.float32)
    assert same(tables(model), before)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "bert", "t5", "mixtral", "mamba"])
def test_one_block_is_there_at_a_time(name):
    model, _ = stored(name)
    blocks = blocks_of(model)
    with counting(model, blocks) as seen, WeightLoader(model, FLOAT32).streaming(blocks):
        output(model, BY_NAME[name].batches(count=1)[0])
    assert len(seen) >= len(blocks)
    assert set(seen) == {1}


@pytest.mark.parametrize("large", [0, weights.LARGE])
def test_an_exception_in_the_middle_puts_everything_back(large, monkeypatch):
    monkeypatch.setattr(weights, "LARGE", large)
    model, wide = stored("llama-tied")
    before, blocks = tables(model), blocks_of(model)
    inputs = BY_NAME["llama-tied"].batches(count=1)[0]
    streamed = WeightLoader(model, FLOAT32)

    def stop(*_):
        raise InterruptedError

    handle = model.get_submodule(blocks[1]).mlp.register_forward_hook(stop)
    with pytest.raises(InterruptedError), streamed.streaming(blocks):
        output(model, inputs)
    handle.remove()
    assert same(tables(model), before)
    assert not any("forward" in vars(module) for module in model.modules())
    with streamed.streaming(blocks):
        torch.testing.assert_close(output(model, inputs), output(wide, inputs))


def test_what_does_not_fit_puts_everything_back(monkeypatch):
    model, _ = stored("llama")
    before = tables(model)
    made, copy = [], WeightLoader._copy

    def once(self, slot):
        if made:
            raise torch.OutOfMemoryError("no more")
        made.append(slot)
        return copy(self, slot)

    monkeypatch.setattr(WeightLoader, "_copy", once)
    held = WeightLoader(model, FLOAT32)
    with pytest.raises(torch.OutOfMemoryError), held.held(""):
        pass
    assert made
    assert same(tables(model), before)


def test_stand_ins_fetch_nothing():
    model, wide = stored("llama")
    blocks = blocks_of(model)
    inputs = BY_NAME["llama"].batches(count=1)[0]
    own = WeightLoader(model, FLOAT32)
    with own.streaming(blocks), counting(model, blocks) as seen:
        first = model.get_submodule(blocks[0])
        streamed = first.forward
        first.forward = lambda hidden_states, *_, **__: hidden_states
        stood_in = output(model, inputs)
        first.forward = streamed
        whole = output(model, inputs)
    assert len(seen) == 3  # the second block alone, then both
    torch.testing.assert_close(whole, output(wide, inputs))
    assert not torch.allclose(stood_in, whole)


def test_holding_is_counted_and_lets_go():
    model, _ = stored("llama-tied")
    before, held = tables(model), WeightLoader(model, FLOAT32)
    layer = model.model.layers[0].mlp.up_proj
    original = layer.weight
    with held.held("model.layers.0"):
        copy = layer.weight
        assert copy is not original
        assert type(copy) is nn.Parameter
        assert copy.dtype == torch.float32
        with held.held("model.layers.0.mlp", "model.layers.0"):
            assert layer.weight is copy
            assert model.model.layers[1].mlp.up_proj.weight.dtype == torch.bfloat16
        assert layer.weight is copy
        gone = weakref.ref(copy)
        del copy
    assert layer.weight is original
    gc.collect()
    assert gone() is None
    assert same(tables(model), before)


def test_tied_weights_are_one_tensor_while_held():
    model, _ = stored("llama-tied")
    held = WeightLoader(model, FLOAT32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with held.held("lm_head"):
        assert model.lm_head.weight.dtype == torch.float32
        assert model.model.embed_tokens.weight.dtype == torch.bfloat16
        with held.held("model.embed_tokens"):
            assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.lm_head.weight.dtype == torch.float32
        assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    with held.held(""):
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_gradients_are_wanted_where_the_original_wants_them():
    model, _ = stored("llama")
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    with WeightLoader(model, FLOAT32).held("model.layers.0"):
        assert not model.model.layers[0].mlp.up_proj.weight.requires_grad
        assert model.model.layers[0].mlp.down_proj.weight.requires_grad


def test_freezing_reaches_what_is_not_there_yet(monkeypatch):
    monkeypatch.setattr(weights, "LARGE", 0)
    model, _ = stored("llama")
    inputs = BY_NAME["llama"].batches(count=1)[0]
    with WeightLoader(model, FLOAT32).streaming(blocks_of(model)):
        assert model.lm_head.weight.requires_grad
        model.requires_grad_(False)
        assert not model.lm_head.weight.requires_grad
        assert not model(**inputs).logits.requires_grad
        model.lm_head.weight.requires_grad_(True)
        assert isinstance(model.lm_head.weight, LazyWeight)
        assert model(**inputs).logits.requires_grad
    assert [n for n, p in model.named_parameters() if p.requires_grad and "norm" not in n] == ["lm_head.weight"]


def test_only_narrower_floating_point_numbers_are_widened():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("float16", "bfloat16", "float32", "float64"):
                self.register_parameter(f"a_{name}", nn.Parameter(torch.ones(2, dtype=getattr(torch, name))))
            self.register_buffer("order", torch.arange(2))
            self.register_buffer("mask", torch.ones(2, dtype=torch.bool))
            self.register_buffer("kept", torch.ones(2, dtype=torch.float16))
            self.register_buffer("table", torch.ones(2, dtype=torch.float16), persistent=False)

    model = Mixed()
    with WeightLoader(model, FLOAT32).held(""):
        types = {name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    assert types == {
        "a_float16": torch.float32,
        "a_bfloat16": torch.float32,
        "a_float32": torch.float32,
        "a_float64": torch.float64,
        "order": torch.int64,
        "mask": torch.bool,
        "kept": torch.float32,
        "table": torch.float16,  # as in cast: what no checkpoint holds was computed in its type
    }


def test_a_model_that_is_there_is_left_alone():
    model, wide = stored("llama")
    for held in (WeightLoader(model, None), WeightLoader(model, ComputePlacement(CPU)), WeightLoader(wide, FLOAT32)):
        assert held.resident
        before = tables(held._model)
        with held.held(""), held.streaming(blocks_of(held._model)):
            assert same(tables(held._model), before)
            assert not any("forward" in vars(module) for module in held._model.modules())
    assert not WeightLoader(model, FLOAT32).resident
    assert WeightLoader(model, None).device == WeightLoader(model, FLOAT32).device == CPU


def test_inputs_go_where_the_model_computes():
    model, wide = stored("vit")
    inputs = BY_NAME["vit"].batches(count=1)[0]
    own = WeightLoader(model, FLOAT32)
    expected = forward(wide, inputs).logits
    with torch.no_grad(), own.streaming(blocks_of(model)):
        assert device_of(model) == CPU
        assert model.dtype == model.vit.dtype == torch.float32
        assert model.device == CPU
        torch.testing.assert_close(forward(model, inputs).logits, expected)
        with own.streaming(blocks_of(model)):  # once more does no harm
            torch.testing.assert_close(forward(model, inputs).logits, expected)
        torch.testing.assert_close(forward(model, inputs).logits, expected)
    assert model.dtype == torch.bfloat16
    meta = torch.device("meta")
    with WeightLoader(model, ComputePlacement(meta, torch.float32)).streaming(blocks_of(model)):
        assert model.device == meta
        assert model.dtype == torch.float32


def test_an_embedding_is_never_widened_as_a_whole(monkeypatch):
    monkeypatch.setattr(weights, "LARGE", 0)
    model, wide = stored("gemma3")
    copied, copy = [], WeightLoader._copy
    monkeypatch.setattr(WeightLoader, "_copy", lambda self, slot: copied.append(slot.module) or copy(self, slot))
    inputs = BY_NAME["gemma3"].batches(count=1)[0]
    with torch.no_grad(), WeightLoader(model, FLOAT32).streaming(blocks_of(model)):
        assert isinstance(model.model.embed_tokens.weight, LazyWeight)
        found = model.model(**inputs).last_hidden_state
        assert model.model.embed_tokens not in copied
        torch.testing.assert_close(model.model.embed_tokens.weight.sum(), wide.model.embed_tokens.weight.sum())
        assert model.model.embed_tokens in copied
    torch.testing.assert_close(found, wide.model(**inputs).last_hidden_state)


@pytest.mark.parametrize("form", RANK_FORMS)
@pytest.mark.parametrize("large", [0, weights.LARGE])
def test_stored_forms_stream_and_keep_no_working_memory(form, large, monkeypatch):
    monkeypatch.setattr(weights, "LARGE", large)
    model = BY_NAME["llama"].model()
    stream = torch.Generator().manual_seed(0)
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]  # the head too
    for name in names:
        old = model.get_submodule(name)
        module = FORMS[form](old.in_features, old.out_features, 8, old.bias is not None)
        left = torch.randn(old.out_features, 8, generator=stream) * 0.2
        module.store(left, torch.randn(8, old.in_features, generator=stream) * 0.2, old.bias)
        replace_module(model, name, module)
    cast(model, torch.bfloat16)
    wide = shared_clone(model)
    cast(wide, torch.float32)
    inputs = BY_NAME["llama"].batches(count=1)[0]
    own = WeightLoader(model, FLOAT32)
    with torch.no_grad(), own.streaming(blocks_of(model)):
        torch.testing.assert_close(output(model, inputs), output(wide, inputs))
        with own.held("model.layers.0"):
            torch.testing.assert_close(output(model, inputs), output(wide, inputs))
    assert all(getattr(model.get_submodule(name), "_prepared", None) is None for name in names)


def test_blocks_may_be_replaced_between_two_passes():
    model, _ = stored("llama")
    blocks, inputs = blocks_of(model), BY_NAME["llama"].batches(count=1)[0]
    with torch.no_grad(), WeightLoader(model, FLOAT32).streaming(blocks):
        output(model, inputs)
        old = model.model.layers[0].mlp.up_proj
        assert old.weight.dtype == torch.bfloat16  # what is not held shows what it is stored as
        new = nn.Linear(old.in_features, old.out_features, bias=False, dtype=torch.bfloat16)
        replace_module(model, "model.layers.0.mlp.up_proj", new)
        found = output(model, inputs)
    wide = shared_clone(model)
    cast(wide, torch.float32)
    torch.testing.assert_close(found, output(wide, inputs))


def test_casting_tells_what_has_changed():
    model = BY_NAME["llama-tied"].model()
    seen = []
    cast(model, torch.bfloat16, changed=lambda module, name: seen.append((name, module)))
    assert len(seen) == len({name for name, _ in seen}) > 10
    assert all(model.get_submodule(name) is module for name, module in seen)
    assert "lm_head" not in dict(seen)  # tied: it changed with the embedding
    again = []
    cast(model, torch.bfloat16, changed=lambda module, name: again.append(name))
    assert not again
