"""Every stored form: one matrix however it is run, moved, saved or read, and refusals that say why."""

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from problems import RANK_FORMS, close, every_form, normal, stored
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from eckart.errors import UsageError
from eckart.forms import FORMS, FactoredLinear, Pivoted, build, form_named, pivoted
from eckart.model import Site, store_factors, to_dense_modules

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")

# (out, in, rank)
SHAPES = {
    "tall": (24, 16, 5),
    "wide": (16, 24, 5),
    "rank one": (9, 7, 1),
    "one output": (1, 6, 1),
    "full rank, tall": (12, 8, 8),
    "full rank, wide": (8, 12, 8),
    "larger": (200, 150, 120),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
with_and_without_bias = pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}

MODES: dict[str, Callable[[], AbstractContextManager]] = {
    "inference": torch.inference_mode,
    "no gradient": torch.no_grad,
    "gradient": nullcontext,
}


@pytest.fixture(params=["expanded", "gathered"])
def readout(request, monkeypatch) -> str:
    """Which of the pivoted form's two ways without gradients is taken, whatever is measured to be faster."""
    for dtype in pivoted.EXPAND_BELOW:
        monkeypatch.setitem(pivoted.EXPAND_BELOW, dtype, math.inf if request.param == "expanded" else 0.0)
    return request.param


def factors(shape: tuple[int, int, int], seed: int = 0) -> tuple[Tensor, Tensor]:
    rows, columns, rank = shape
    return normal(rows, rank, seed=seed) / rank**0.5, normal(rank, columns, seed=seed + 1) / columns**0.5


def made(
    form: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype = torch.float32,
    with_bias: bool = True,
    source: str = "linear",
    seed: int = 0,
) -> FactoredLinear:
    left, right = factors(shape, seed)
    bias = normal(shape[0], seed=seed + 2).to(dtype) if with_bias else None
    return stored(form, left.to(dtype), right.to(dtype), bias, source)


def runs_as_its_dense_self(module: FactoredLinear, tolerance: float | None = None) -> None:
    """`module(x) = x W'^T + b` in every mode, for every layout of x, again and again."""
    dtype = next(module.parameters()).dtype
    weight = module.to_dense().detach().double()
    bias = 0 if module.dense_bias() is None else module.dense_bias().detach().double()
    for x in (normal(2, 3, module.in_features), normal(4, module.in_features, seed=1), normal(module.in_features)):
        x = x.to(dtype)
        expected = x.double() @ weight.mT + bias
        for mode in MODES.values():
            with mode():
                for _ in range(2):  # the second call finds working memory of the first
                    output = module(x)
                    assert output.dtype == dtype
                    assert output.shape == (*x.shape[:-1], module.out_features)
                    close(output.detach().double(), expected, tolerance or TOLERANCE[dtype])


# -- one matrix --------------------------------------------------------------------------------------


@every_dtype
@with_and_without_bias
@every_shape
@every_form
def test_holds_factors_and_bias(form, shape, with_bias, dtype, readout):
    module = made(form, shape, dtype, with_bias)
    left, right = (factor.to(dtype).double() for factor in factors(shape))
    close(module.to_dense().detach().double(), left @ right, TOLERANCE[dtype])
    if with_bias:
        close(module.dense_bias().detach().double(), normal(shape[0], seed=2), TOLERANCE[dtype])
    else:
        assert module.dense_bias() is None
        assert module.bias is None
    runs_as_its_dense_self(module)


@every_shape
def test_every_form_holds_the_same_matrix(shape):
    left, right = factors(shape)
    for form in RANK_FORMS:
        close(stored(form, left, right).to_dense(), (left @ right), 1e-9)


def test_both_readouts_are_met(readout):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        module = made("pivoted", SHAPES["tall"], dtype)
        with torch.no_grad():
            module(normal(2, 16, dtype=dtype))
        assert module._prepared[0][0] == readout


@every_form
def test_gradients_reach_the_factors(form):
    module = made(form, SHAPES["tall"], torch.float64)
    x = normal(3, 16).requires_grad_()
    target = normal(3, 24, seed=5)
    (module(x) * target).sum().backward()
    close(x.grad, target @ module.to_dense().detach(), 1e-9)
    for leaf in (module.first, module.second):
        assert float(leaf.weight.grad.abs().max()) > 0
    check = made(form, (6, 5, 2), torch.float64)
    small = normal(2, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: check(x), (small, *check.parameters()))


@pytest.mark.parametrize("mode", ["gradient", "no gradient"])
@every_form
def test_autocast(form, mode, readout):
    module = made(form, SHAPES["tall"])
    x = normal(4, 16, dtype=torch.float32)
    with MODES[mode]():
        expected = module(x)
        with torch.autocast("cpu", torch.bfloat16):
            output = module(x)
        assert output.dtype == torch.bfloat16
        close(output.detach().float(), expected.detach(), 3e-2)
        close(module(x), expected, 1e-6)


# -- what happens to a module ------------------------------------------------------------------------


def _half(module: FactoredLinear) -> FactoredLinear:
    return module.to(torch.bfloat16)


def _changed_in_place(module: FactoredLinear) -> FactoredLinear:
    with torch.no_grad():
        module.first.weight.mul_(-2)
        module.second.weight.add_(0.5)
        module.second.bias.add_(1)
    return module


def _trained(module: FactoredLinear) -> FactoredLinear:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module.train()(normal(3, module.in_features, dtype=torch.float32)).square().sum().backward()
    optimizer.step()
    return module.eval()


def _changed_behind_autograd(module: FactoredLinear) -> FactoredLinear:
    module.train()
    module.second.weight.data.add_(0.5)  # leaves no mark on the tensor's version
    return module.eval()


def _stored_again(module: FactoredLinear) -> FactoredLinear:
    left, right = factors((module.out_features, module.in_features, module.rank), seed=7)
    assert module.store(left, right, normal(module.out_features, seed=11)) is None
    return module


def _loaded(module: FactoredLinear) -> FactoredLinear:
    other = made(module.form, (module.out_features, module.in_features, module.rank), seed=7)
    assert module.load_state_dict(other.state_dict()) == ([], [])
    close(module.to_dense(), other.to_dense(), 1e-7)
    return module


def _loaded_by_assignment(module: FactoredLinear) -> FactoredLinear:
    other = made(module.form, (module.out_features, module.in_features, module.rank), seed=7)
    module.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    return module


def _replaced_parameter(module: FactoredLinear) -> FactoredLinear:
    module.second.weight = nn.Parameter(module.second.weight.detach() * 3)
    return module


EVENTS = [
    _half,
    _changed_in_place,
    _trained,
    _changed_behind_autograd,
    _stored_again,
    _loaded,
    _loaded_by_assignment,
    _replaced_parameter,
    copy.deepcopy,
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__.strip("_"))
@every_form
def test_nothing_stale_is_left(form, event, readout):
    """The forward follows the stored tensors, whatever has filled its working memory before."""
    module = made(form, SHAPES["larger"])
    runs_as_its_dense_self(module)
    runs_as_its_dense_self(event(module))


@every_form
def test_deepcopy_is_apart(form):
    module = made(form, SHAPES["tall"])
    runs_as_its_dense_self(module)
    before = module.to_dense().detach().clone()
    _changed_in_place(copy.deepcopy(module))
    assert torch.equal(module.to_dense(), before)
    runs_as_its_dense_self(module)


@every_form
def test_model_made_in_inference_mode(form):
    with torch.inference_mode():
        module = made(form, SHAPES["tall"])
        x = normal(2, module.in_features, dtype=torch.float32)
        close(module(x), functional.linear(x, module.to_dense(), module.dense_bias()), 1e-5)


@every_form
def test_hooked_or_replaced_leaves_are_called(form):
    """Adapters and offloaders put themselves around the leaves: the fast paths must not go past them."""
    module = made(form, SHAPES["tall"])
    x = normal(2, module.in_features, dtype=torch.float32)
    with torch.no_grad():
        plain = module(x)
        for leaf in (module.first, module.second):
            handle = leaf.register_forward_hook(lambda _, args, output: output * 2)
            assert not torch.allclose(module(x), plain)
            handle.remove()
        close(module(x), plain, 1e-6)
        module.first = nn.Sequential(module.first)
        close(module(x), plain, 1e-6)


# -- the checkpoint ----------------------------------------------------------------------------------


@every_form
def test_guard_key_is_written_and_ignored(form):
    module = nn.ModuleDict({"proj": made(form, SHAPES["tall"])})
    state = module.state_dict()
    assert state["proj.weight"].numel() == 0
    other = nn.ModuleDict({"proj": made(form, SHAPES["tall"], seed=5)})
    assert other.load_state_dict(state) == ([], [])
    assert torch.equal(other["proj"].to_dense(), module["proj"].to_dense())
    # A dense weight under that key is no guard: it does not belong here and is reported.
    state["proj.weight"] = torch.zeros(24, 16)
    assert other.load_state_dict(state, strict=False).unexpected_keys == ["proj.weight"]
    # A dense module that meets the guard fails instead of keeping its random weight.
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        nn.Linear(16, 24).load_state_dict(module["proj"].state_dict(), strict=False)


@with_and_without_bias
@every_shape
@every_form
def test_size_is_what_is_stored(form, shape, with_bias):
    rows, columns, rank = shape
    for dtype in (torch.float32, torch.bfloat16):
        module = made(form, shape, dtype, with_bias)
        size = module.size(rows, columns, rank)
        tensors = module.state_dict().values()
        extra = rows if with_bias else 0
        assert sum(t.numel() for t in tensors) == size.parameters + extra
        assert sum(t.nbytes for t in tensors) == size.bytes(dtype) + extra * dtype.itemsize
        products = module.first.weight.numel() + module.second.weight.numel()
        assert size.multiply_adds == module.multiply_adds() == products


@every_form
def test_max_rank_is_the_last_that_saves(form):
    kind = FORMS[form]
    for rows, columns in ((24, 16), (16, 24), (40, 40), (64, 8), (2, 2), (1, 9)):
        ranks, dense = range(1, min(rows, columns) + 1), rows * columns
        saving = [rank for rank in ranks if kind.size(rows, columns, rank).parameters < dense]
        assert kind.max_rank(rows, columns) == max(saving, default=0)


@every_form
def test_spec_round_trip(form):
    for with_bias in (True, False):
        for source in ("linear", "conv1d"):
            module = made(form, SHAPES["wide"], with_bias=with_bias, source=source)
            again = build(module.spec())
            assert type(again) is type(module)
            assert again.spec() == module.spec()
            again.load_state_dict(module.state_dict())
            assert torch.equal(again.to_dense(), module.to_dense())
            assert "rank=5" in repr(again)


SPEC = {"form": "lowrank", "in_features": 8, "out_features": 6, "rank": 2, "bias": True, "source": "linear"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"form": "nuclear"}, "form 'nuclear'.*lowrank, pivoted"),
        ({"form": ["lowrank"]}, r"form \['lowrank'\]"),
        ({"form": None}, "form None"),
        ({"rank": None}, "rank must be a whole number, not None"),
        ({"rank": True}, "rank must be a whole number, not True"),
        ({"rank": 2.0}, "rank must be a whole number, not 2.0"),
        ({"in_features": "8"}, "in_features must be a whole number, not '8'"),
        ({"out_features": None}, "out_features must be a whole number"),
        ({"rank": 0}, r"rank 0 is outside 1\.\.6"),
        ({"rank": 7}, r"rank 7 is outside 1\.\.6 for a weight of 6 x 8"),
        ({"rank": -1}, r"rank -1 is outside"),
        ({"in_features": -8}, "is outside"),
        ({"source": "conv2d"}, "source 'conv2d'.*'linear' or 'conv1d'"),
    ],
)
def test_build_names_the_field_at_fault(change, named):
    with pytest.raises(UsageError, match=named):
        build({**SPEC, **change})


def test_build_needs_a_form():
    for spec in ({"rank": 3}, None, []):
        with pytest.raises(UsageError, match="names no form"):
            build(spec)
    with pytest.raises(UsageError, match="lowrank, pivoted"):
        form_named("dense")


# -- storing -----------------------------------------------------------------------------------------


def deficient(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    left, right = factors(shape)
    left[:, -1] = left[:, 0]
    return left, right


@with_and_without_bias
@pytest.mark.parametrize("source", ["linear", "conv1d"])
def test_pivoted_refuses_a_deficient_basis_and_falls_back(source, with_bias):
    rows, columns, rank = shape = (40, 30, 12)
    left, right = deficient(shape)
    bias = normal(rows, seed=3) if with_bias else None
    module = Pivoted(columns, rows, rank, with_bias)
    before = module.to_dense().detach().clone()
    assert "above its bound" in module.store(left, right, bias)
    assert torch.equal(module.to_dense(), before)  # nothing has been written
    site = Site("h.0.proj", source, rows, columns, with_bias)
    fallback, note = store_factors(site, "pivoted", rank, left, right, bias, torch.float64)
    assert note.startswith("h.0.proj: max|C| = inf")
    assert f"stored low-rank at rank {fallback.rank} instead of {rank}" in note
    assert (fallback.form, fallback.source) == ("lowrank", source)
    allowed = Pivoted.size(rows, columns, rank).parameters
    assert fallback.size(rows, columns, fallback.rank).parameters <= allowed
    assert fallback.size(rows, columns, fallback.rank + 1).parameters > allowed or fallback.rank == rank
    close(fallback.to_dense(), left[:, : fallback.rank] @ right[: fallback.rank], 1e-9)
    runs_as_its_dense_self(fallback)


@every_form
def test_zero_matrix_can_be_stored(form):
    site = Site("proj", "linear", 10, 8, True)
    module, note = store_factors(site, form, 3, torch.zeros(10, 3), torch.zeros(3, 8), normal(10), torch.float32)
    assert (note is None) == (form != "pivoted")
    assert not module.to_dense().any()
    close(module(torch.ones(2, 8)), normal(10).float().expand(2, -1), 1e-6)


@every_form
def test_overflow_is_refused_with_a_remedy(form):
    left, right = factors((10, 8, 3))
    module = FORMS[form](8, 10, 3).to(torch.float16)
    with pytest.raises(UsageError, match=r"does not fit torch\.float16.*--dtype"):
        module.store(left * 1e12, right, None)
    with pytest.raises(UsageError, match=r"bias.*does not fit torch\.float16"):
        module.store(left, right, torch.full((10,), 1e6))
    module.to(torch.bfloat16).store(left * 1e12, right, None)
    assert bool(module.to_dense().isfinite().all())


def test_low_rank_scales_are_balanced_before_the_cast():
    """Factors of 1e6 and 1e-6 multiply to an ordinary matrix, which half precision must hold."""
    left, right = factors((10, 8, 3))
    module = FORMS["lowrank"](8, 10, 3, False).to(torch.float16)
    module.store(left * 1e6, right * 1e-6, None)
    close(module.to_dense().double(), left @ right, 5e-3)


def test_folded_bias_is_as_exact_as_the_bias():
    """In bfloat16 the fold is computed from what was stored of C, not from C before rounding."""
    module = made("pivoted", (60, 50, 20), torch.bfloat16)
    bias = normal(60, seed=2, dtype=torch.bfloat16)
    close(module.dense_bias().detach().double(), bias.double(), 1.5e-2)
    runs_as_its_dense_self(module)


# -- reading the dense weight ------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["linear", "conv1d"])
@every_form
def test_weight_costs_nothing_until_its_values_are_read(form, source, monkeypatch):
    module = made(form, SHAPES["tall"], torch.bfloat16, source=source)
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
    expected = dense if source == "linear" else dense.mT
    assert torch.equal(weight, expected)
    assert torch.equal(module.weight.T, expected.T)
    assert torch.equal(module.weight[1:3], expected[1:3])
    assert torch.equal(module.weight.to(torch.float32), expected.float())
    assert torch.equal(module.weight.sum(), expected.sum())
    assert type(module.weight + 0) is Tensor


@pytest.mark.parametrize("source", ["linear", "conv1d"])
@every_form
def test_weight_works_where_models_use_it(form, source):
    module = made(form, SHAPES["tall"], source=source)
    x = normal(3, 16, dtype=torch.float32)
    weight = module.weight
    if source == "linear":
        ways = (functional.linear(x, weight, module.bias), x @ weight.mT + module.bias)
    else:
        ways = (torch.addmm(module.bias, x, weight), x @ weight + module.bias)
    for output in ways:
        close(output.detach(), module(x).detach(), 1e-5)
        module.zero_grad()
        output.sum().backward(retain_graph=True)
        assert float(module.first.weight.grad.abs().max()) > 0


@with_and_without_bias
@pytest.mark.parametrize("source", ["linear", "conv1d"])
@every_form
def test_dense_again(form, source, with_bias):
    model = nn.ModuleDict({"proj": made(form, SHAPES["tall"], source=source, with_bias=with_bias)})
    x = normal(3, 16, dtype=torch.float32)
    expected = model["proj"](x).detach()
    dense = to_dense_modules(model)["proj"]
    assert type(dense) is (Conv1D if source == "conv1d" else nn.Linear)
    close(dense(x).detach(), expected, 1e-5)
