"""Forms by name: built from a file's description, registered, and a form of one's own in a whole run."""

import pytest
import torch
from architectures import BY_NAME, output
from own_form import ScaledLowRank

import eckart
from eckart.errors import UsageError
from eckart.forms import (
    EMBEDDINGS,
    FORMS,
    OTHER_FORMS,
    KroneckerEmbedding,
    LowRank,
    LowRankEmbedding,
    build,
    embedding_named,
    form_name,
    form_named,
    register_form,
)
from eckart.model import factored_modules

SPEC = {"form": "lowrank", "in_features": 8, "out_features": 6, "rank": 2, "bias": True, "source": "linear"}
BLOCKS = {"form": "kronecker", "in_features": 18, "out_features": 24, "rank": 2, "block_out": 4, "block_in": 6}
SPARSE = {"form": "lowrank-sparse", "in_features": 8, "out_features": 10, "rank": 3, "rows": 4}


@pytest.fixture(autouse=True)
def registries_stay_as_they_are():
    before = [dict(registry._added) for registry in (FORMS, EMBEDDINGS)]
    yield
    for registry, added in zip((FORMS, EMBEDDINGS), before, strict=True):
        registry._added.clear()
        registry._added.update(added)


@pytest.mark.parametrize(
    ("spec", "change", "named"),
    [
        (SPEC, {"form": "nuclear"}, "form 'nuclear'.*lowrank, pivoted.*eckart.register_form"),
        (SPEC, {"form": ["lowrank"]}, r"form \['lowrank'\]"),
        (SPEC, {"form": None}, "form None"),
        (SPEC, {"rank": None}, "rank must be a whole number, not None"),
        (SPEC, {"rank": True}, "rank must be a whole number, not True"),
        (SPEC, {"rank": 2.0}, "rank must be a whole number, not 2.0"),
        (SPEC, {"in_features": "8"}, "in_features must be a whole number, not '8'"),
        (SPEC, {"rank": 7}, r"rank 7 is outside 1\.\.6 for a weight of 6 x 8"),
        (SPEC, {"in_features": -8}, "is outside"),
        (SPEC, {"source": "conv2d"}, "source 'conv2d'.*'linear' or 'conv1d'"),
        (BLOCKS, {"block_out": None}, "block_out must be a whole number"),
        (BLOCKS, {"block_out": 5}, r"blocks of 5 x 6 do not divide a weight of 24 x 18"),
        (BLOCKS, {"block_in": 0}, r"blocks of 4 x 0 do not divide"),
        (BLOCKS, {"rank": 19}, r"rank 19 is outside 1\.\.18 for a weight of 24 x 18"),
        (SPARSE, {"rows": None}, "rows must be a whole number"),
        (SPARSE, {"rows": 11}, r"11 sparse rows are outside 1\.\.10"),
        (SPARSE, {"rows": 0}, r"0 sparse rows are outside 1\.\.10"),
    ],
)
def test_build_names_the_field_at_fault(spec, change, named):
    assert build(spec).rank == spec["rank"]
    with pytest.raises(UsageError, match=named):
        build({**spec, **change})


def test_build_needs_a_form():
    for spec in ({"rank": 3}, None, []):
        with pytest.raises(UsageError, match="names no form"):
            build(spec)
    with pytest.raises(UsageError, match="lowrank, pivoted"):
        form_named("dense")


def test_names_are_those_of_the_registries():
    for registry in (FORMS, EMBEDDINGS):
        for name, form in registry.items():
            assert form_name(form) == name == register_form(form)
    assert embedding_named(KroneckerEmbedding) is embedding_named("kronecker") is KroneckerEmbedding
    assert all(form.form == name for name, form in OTHER_FORMS.items())


def test_register_form_refuses_what_is_no_form_and_names_that_are_taken():
    for wrong in (torch.nn.Linear, "lowrank", None, OTHER_FORMS["tied-head"]):
        with pytest.raises(UsageError, match="not a form; pass a name or a class that derives from"):
            register_form(wrong)
    for name, named in (
        ("lowrank", "'lowrank'"),
        ("dense", "has no name"),
        ("", "has no name"),
        ("tied-head", "another form has this name"),
        ("lowrank-embedding", "another form has this name"),
    ):
        with pytest.raises(UsageError, match=named):
            register_form(type("Mine", (LowRank,), {"form": name}))
    with pytest.raises(UsageError, match="'lowrank'"):
        register_form(type("Mine", (LowRankEmbedding,), {"form": "lowrank-embedding"}))
    assert not FORMS._added
    first, again = (type("Mine", (LowRank,), {"form": "mine"}) for _ in range(2))
    assert form_named(first) is first
    assert form_named(again) is form_named("mine") is again  # a notebook's cell that is run again


def test_a_form_of_ones_own_is_compressed_saved_loaded_and_made_dense(tmp_path):
    architecture = BY_NAME["gpt2"]
    model, batches = architecture.model(), architecture.batches(count=3)
    options = {"method": "kfac", "allocation": "loss", "refit": True, "keep": 0.6}
    result = eckart.compress(model, data=batches, form=ScaledLowRank, **options)
    name = ScaledLowRank.form
    chosen = {site: choice for site, choice in result.plan.choices.items() if choice.form == name}
    assert chosen
    assert result.report["kept"]["of_sites"] <= 0.6
    modules = factored_modules(result.model)
    assert all(type(modules[site]) is ScaledLowRank for site in chosen)
    expected = output(result.model, batches[0])
    result.save_pretrained(tmp_path / "small")
    again = eckart.load(tmp_path / "small")
    assert torch.equal(output(again, batches[0]), expected)
    FORMS._added.pop(name)
    with pytest.raises(eckart.EckartError, match=r"form 'scaled-lowrank' is not known.*call eckart\.register_form"):
        eckart.load(tmp_path / "small")
    dense = eckart.densify(again)
    assert not factored_modules(dense)
    assert float((output(dense, batches[0]) - expected).abs().max()) < 1e-4


class OwnEmbedding(LowRankEmbedding):
    """Codes of four numbers at most."""

    form = "short-embedding"

    @classmethod
    def largest(cls, rows, width, keep):
        return min(4, super().largest(rows, width, keep))


def test_an_embedding_of_ones_own_is_compressed_saved_and_loaded(tmp_path):
    architecture = BY_NAME["gpt2"]
    model, batches = architecture.model(), architecture.batches(count=2)
    result = eckart.compress(model, method="svd", embeddings=OwnEmbedding, keep=0.8)
    found = [m for m in factored_modules(result.model).values() if isinstance(m, OwnEmbedding)]
    assert [module.rank for module in found] == [4]
    assert result.recipe.embeddings == "short"
    result.save_pretrained(tmp_path / "small")
    again = eckart.load(tmp_path / "small")
    assert torch.equal(output(again, batches[0]), output(result.model, batches[0]))
