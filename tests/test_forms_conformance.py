"""What every stored form must hold; a form that is added to the registry is tested without new code."""

import copy
import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from own_form import ScaledLowRank
from problems import close, normal
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from eckart.errors import UsageError
from eckart.forms import FORMS, Block, FactoredLinear, build, pivoted, register_form
from eckart.linalg import Problem
from eckart.model import Site, store_factors, to_dense_modules

# The pivoted form of full row rank has no rows left to combine.
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")

KINDS = {**{name: form for name, form in FORMS.items() if form.own_module}, "own": ScaledLowRank}
every_form = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)

# (out, in)
SHAPES = {"tall": (24, 16), "wide": (16, 24), "one output": (1, 6), "one input": (6, 1), "odd": (9, 7)}
Case = tuple[int, int, int, Block | None]

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 6e-3}

MODES: dict[str, Callable[[], AbstractContextManager]] = {
    "inference": torch.inference_mode,
    "no gradient": torch.no_grad,
    "gradient": nullcontext,
}


def cases(kind: type[FactoredLinear], shapes: dict[str, tuple[int, int]] = SHAPES) -> Iterator[Case]:
    """(out, in, rank, block): small, middle and full ranks of every shape of block."""
    for rows, columns in shapes.values():
        for block in kind.blocks(rows, columns):
            full = min(kind.full_rank(rows, columns, block), factors(kind, (rows, columns, 1, block))[2])
            for rank in sorted({1, (full + 2) // 3, full}):
                yield rows, columns, rank, block


def typical(kind: type[FactoredLinear], rows: int = 24, columns: int = 16) -> Case:
    """One case of the form."""
    return rows, columns, 5, kind.blocks(rows, columns)[0]


def factors(kind: type[FactoredLinear], case: Case, seed: int = 0) -> tuple[Tensor, Tensor, int]:
    """What the form's own solver makes of a random weight, and the largest rank that it knows."""
    rows, columns, rank, block = case
    solved = kind.solve(Problem(normal(rows, columns, seed=seed)), block, rank, "test")
    return *solved.truncated(rank), len(solved.squared)


def dense_of(kind: type[FactoredLinear], case: Case, left: Tensor, right: Tensor) -> Tensor:
    return kind.times(left, right, torch.eye(case[1], dtype=left.dtype), case[3])


def made(
    kind: type[FactoredLinear],
    case: Case,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    source: str = "linear",
    seed: int = 0,
) -> FactoredLinear:
    rows, columns, rank, block = case
    left, right, _ = factors(kind, case, seed)
    module = kind.empty(rows, columns, rank, bias=bias, source=source, block=block, dtype=dtype)
    given = normal(rows, seed=seed + 2).to(dtype) if bias else None
    assert module.store(left, right, given) is None
    return module.eval()


def leaves(module: FactoredLinear) -> list[nn.Linear]:
    return [leaf for leaf in module.modules() if type(leaf) is nn.Linear]


def check_runs_as_dense(module: FactoredLinear, inputs: int = 3) -> None:
    """`module(x) = x W'^T + b` in every mode, for every layout of x, again and again."""
    dtype = next(module.parameters()).dtype
    weight = module.to_dense().detach().double()
    bias = 0 if module.dense_bias() is None else module.dense_bias().detach().double()
    every = (normal(2, 3, module.in_features), normal(4, module.in_features, seed=1), normal(module.in_features))
    for x in every[:inputs]:
        x = x.to(dtype)
        expected = x.double() @ weight.mT + bias
        for mode in MODES.values():
            with mode():
                for _ in range(2):  # the second call finds working memory of the first
                    output = module(x)
                    assert (output.dtype, output.shape) == (dtype, (*x.shape[:-1], module.out_features))
                    error = (output.detach().double() - expected).abs().max()
                    assert float(error) <= TOLERANCE[dtype] * (1 + float(expected.abs().max()))


def readouts(kind: type[FactoredLinear], monkeypatch: pytest.MonkeyPatch) -> Iterator[float]:
    """Once for each way that the form runs without gradients: the pivoted one has two, by speed."""
    for bound in (math.inf, 0.0) if kind is pivoted.Pivoted else (0.0,):
        for dtype in pivoted.DTYPES:
            monkeypatch.setitem(pivoted.EXPAND_BELOW, ("cpu", dtype), bound)
        yield bound


# -- one matrix --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@every_form
def test_holds_its_factors_and_the_bias(kind, dtype, monkeypatch):
    for _ in readouts(kind, monkeypatch):
        for i, case in enumerate(cases(kind)):
            left, right, _ = factors(kind, case)
            with_bias = bool(i % 2)
            module = made(kind, case, dtype, with_bias)
            close(module.to_dense().double(), dense_of(kind, case, left, right), TOLERANCE[dtype])
            assert (module.dense_bias() is None) == (module.bias is None) == (not with_bias)
            if with_bias:
                close(module.dense_bias().double(), normal(case[0], seed=2), TOLERANCE[dtype])
            check_runs_as_dense(module, 1 + i % 3)


@every_form
def test_gradients_reach_every_parameter(kind):
    case = (6, 4, 2, kind.blocks(6, 4)[-1])
    module = made(kind, case).double()
    x = normal(2, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: module(x), (x, *module.parameters()))
    module(x).square().sum().backward()
    assert all(float(parameter.grad.abs().max()) > 0 for parameter in module.parameters())


@pytest.mark.parametrize("mode", ["gradient", "no gradient"])
@every_form
def test_autocast_computes_in_half(kind, mode, monkeypatch):
    x = normal(4, 16, dtype=torch.float32)
    for _ in readouts(kind, monkeypatch):
        module = made(kind, typical(kind))
        with MODES[mode]():
            expected = module(x)
            with torch.autocast("cpu", torch.bfloat16):
                output = module(x)
            if kind is not ScaledLowRank:  # its float32 scale widens the result
                assert output.dtype == torch.bfloat16
            close(output.float(), expected, 4e-2)
            close(module(x), expected, 1e-6)


# -- what happens to a module ------------------------------------------------------------------------


def _half(module: FactoredLinear) -> FactoredLinear:
    return module.to(torch.bfloat16)


def _changed_in_place(module: FactoredLinear) -> FactoredLinear:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(-2).add_(0.1)
    return module


def _trained(module: FactoredLinear) -> FactoredLinear:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module.train()(normal(3, module.in_features, dtype=torch.float32)).square().sum().backward()
    optimizer.step()
    return module.eval()


def _changed_behind_autograd(module: FactoredLinear) -> FactoredLinear:
    module.train()
    for parameter in module.parameters():
        parameter.data.add_(0.5)  # leaves no mark on the tensor's version
    return module.eval()


def _other(module: FactoredLinear) -> FactoredLinear:
    return made(type(module), (module.out_features, module.in_features, module.rank, module.block), seed=7)


def _stored_again(module: FactoredLinear) -> FactoredLinear:
    case = (module.out_features, module.in_features, module.rank, module.block)
    assert module.store(*factors(type(module), case, 7)[:2], normal(module.out_features, seed=11)) is None
    return module


def _loaded(module: FactoredLinear) -> FactoredLinear:
    assert module.load_state_dict(_other(module).state_dict()) == ([], [])
    assert torch.equal(module.to_dense(), _other(module).to_dense())
    return module


def _loaded_by_assignment(module: FactoredLinear) -> FactoredLinear:
    module.load_state_dict(copy.deepcopy(_other(module).state_dict()), assign=True)
    return module


def _replaced_parameter(module: FactoredLinear) -> FactoredLinear:
    leaf = leaves(module)[-1]
    leaf.weight = nn.Parameter(leaf.weight.detach() * 3)
    return module


EVENTS = [
    _half, _changed_in_place, _trained, _changed_behind_autograd, _stored_again, _loaded, _loaded_by_assignment,
    _replaced_parameter, copy.deepcopy,
]  # fmt: skip


@every_form
def test_forward_follows_the_stored_tensors_whatever_changed_them(kind, monkeypatch):
    block = kind.blocks(60, 48)[0]
    for _ in readouts(kind, monkeypatch):
        for event in EVENTS:
            module = made(kind, (60, 48, 20 if block is None else 3, block))
            check_runs_as_dense(module, 1)
            check_runs_as_dense(event(module), 1)


@every_form
def test_a_copy_is_apart_and_inference_mode_makes_a_working_module(kind):
    module = made(kind, typical(kind))
    before = module.to_dense().detach().clone()
    _changed_in_place(copy.deepcopy(module))
    assert torch.equal(module.to_dense(), before)
    with torch.inference_mode():
        module = made(kind, typical(kind))
        x = normal(2, module.in_features, dtype=torch.float32)
        close(module(x), functional.linear(x, module.to_dense(), module.dense_bias()), 1e-5)


@every_form
def test_hooked_and_replaced_leaves_are_called(kind):
    """Adapters and offloaders put themselves around the leaves: fast paths must not go past them."""
    module = made(kind, typical(kind))
    x = normal(2, module.in_features, dtype=torch.float32)
    with torch.no_grad():
        plain = module(x)
        for leaf in leaves(module):
            handle = leaf.register_forward_hook(lambda _, args, output: output * 2)
            assert not torch.allclose(module(x), plain)
            handle.remove()
        close(module(x), plain, 1e-6)
        module.first = nn.Sequential(module.first)
        close(module(x), plain, 1e-6)


# -- sizes -------------------------------------------------------------------------------------------


@every_form
def test_size_is_counted_from_what_is_stored_and_computed(kind):
    for i, (rows, columns, rank, block) in enumerate(cases(kind)):
        size = kind.size(rows, columns, rank, block)
        for dtype, extra in ((torch.float32, 0), (torch.bfloat16, rows)):
            module = made(kind, (rows, columns, rank, block), dtype, bias=extra > 0)
            tensors = module.state_dict().values()
            assert sum(t.numel() for t in tensors) == size.parameters + extra
            assert sum(t.nbytes for t in tensors) == size.bytes(dtype) + extra * dtype.itemsize
            assert sum(t.numel() for t in tensors if not t.is_floating_point()) == size.index_elements
        left, right, _ = factors(kind, (rows, columns, rank, block))
        assert kind.factor_elements(rows, columns, rank, block) == left.numel() + right.numel()
        if i % 4 == 0:
            module = made(kind, (rows, columns, rank, block), bias=False)
            with FlopCounterMode(display=False) as counter:
                module(normal(3, columns, dtype=torch.float32))
            assert counter.get_total_flops() == 2 * 3 * size.multiply_adds
        assert module.multiply_adds() == size.multiply_adds


@every_form
def test_max_rank_is_the_last_that_saves(kind):
    for rows, columns in ((24, 16), (16, 24), (40, 40), (64, 8), (2, 2), (1, 9), (15, 21), (29, 31)):
        for block in kind.blocks(rows, columns):
            full = kind.full_rank(rows, columns, block)
            sizes = [kind.size(rows, columns, rank, block) for rank in range(1, full + 1)]
            dense = rows * columns
            saving = [i + 1 for i, s in enumerate(sizes) if s.parameters < dense and s.multiply_adds <= dense]
            assert kind.max_rank(rows, columns, block) == max(saving, default=0)


@every_form
def test_ranks_and_sources_that_cannot_be_are_refused(kind):
    rows, columns, _, block = typical(kind)
    full = kind.full_rank(rows, columns, block)
    for rank in (0, -1, full + 1):
        with pytest.raises(UsageError, match=rf"rank {rank} is outside 1\.\.{full} for a weight of 24 x 16"):
            kind.empty(rows, columns, rank, bias=False, block=block)
    with pytest.raises(UsageError, match=r"source 'conv2d'.*'linear' or 'conv1d'"):
        kind.empty(rows, columns, 1, bias=False, source="conv2d", block=block)


# -- the checkpoint ----------------------------------------------------------------------------------


@pytest.fixture
def own_form_known() -> Iterator[None]:
    register_form(ScaledLowRank)
    yield
    FORMS._added.pop(ScaledLowRank.form)


@pytest.mark.parametrize("source", ["linear", "conv1d"])
@every_form
def test_saved_and_built_again_is_the_same_module(kind, source, own_form_known):
    for with_bias in (True, False):
        module = made(kind, typical(kind), torch.bfloat16, with_bias, source)
        again = build(json.loads(json.dumps(module.spec()))).to(torch.bfloat16)
        assert type(again) is type(module)
        assert again.spec() == module.spec()
        assert again.load_state_dict(load(save(module.state_dict()))) == ([], [])
        assert torch.equal(again.to_dense(), module.to_dense())
        assert "in_features=16, out_features=24, rank=5" in repr(again)


@every_form
def test_guard_key_is_written_and_ignored(kind):
    module = nn.ModuleDict({"proj": made(kind, typical(kind))})
    state = module.state_dict()
    assert state["proj.weight"].numel() == 0
    other = nn.ModuleDict({"proj": made(kind, typical(kind), seed=5)})
    assert other.load_state_dict(state) == ([], [])
    assert torch.equal(other["proj"].to_dense(), module["proj"].to_dense())
    # A dense weight under that key is not a guard: it does not belong here and is reported.
    state["proj.weight"] = torch.zeros(24, 16)
    assert other.load_state_dict(state, strict=False).unexpected_keys == ["proj.weight"]
    # A dense module that meets the guard fails instead of keeping its random weight.
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        nn.Linear(16, 24).load_state_dict(module["proj"].state_dict(), strict=False)


# -- half precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in KINDS.values() if kind is not ScaledLowRank])
def test_half_precision_holds_unbalanced_factors_and_refuses_what_overflows(kind):
    rows, columns, rank, block = case = (10, 8, 3, kind.blocks(10, 8)[0])
    left, right, _ = factors(kind, case)
    if kind.shared_parameter is None:  # its scale depends on the shared part alone
        module = kind.empty(rows, columns, rank, bias=False, block=block, dtype=torch.float16)
        assert module.store(left * 1e6, right * 1e-6, None) is None
        close(module.to_dense().double(), dense_of(kind, case, left, right), 1e-2)
    site = Site("h.0.proj", "linear", rows, columns, True)
    with pytest.raises(UsageError, match=r"h\.0\.proj: .*does not fit torch\.float16.*--dtype"):
        store_factors(site, kind.form, rank, left * 1e12, right, None, torch.float16, block)
    with pytest.raises(UsageError, match=r"bias.*does not fit torch\.float16"):
        store_factors(site, kind.form, rank, left, right, torch.full((rows,), 1e6), torch.float16, block)
    module, _ = store_factors(site, kind.form, rank, left * 1e12, right, None, torch.bfloat16, block)
    assert bool(module.to_dense().isfinite().all())
    zero, _ = store_factors(site, kind.form, rank, 0 * left, 0 * right, normal(rows), torch.float32, block)
    assert not zero.to_dense().any()
    close(zero(torch.ones(2, columns)), normal(rows).float().expand(2, -1), 1e-6)


# -- reading the dense weight ------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["linear", "conv1d"])
@every_form
def test_weight_costs_nothing_until_its_values_are_read(kind, source, monkeypatch):
    module = made(kind, typical(kind), torch.bfloat16, source=source)
    dense = module.to_dense().detach()
    shape = (24, 16) if source == "linear" else (16, 24)
    weight = module.weight
    with monkeypatch.context() as patch:
        patch.setattr(type(module), "to_dense", lambda self: pytest.fail("the dense weight was computed"))
        assert (weight.shape, weight.dtype, weight.device.type) == (shape, torch.bfloat16, "cpu")
        assert (weight.size(0), len(weight), weight.numel()) == (shape[0], shape[0], 24 * 16)
        assert weight.dim() == weight.ndim == 2
        assert weight.is_floating_point()
        assert not weight.is_meta
        module(normal(2, 16).to(torch.bfloat16))
    expected = dense if source == "linear" else dense.mT
    assert torch.equal(weight, expected)
    assert torch.equal(module.weight.T, expected.T)
    assert torch.equal(module.weight[1:3], expected[1:3])
    assert torch.equal(module.weight.to(torch.float32), expected.float())
    assert type(module.weight + 0) is Tensor


@pytest.mark.parametrize("source", ["linear", "conv1d"])
@every_form
def test_weight_works_where_models_use_it_and_dense_again(kind, source):
    module = made(kind, typical(kind), source=source)
    x = normal(3, 16, dtype=torch.float32)
    weight, expected = module.weight, module(x).detach()
    if source == "linear":
        ways = (functional.linear(x, weight, module.bias), x @ weight.mT + module.bias)
    else:
        ways = (torch.addmm(module.bias, x, weight), x @ weight + module.bias)
    for output in ways:
        close(output, expected, 1e-5)
        module.zero_grad()
        output.sum().backward(retain_graph=True)
        assert float(module.first.weight.grad.abs().max()) > 0
    for made_again in (module, made(kind, typical(kind), source=source, bias=False)):
        expected = made_again(x).detach()
        dense = to_dense_modules(nn.ModuleDict({"proj": made_again}))["proj"]
        assert type(dense) is (Conv1D if source == "conv1d" else nn.Linear)
        close(dense(x), expected, 1e-5)
