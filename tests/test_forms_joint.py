"""The joint form: one input factor, stored once, and one product with it, whatever happens to the input."""

import copy
import gc
import pickle
import threading
import warnings
import weakref
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload
from architectures import output
from joint_groups import joined, pair, separately
from peft import LoraConfig, get_peft_model
from problems import close, normal
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import eckart
from eckart.checkpoint.description import attach_config
from eckart.evaluation.sizes import count_sizes
from eckart.forms import PivotedJoint
from eckart.forms import shared_product as memo
from eckart.linalg import Problem, factorize_jointly
from eckart.linalg.pivot import MAXVOL_TOLERANCE
from eckart.model import shared_parameters, to_dense_modules, unshare_parameters

MODES = {"gradient": nullcontext, "no gradient": torch.no_grad, "inference": torch.inference_mode}
every_form = pytest.mark.parametrize("form", ["joint", "pivoted-joint"])
every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
MODELS = ["llama", "bert", "mixtral", "t5"]


@pytest.fixture
def products(monkeypatch):
    """How often a product with an input factor was computed."""
    calls = []
    forward = nn.Linear.forward

    def count(self, x):
        if self.bias is None and self.out_features == 5:
            calls.append(x)
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", count)
    return calls


def given(*shape, seed=0):
    return normal(*shape, seed=seed, dtype=torch.float32)


def check(model, x, outputs=None):
    outputs = [member(x) for member in model] if outputs is None else outputs
    for got, expected in zip(outputs, separately(model, x), strict=True):
        close(got, expected, 1e-6)


# -- once --------------------------------------------------------------------------------------------


@every_form
@every_mode
@pytest.mark.parametrize("readers", [2, 3])
def test_the_product_is_computed_once_and_does_not_stay(products, mode, readers, form):
    model = pair(readers, form=form)
    with mode():
        for shape in ((12,), (4, 12), (2, 3, 12)):
            x = given(*shape)
            outputs = [member(x) for member in model]
            assert len(products) == 1
            assert memo.ATTRIBUTE not in x.__dict__
            check(model, x, outputs)
            products.clear()


@pytest.mark.parametrize("mode", ["no gradient", "inference"])
def test_the_product_is_freed_when_the_last_has_read_it(monkeypatch, mode):
    model, freed = pair(2), []
    forward = nn.Linear.forward

    def watch(self, x):
        found = forward(self, x)
        if self is model[0].first:
            weakref.finalize(found, freed.append, True)
        return found

    monkeypatch.setattr(nn.Linear, "forward", watch)
    with MODES[mode]():
        x = given(4, 12)
        model[0](x)
        assert not freed
        model[1](x)
        assert freed
        x = given(4, 12)
        model[0](x)
        freed.clear()
        del x  # nobody can ask for it any more
        assert freed


def test_a_graph_is_not_kept_by_an_input_that_not_all_have_read():
    """The input holds the product, and the product's graph the input: not in a circle."""
    model = pair(2)
    gc.disable()
    try:
        x = given(4, 12)
        x = x + 0
        seen = weakref.ref(x)
        found = model[0](x)
        del x, found
        assert seen() is None
    finally:
        gc.enable()


def test_alone_it_is_an_ordinary_module(products):
    (model,) = pair(1)
    x = given(3, 12)
    for _ in range(2):
        model(x)
    assert len(products) == 2
    assert not x.__dict__


# -- what changes the answer ---------------------------------------------------------------------------


def _in_place(model, x):
    x.add_(1)


def _one_number(model, x):
    x[0, 0] = 9.0


def _other_data(model, x):
    x.data = given(*x.shape, seed=3)


def _shorter_data(model, x):
    x.data = x.data[:2]


def _weight_in_place(model, x):
    with torch.no_grad():
        model[0].first.weight.mul_(2)


def _weight_data(model, x):
    model[0].first.weight.data = given(*model[0].first.weight.shape, seed=5)


def _step(model, x):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model[0].first.weight.grad = torch.ones_like(model[0].first.weight)
    optimizer.step()


def _other_parameter(model, x):
    model[1].first.weight = nn.Parameter(given(*model[1].first.weight.shape, seed=6))


CHANGES = [_in_place, _one_number, _other_data, _shorter_data, _weight_in_place, _weight_data, _step, _other_parameter]


@every_form
@every_mode
@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_since_is_computed_again(mode, change, form):
    model = pair(2, form=form)
    with mode():
        x = given(4, 12)
        model[0](x)
        change(model, x)
        got = model[1](x)
        close(got, separately(model, x)[1], 1e-6)


@every_mode
def test_the_same_tensor_of_the_next_pass_is_another_input(products, mode):
    model = pair(2)
    with mode():
        x = given(4, 12)
        for seed in range(3):
            if not x.is_inference():
                x.copy_(given(4, 12, seed=seed))
            check(model, x, [member(x) for member in model])
    assert len(products) == 3 + 2 * 3


def test_equal_numbers_in_another_tensor_are_another_input(products):
    model = pair(2)
    with torch.no_grad():
        x = given(4, 12)
        model[0](x)
        model[1](x.clone())
    assert len(products) == 2


def test_gradients_do_not_read_what_has_none():
    model = pair(2)
    x = given(4, 12)
    with torch.no_grad():
        model[0](x)
    model[1](x).sum().backward()
    assert float(model[1].first.weight.grad.abs().max()) > 0
    x = given(4, 12)
    model.requires_grad_(False)
    model[0](x)
    x.requires_grad_()
    model[1](x).sum().backward()
    assert float(x.grad.abs().max()) > 0
    x = given(4, 12)
    model[0](x)
    model[1].first.weight.requires_grad_()
    model[1](x).sum().backward()
    assert float(model[1].first.weight.grad.abs().max()) > 0
    with torch.inference_mode():
        model[0](x)
    model[1](x).sum().backward()  # no inference tensor is saved for it


def test_another_parameter_of_the_same_numbers_gets_its_own_gradient():
    model, x = pair(2), given(4, 12)
    kept = model[0](x)
    model[1].first.weight = nn.Parameter(model[0].first.weight.detach())
    model[1](x).sum().backward()
    assert float(model[1].first.weight.grad.abs().max()) > 0
    assert model[0].first.weight.grad is None
    del kept


def test_autocast_has_products_of_its_own():
    model = pair(3)
    with torch.no_grad():
        x = given(4, 12)
        wide = model[0](x)
        with torch.autocast("cpu", torch.bfloat16):
            half = model[1](x)
        again = model[2](x)
        x = given(4, 12)
        with torch.autocast("cpu", torch.bfloat16):
            model[0](x)
        close(model[1](x), model[1].second(model[1].first(x)), 1e-6)
    assert (wide.dtype, half.dtype, again.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    close(again, model[2].second(model[2].first(x)), 1e-6)


@every_form
def test_gradients_are_those_of_separate_products(form):
    model = pair(3, form=form).double()
    x = normal(4, 12).requires_grad_()

    def total(outputs):
        return sum((output * (i + 1)).square().sum() for i, output in enumerate(outputs))

    total([member(x) for member in model]).backward()
    got = [x.grad, *(p.grad for p in model.parameters())]
    got = [g.clone() for g in got]
    x.grad = None
    model.zero_grad()
    total(separately(model, x)).backward()
    for one, other in zip(got, [x.grad, *(p.grad for p in model.parameters())], strict=True):
        close(one, other, 1e-12)


def test_each_member_may_have_a_backward_pass_of_its_own():
    """A freed graph is not read."""
    model, x = pair(3), given(4, 12).requires_grad_()
    for member in model:
        member(x).sum().backward()
    (model[0](x).sum() + model[1](x).sum()).backward()
    model[2](x).sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_checkpointed_gradients_are_the_same(reentrant, whole):
    model, x = pair(3), given(4, 12).requires_grad_()

    def run(parts):
        return lambda y: sum(part(y).square().sum() for part in parts)

    run(model)(x).backward()
    expected = [x.grad.clone(), *(p.grad.clone() for p in model.parameters())]
    x.grad = None
    model.zero_grad()
    if whole:  # the input of the group is made inside
        found = checkpoint(lambda y: run(model)(y + 0), x, use_reentrant=reentrant)
    else:  # one inside, two outside, two more of the same tensor
        found = checkpoint(run(model[:1]), x, use_reentrant=reentrant) + run(model[1:])(x)
    found.backward()
    for one, other in zip([x.grad, *(p.grad for p in model.parameters())], expected, strict=True):
        close(one, other, 1e-5)


# -- what else may run ---------------------------------------------------------------------------------


def test_hooked_and_replaced_leaves_are_called(products):
    model = pair(3)
    with torch.no_grad():
        x = given(4, 12)
        plain = [member(x) for member in model]
        for place in range(3):
            handle = model[place].first.register_forward_hook(lambda _, args, found: found * 2)
            outputs = [member(x) for member in model]
            handle.remove()
            for other, (got, expected) in enumerate(zip(outputs, plain, strict=True)):
                assert torch.allclose(got, expected, atol=1e-6) == (other != place)
        model[1].first = nn.Sequential(model[1].first)
        products.clear()
        check(model, x, [member(x) for member in model])
        assert len(products) == 2 + 3


def test_transforms_and_other_tensors_go_their_own_way():
    model, x = pair(2), given(4, 12)
    with torch.no_grad():
        model[0](x)
        batched = torch.func.vmap(lambda row: model[0](row) @ torch.ones(6) + model[1](row) @ torch.ones(7))(x)
        close(batched, sum(found.sum(1) for found in separately(model, x)), 1e-5)
        swapped = {"first.weight": given(5, 12, seed=8)}
        got = torch.func.functional_call(model[1], swapped, (x,))
        close(got, model[1].second(nn.functional.linear(x, swapped["first.weight"])), 1e-5)
    tangent = torch.func.jvp(lambda y: model[0](y).sum() + model[1](y).sum(), (x,), (torch.ones_like(x),))[1]
    expected = torch.func.jvp(lambda y: sum(f.sum() for f in separately(model, y)), (x,), (torch.ones_like(x),))[1]
    close(tangent, expected, 1e-5)
    meta = copy.deepcopy(model).to("meta")
    assert meta[0](x.to("meta")).shape == (4, 6)


def test_threads_do_not_read_each_others_products():
    """Nor each other's graphs, which each of them frees."""
    model, x, failed = pair(2), given(64, 12), []
    expected = separately(model, x)

    def work():
        try:
            for _ in range(100):
                found = [member(x) for member in model]
                assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
                torch.autograd.grad(sum(output.sum() for output in found), model[0].first.weight)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_what_was_computed_before_is_no_constant_of_a_trace():
    model, x = pair(2), given(4, 12)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model[0](x)
        traced = torch.jit.trace(model[1], x, check_trace=False)
        other = given(4, 12, seed=5)
        close(traced(other), model[1].second(model[1].first(other)), 1e-6)


def test_streams_of_a_gpu_are_told_apart(monkeypatch):
    assert memo._queue(torch.device("cpu")) is None
    now = SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    one = memo._queue(torch.device("cuda"))
    now.cuda_stream = 8
    other = memo._queue(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert len({one, other, memo._queue(torch.device("cuda"))}) == 3


def test_copies_and_saved_inputs_take_nothing_along(products):
    model, x = pair(2), given(4, 12)
    with torch.no_grad():
        model[0](x)
        other = copy.deepcopy(model)
        assert other[0].first.weight is other[1].first.weight
        assert other[0].sharers == 2
        other[0].first.weight.mul_(3)
        for tensor in (copy.deepcopy(x), pickle.loads(pickle.dumps(x))):
            assert tensor.__dict__.get(memo.ATTRIBUTE) is None
            check(model, tensor, [member(tensor) for member in model])
        products.clear()
        check(other, x, [member(x) for member in other])
        assert len(products) == 1 + 2
        again = pickle.loads(pickle.dumps(model))
        check(again, x, [member(x) for member in again])


def test_modules_made_in_inference_mode_work():
    with torch.inference_mode():
        model = pair(2)
        x = given(4, 12)
        check(model, x, [member(x) for member in model])


def test_unshared_members_have_products_of_their_own(products):
    model = pair(2)
    assert [member.sharers for member in model] == [2, 2]
    unshare_parameters(model)
    assert [member.sharers for member in model] == [1, 1]
    with torch.no_grad():
        check(model, x := given(4, 12), [member(x) for member in model])
    assert not x.__dict__


# -- in models -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_each_shared_product_once(name, monkeypatch):
    model, groups, batch = joined(name)
    assert groups
    leaves = {id(model.get_submodule(member).first): group for group in groups for member in group}
    assert len(leaves) == sum(len(group) for group in groups)
    calls = Counter()
    forward = nn.Linear.forward

    def count(self, x):
        calls[leaves.get(id(self))] += 1
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", count)
    shared = output(model, batch)
    assert all(calls[group] == 1 for group in groups)
    close(shared, output(to_dense_modules(copy.deepcopy(model)), batch), 1e-4)


@pytest.mark.parametrize("name", ["llama", "bert-mlm"])
def test_multiply_adds_of_a_model_are_those_of_its_forward(name):
    model, groups, batch = joined(name)
    members = [member for group in groups for member in group]
    found = count_sizes(model, members)
    one = groups[0]
    parts = [model.get_submodule(member) for member in one]
    rank, width = parts[0].rank, parts[0].in_features
    alone = count_sizes(model, one)
    assert alone.named.multiply_adds == rank * width + sum(rank * part.out_features for part in parts)
    assert alone.named.elements == alone.named.multiply_adds + sum(p.out_features for p in parts if p.has_bias)
    for member, part in zip(one, parts, strict=True):
        assert alone.modules[member].multiply_adds == rank * (width + part.out_features)
    with FlopCounterMode(display=False) as counter:
        output(model, batch)
    counts = {operation.__name__: count for operation, count in counter.get_flop_counts()["Global"].items()}
    tokens = batch["input_ids"].numel()
    assert counts["mm"] + counts.get("addmm", 0) == 2 * tokens * found.model.multiply_adds


@pytest.mark.parametrize(
    ("name", "form"), [("llama", "joint"), ("bert", "joint"), ("t5", "joint"), ("bert", "pivoted-joint")]
)
def test_shared_factors_are_saved_once_and_loaded_shared(name, form, tmp_path):
    model, groups, batch = joined(name, group_form=form)
    ties = shared_parameters(model)
    assert len(ties) == sum(len(group) - 1 for group in groups)
    expected = output(model, batch)
    attach_config(model)
    model.save_pretrained(tmp_path)
    for again in (eckart.load(tmp_path), type(model).from_pretrained(tmp_path).eval()):
        assert shared_parameters(again) == ties
        assert all(again.get_submodule(member).sharers == len(group) for group in groups for member in group)
        assert torch.equal(output(again, batch), expected)
    eckart.densify(model)
    close(output(model, batch), expected, 1e-4)


def test_an_adapter_in_place_of_the_shared_factor_is_no_sharing():
    model = pair(3)
    model[1].first = nn.Sequential(model[1].first)
    assert model[1].held_parameter() is None
    assert model[0].held_parameter() is model[2].held_parameter() is model[0].first.weight
    rank, width = 5, 12
    expected = sum(rank * (width + part.out_features) for part in model) - rank * width
    assert count_sizes(model).model.multiply_adds == expected


def test_offloaded_members_work():
    model, x = pair(3), given(4, 12)
    with torch.no_grad():
        expected = separately(model, x)
        cpu_offload(model, execution_device="cpu")
        for _ in range(2):
            for got, wanted in zip([member(x) for member in model], expected, strict=True):
                close(got, wanted, 1e-6)
        assert model[0].first.weight.is_meta


@pytest.mark.parametrize("leaves", [["first"], ["second"], ["first", "second"]])
def test_adapters_on_the_leaves_are_trained(leaves):
    model, groups, batch = joined("llama", num_hidden_layers=1)
    expected = output(model, batch)
    model = get_peft_model(model, LoraConfig(target_modules=leaves, r=2, init_lora_weights=True))
    close(output(model, batch), expected, 1e-5)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
    adapters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    members = [member for group in groups for member in group]
    for member in members:
        for leaf in leaves:
            own = [p for name, p in adapters.items() if f"{member}.{leaf}." in name]
            assert len(own) == 2
            assert all(float(p.grad.abs().max()) > 0 for p in own)
    tuned = output(model, batch)
    assert float((tuned - expected).abs().max()) > 1e-4
    if leaves == ["second"]:  # adapters of a shared leaf cannot be merged into it: each has its own
        close(output(model.merge_and_unload(), batch), tuned, 1e-4)


# -- pivoted -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_pivot_columns_are_chosen_from_the_input_factor_alone_and_keep_it_exact():
    problems = [Problem(normal(height, 20, seed=height)) for height in (16, 6, 6)]
    solved = factorize_jointly(problems)
    numbers = 0
    for rank in (1, 7, 20):
        members = []
        for problem, found in zip(problems, solved, strict=True):
            left, right = found.truncated(rank)
            member = PivotedJoint(20, len(problem.target), rank, bias=False).double()
            assert member.store(left, right, None) is None
            close(member.to_dense(), left @ right, 1e-10)
            members.append(member)
        first, *others = members
        assert all(torch.equal(first.first.weight, other.first.weight) for other in others)
        assert all(torch.equal(first.order, other.order) for other in others)
        assert sorted(first.order.tolist()) == list(range(20))
        if first.first.weight.numel():
            assert float(first.first.weight.detach().abs().max()) <= MAXVOL_TOLERANCE * (1 + 1e-9)
        numbers = sum(member.second.weight.numel() for member in members) + first.first.weight.numel()
        assert numbers == rank * (20 - rank) + rank * (16 + 6 + 6)


@pytest.mark.parametrize("rank", [0, 2])
def test_an_input_factor_of_lower_rank_is_held_too(rank):
    right = normal(5, 12)
    right[rank:] = right[:1] * 0 if rank == 0 else right[:1]
    left = normal(8, 5, seed=1)
    member = PivotedJoint(12, 8, 5, bias=False).double()
    assert member.store(left, right, None) is None
    torch.testing.assert_close(member.to_dense().detach(), left @ right, rtol=0, atol=1e-10)


def test_the_input_is_put_in_order_once_for_a_group():
    model, x = pair(3, form="pivoted-joint"), given(4, 12)
    with torch.no_grad(), torch.profiler.profile() as profile:
        outputs = [member(x) for member in model]
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["aten::index_select"] == 1
    check(model, x, outputs)
