"""Graphs that torch traces of factored models: one product for a joint group, nothing sorted, nothing gathered."""

import warnings
from collections import Counter

import pytest
import torch
from architectures import output
from joint_groups import joined, pair, separately
from problems import close, normal
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from eckart.checkpoint.description import attach_config
from eckart.forms import FactoredLinear, Pivoted, traced_product

ONE_LAYER = {"llama": {"num_hidden_layers": 1}, "gpt2": {"n_layer": 1}, "bert": {"num_hidden_layers": 1}}
PRODUCTS = {"mm", "addmm", "linear"}
MOVES = {"sort", "argsort", "index_select", "gather"}


def made(name: str):
    model, groups, batch = joined(name, **ONE_LAYER[name])
    if name == "bert":  # it gathers those that it makes itself
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    return model, groups, batch | ({"use_cache": False} if name != "bert" else {})


def operations(graph: torch.fx.Graph) -> Counter:
    return Counter(str(getattr(node.target, "_opname", "")) for node in graph.nodes if node.op == "call_function")


def compiled(model: nn.Module, **options):
    """The model compiled in one graph, and the graphs that the compiler gets."""
    graphs = []

    def keep(module, inputs):
        graphs.append(module.graph)
        return make_boxed_func(module.forward)

    torch._dynamo.reset()
    return torch.compile(model, backend=aot_autograd(fw_compiler=keep), fullgraph=True, **options), graphs


def products_of(model: nn.Module) -> int:
    """Products with weights in a forward pass that computes each shared one once."""
    leaves = [module for module in model.modules() if type(module) is nn.Linear]
    return len(leaves) - sum(module.sharers - 1 for module in first_members(model))


def first_members(model):
    seen = {}
    for module in model.modules():
        if isinstance(module, FactoredLinear) and module.shared_by == "input":
            seen.setdefault(id(module.first.weight), module)
    return seen.values()


@pytest.mark.parametrize("name", ONE_LAYER)
def test_a_compiled_model_computes_each_shared_product_once_and_moves_nothing(name):
    model, groups, batch = made(name)
    assert bool(groups) == (name != "gpt2")  # its queries, keys and values are one weight already
    expected = output(model, batch)
    run, graphs = compiled(model)
    with torch.no_grad():
        for _ in range(2):
            close(output(run, batch), expected, 1e-5)
    assert len(graphs) == 1
    found = operations(graphs[0])
    assert sum(found[key] for key in PRODUCTS) == products_of(model)
    assert not MOVES & set(found)


@pytest.mark.parametrize(
    ("name", "strict", "grad"), [("llama", False, False), ("bert", False, True), ("llama", True, False)]
)
def test_an_exported_model_computes_each_shared_product_once(name, strict, grad):
    model, _, batch = made(name)
    expected = output(model, batch)
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (), batch, strict=strict)
    found = operations(program.graph)
    assert sum(found[key] for key in PRODUCTS) == products_of(model)
    assert not MOVES & set(found)
    close(output(program.module(), batch), expected, 1e-5)
    close(output(model, batch), expected, 1e-5)


def test_a_loaded_pivoted_model_puts_outputs_in_order_by_one_constant_index(tmp_path):
    """Traced before it ever ran: the order is not sorted in the graph."""
    model, _, batch = joined("llama", form="pivoted", num_hidden_layers=1)
    pivoted = [module for module in model.modules() if isinstance(module, Pivoted)]
    assert len(pivoted) == 2
    attach_config(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    run, graphs = compiled(loaded)
    with torch.no_grad():
        close(output(run, batch), output(model, batch), 1e-5)
    found = operations(graphs[0])
    assert {key: found[key] for key in MOVES if found[key]} == {"index_select": 2}
    assert sum(found[key] for key in PRODUCTS) == products_of(model)


def test_a_group_of_one_pivot_set_puts_its_input_in_order_once():
    model, groups, batch = joined("llama", group_form="pivoted-joint", num_hidden_layers=1)
    run, graphs = compiled(model)
    with torch.no_grad():
        close(output(run, batch), output(model, batch), 1e-5)
    found = operations(graphs[0])
    assert {key: found[key] for key in MOVES if found[key]} == {"index_select": len(groups)}
    assert sum(found[key] for key in PRODUCTS) == products_of(model)


class Parts(nn.Module):
    """Calls the members of a group, and changes their input in between."""

    def __init__(self, readers: int, change: bool = False) -> None:
        super().__init__()
        self.parts, self.change = pair(readers), change

    def forward(self, x):
        y = x.tanh()
        first, *others = self.parts
        outputs = [first(y)]
        if self.change:
            y.add_(1)
        return [*outputs, *(part(y) for part in others)]


def test_a_traced_input_that_was_changed_is_another_input():
    model = Parts(3, change=True).eval()
    x = normal(4, 12, dtype=torch.float32)
    with torch.no_grad():
        expected = [separately(model.parts, x.tanh())[0], *separately(model.parts, x.tanh() + 1)[1:]]
        run, graphs = compiled(model)
        for got, wanted in zip(run(x), expected, strict=True):
            close(got, wanted, 1e-6)
        program = torch.export.export(model, (x,))
        for got, wanted in zip(program.module()(x), expected, strict=True):
            close(got, wanted, 1e-6)
    for graph in (graphs[0], program.graph):
        assert sum(operations(graph)[key] for key in PRODUCTS) == 3 + 2


def test_a_traced_member_with_another_factor_or_a_hook_has_its_own_product():
    other, hooked = Parts(3).eval(), Parts(3).eval()
    other.parts[1].first.weight = nn.Parameter(normal(5, 12, seed=4, dtype=torch.float32))
    hooked.parts[1].first.register_forward_hook(lambda _, args, found: found * 2)
    x = normal(4, 12, dtype=torch.float32)
    for model in (other, hooked):
        with torch.no_grad():
            expected = [part(x.tanh()) for part in model.parts]
            run, _ = compiled(model)
            for got, wanted in zip(run(x), expected, strict=True):
                close(got, wanted, 1e-6)


def test_what_a_graph_leaves_on_its_input_is_not_read_by_the_next():
    """Members that are compiled one by one: nothing is shared, nothing is stale."""
    parts = pair(2)
    x = normal(4, 12, dtype=torch.float32)
    one, _ = compiled(parts[0])
    other, graphs = compiled(parts[1])
    with torch.no_grad():
        for _ in range(3):
            expected = separately(parts, x)
            close(one(x), expected[0], 1e-6)
            x.mul_(2)
            close(other(x), separately(parts, x)[1], 1e-6)
            close(parts[1](x), separately(parts, x)[1], 1e-6)
    assert sum(operations(graphs[0])[key] for key in PRODUCTS) == 2


def test_the_input_of_a_graph_holds_no_product_afterwards():
    parts = pair(2)

    def both(x):
        return [part(x) for part in parts]

    x = normal(4, 12, dtype=torch.float32)
    run, graphs = compiled(both)
    with torch.no_grad():
        for got, wanted in zip(run(x), separately(parts, x), strict=True):
            close(got, wanted, 1e-6)
    assert sum(operations(graphs[0])[key] for key in PRODUCTS) == 3
    assert getattr(x, traced_product.ATTRIBUTE, None) is None


def test_a_graph_with_gradients_leaves_nothing_on_its_input():
    """It would be held in a circle: the input by the graph, the graph by the input."""
    x = normal(4, 12, dtype=torch.float32)
    run, _ = compiled(pair(2)[0])
    run(x)
    assert not hasattr(x, traced_product.ATTRIBUTE)


def test_compiled_training_has_the_gradients_of_separate_products():
    model = Parts(3).train()
    x = normal(4, 12, dtype=torch.float32)
    sum(found.square().sum() for found in separately(model.parts, x.tanh())).backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    run, _ = compiled(model)
    sum(found.square().sum() for found in run(x)).backward()
    for parameter, wanted in zip(model.parameters(), expected, strict=True):
        close(parameter.grad, wanted, 1e-5)


def test_training_graphs_of_the_default_compiler_repeat_no_product():
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    graphs = []

    def keep(module, inputs):
        graphs.append(module.graph)
        return make_boxed_func(module.forward)

    model = Parts(3).train()
    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    x = normal(4, 12, dtype=torch.float32)
    torch.compile(model, backend=backend, fullgraph=True)(x)
    assert sum(operations(graphs[0])[key] for key in PRODUCTS) == 3 + 1
