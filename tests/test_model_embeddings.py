"""Factored token embeddings and the output heads tied to them: solved, stored, loaded, and made dense again."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import transformers
from architectures import BY_NAME, PAD, output
from safetensors import safe_open
from torch import Tensor, nn

import eckart
from eckart.compression.embedding_statistics import count_tokens
from eckart.errors import ModelError, UsageError
from eckart.forms import EMBEDDINGS, SafeEmbedding, TiedHead, build
from eckart.linalg import in_blocks, smoothed, table_factors, tied_factors
from eckart.model import find_embedding_tables

CASES = [
    ("llama", "safe"),
    ("llama-tied", "lowrank"),
    ("gpt2", "safe"),
    ("bert-mlm", "kronecker"),
    ("t5", "kronecker"),
    ("gemma3", "lowrank"),
]
TIED = {"llama-tied", "gpt2", "bert-mlm", "t5", "gemma3"}
FORMS = tuple(EMBEDDINGS)
AUTO = {"bert-mlm": "AutoModelForMaskedLM", "t5": "AutoModelForSeq2SeqLM"}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(rows: int = 60, width: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """A table, frequencies far from uniform, and the second moment of a head's inputs far from round."""
    table = (
        drawn(rows, width)
        @ torch.diag(torch.linspace(2, 0.2, width, dtype=torch.float64))
        @ drawn(width, width, seed=1)
    )
    lookups = smoothed((drawn(rows, seed=2) * 3).exp())
    hidden = drawn(200, width, seed=3) * torch.linspace(0.1, 3, width, dtype=torch.float64)
    return table, lookups, hidden.mT @ hidden / 200


def objective(table: Tensor, lookups: Tensor, inputs: Tensor, made: Tensor) -> float:
    """Both terms by their definition, each relative to the table's own, row by row."""

    def terms(error: Tensor) -> tuple[float, float]:
        lookup = sum(float(weight * row @ row) for weight, row in zip(lookups, error, strict=True))
        return lookup, sum(float(row @ inputs @ row) for row in error)

    (first, second), (all_first, all_second) = terms(table - made), terms(table)
    return first / all_first + second / all_second


# -- the solver ----------------------------------------------------------------------------------------


def test_table_weighted_by_frequencies_is_solved_exactly():
    table, lookups, _ = problem()
    made = table_factors(table, lookups, 5)
    root = lookups.sqrt()[:, None]
    values = torch.linalg.svdvals(root * table).square()
    assert made.lookup_error == pytest.approx(float(values[5:].sum() / values.sum()), rel=1e-9)
    plain = table_factors(table, torch.ones_like(lookups), 5)
    assert (root * (table - plain.left @ plain.right)).norm() > 1.05 * (root * (table - made.left @ made.right)).norm()
    assert table_factors(table, lookups, 16).lookup_error < 1e-20


def test_smoothing_adds_one():
    assert torch.equal(smoothed(torch.tensor([0, 3])), torch.tensor([0.2, 0.8], dtype=torch.float64))


def test_objective_of_a_tied_table_falls_and_is_reported_right():
    table, lookups, inputs = problem()
    made = tied_factors(table, lookups, inputs, 5)
    history = made.history
    assert len(history) > 2
    assert all(after < before for before, after in pairwise(history))
    alone = table_factors(table, lookups, 5)
    assert history[0] == pytest.approx(objective(table, lookups, inputs, alone.left @ alone.right), rel=1e-9)
    assert history[-1] == pytest.approx(objective(table, lookups, inputs, made.left @ made.right), rel=1e-9)
    assert history[-1] == pytest.approx(made.lookup_error + made.head_error, rel=1e-9)
    assert history[-1] < 0.95 * history[0]


def test_gradient_vanishes_at_the_tied_solution():
    """A fixed point of both exact steps: the gradient of (2) with respect to either factor vanishes."""
    table, lookups, inputs = problem(30, 8)
    made = tied_factors(table, lookups, inputs, 3)
    left, right = made.left.requires_grad_(), made.right.requires_grad_()
    error = table - left @ right
    first = (lookups[:, None] * error.square()).sum() / (lookups[:, None] * table.square()).sum()
    second = ((error @ inputs) * error).sum() / ((table @ inputs) * table).sum()
    gradients = torch.autograd.grad(first + second, (left, right))
    scales = [g.norm() * f.norm() for g, f in zip(gradients, (left, right), strict=True)]
    assert max(float(s) for s in scales) < 0.02 * float(first + second)
    better = [
        objective(table, lookups, inputs, (left + 1e-2 * drawn(30, 3, seed=s)) @ (right + 1e-2 * drawn(3, 8, seed=s)))
        for s in range(10, 30)
    ]
    assert min(better) > float(first + second)


def test_equal_row_weights_in_both_terms_give_the_exact_optimum():
    table, lookups, inputs = problem()
    made = tied_factors(table, lookups, inputs, 5, outputs=lookups)
    weight = ((lookups[:, None] * table.square()).sum() / (lookups[:, None] * (table @ inputs) * table).sum()).item()
    joint = torch.eye(16, dtype=torch.float64) + weight * inputs
    values = torch.linalg.svdvals(lookups.sqrt()[:, None] * table @ torch.linalg.cholesky(joint)).square()
    whole = (lookups[:, None] * table.square()).sum()
    assert made.history[-1] == pytest.approx(float(values[5:].sum() / whole), rel=1e-6)


@pytest.mark.parametrize("table", [torch.zeros(12, 4), drawn(12, 1) @ drawn(1, 4)])
def test_tables_of_rank_0_and_1_are_reproduced(table):
    made = tied_factors(table, torch.full((12,), 1 / 12), torch.eye(4, dtype=torch.float64), 3)
    assert torch.allclose(made.left @ made.right, table.to(made.left), atol=1e-6)


def test_kronecker_table_is_reproduced():
    codes, pattern = drawn(20, 6), drawn(1, 4, seed=1)
    table = torch.kron(codes, pattern)
    blocks, weights, mean = in_blocks(table, torch.full((20,), 0.05), torch.eye(24), 6)
    assert torch.equal(mean, torch.eye(4))
    made = table_factors(blocks, weights, 1)
    assert made.lookup_error < 1e-20
    module = EMBEDDINGS["kronecker"](20, 24, 4).double()
    module.store(made.left, made.right)
    assert torch.allclose(module.to_dense(), table)


# -- the forms -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [1.0, 3.5])
def test_lookup_returns_scaled_rows_of_the_table(form, scale):
    module = EMBEDDINGS[form](30, 8, 4 if form != "kronecker" else 2, padding_idx=1, scale=scale)
    blocks = module.blocks
    module.store(drawn(30 * blocks, module.rank), drawn(module.rank, 8 // blocks))
    ids = torch.tensor([[3, 1, 29], [0, 0, 2]])
    plain = EMBEDDINGS["lowrank"].to_dense(module)
    assert torch.allclose(module(ids), scale * plain[ids], atol=1e-6)
    assert module(ids).shape == (2, 3, 8)
    again = build(module.spec())
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(ids), module(ids))
    assert module.padding_idx == module.codes.padding_idx == 1
    assert module.weight.shape == (30, 8)
    assert (
        sum(p.numel() for p in module.parameters()) == type(module).size(30, 8, module.spec().get("rank", 2)).parameters
    )
    if form != "safe":
        assert torch.equal(module.weight[ids], module.to_dense()[ids])
        assert torch.allclose(module.dense()(ids), module(ids), atol=1e-6)


@pytest.mark.parametrize("blocks", [1, 4])
def test_tied_head_multiplies_with_the_table(blocks):
    head = TiedHead(8, 30, 3, blocks, bias=True)
    for parameter in head.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(3))
    x = drawn(2, 5, 8).float()
    assert torch.allclose(head(x), x @ head.to_dense().T + head.bias, atol=1e-5)
    assert torch.allclose(head.dense()(x), head(x), atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_of_safe_masks_later_tokens_and_padding(causal):
    module = SafeEmbedding(30, 8, 4, padding_idx=1, causal=causal)
    module.store(drawn(30, 4), drawn(4, 8))
    nn.init.normal_(module.out.weight, generator=torch.Generator().manual_seed(3))  # as if trained
    ids = torch.tensor([[5, 6, 7, 8]])

    def changed(*other: int) -> list[bool]:
        return (module(torch.tensor([other])) - module(ids)).abs().amax(-1)[0].gt(1e-6).tolist()

    assert changed(5, 6, 9, 8) == [not causal, not causal, True, True]
    with_padding = torch.tensor([[5, 6, 1, 1]])
    assert torch.allclose(module(with_padding)[:, :2], module(ids[:, :2]), atol=1e-6)
    assert torch.isfinite(module(torch.tensor([[1, 1, 5]]))).all()
    with pytest.raises(ModelError, match=r"not a table: .* --embeddings lowrank"):
        module.to_dense()


# -- whole models --------------------------------------------------------------------------------------


RELOAD = """
import sys, torch, transformers, eckart
for folder, auto in zip(sys.argv[1::2], sys.argv[2::2]):
    batch = torch.load(folder + "/batch.pt")
    for name in (auto, "AutoModel"):
        model = getattr(transformers, name).from_pretrained(folder).eval()
        with torch.no_grad():
            found = model(**batch)
        found = found.logits if name == auto else found.last_hidden_state
        torch.save(found, folder + "/" + name + ".pt")
"""


@pytest.fixture(scope="module")
def made():
    """Each model in each form, compressed once."""
    kept = {}

    def of(name: str, form: str):
        if (name, form) not in kept:
            architecture = BY_NAME[name]
            model = architecture.model()
            kept[name, form] = (
                model,
                eckart.compress(
                    model, data=architecture.batches(count=4), keep=0.8, method="drone", refit=False, embeddings=form
                ),
            )
        return kept[name, form]

    return of


@pytest.mark.parametrize(("name", "form"), CASES)
def test_loaded_model_computes_the_same_and_stores_ties_once(made, name, form, tmp_path):
    _, result = made(name, form)
    batch = BY_NAME[name].batches()[0]
    logits = output(result.model, batch)
    result.save_pretrained(tmp_path / "m")
    again = eckart.load(tmp_path / "m")
    assert torch.allclose(output(again, batch), logits, rtol=1e-5, atol=1e-5)
    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    after = result.report["sizes"]["model"]["after"]
    assert sum(tensor.nbytes for tensor in stored.values()) == after["bytes"]
    assert sum(tensor.numel() for tensor in stored.values()) == after["elements"]
    assert sum("codes" in key for key in stored) == 1  # what is tied is stored once
    (row,) = result.report["embeddings"]
    assert bool(row["heads"]) == (name in TIED)
    most = 0.5 * row["before"] + (2 if form == "kronecker" else 0)
    own = sum(t.numel() for key, t in stored.items() if key.rpartition(".")[0].startswith(f"{row['table']}."))
    assert row["after"] == own <= most
    assert result.report["kept"]["of_embeddings"] == row["after"] / row["before"]
    assert not {*row["modules"], *row["heads"]} & result.report["skipped"].keys()
    # The table is still what the head and the look-ups share, and it can be saved again.
    head, table = again.get_output_embeddings(), again.get_input_embeddings()
    assert (name in TIED) == (getattr(head, "codes", None) is not None and head.codes.weight is table.codes.weight)
    again.save_pretrained(tmp_path / "twice")
    again = eckart.load(tmp_path / "twice")
    assert torch.allclose(output(again, batch), logits, rtol=1e-5, atol=1e-5)
    if form != "safe":
        check_dense(name, again, batch, logits, tmp_path / "dense")


def check_dense(name, model, batch, logits, folder):
    dense = eckart.densify(model)
    assert torch.allclose(output(dense, batch), logits, rtol=1e-4, atol=1e-4)
    head = dense.get_output_embeddings()
    assert (head.weight is dense.get_input_embeddings().weight) == (name in TIED)
    dense.save_pretrained(folder)
    plain = getattr(transformers, type(dense).__name__).from_pretrained(folder).eval()
    assert torch.allclose(output(plain, batch), logits, rtol=1e-4, atol=1e-4)
    assert not any("codes" in key for key in plain.state_dict())


def test_fresh_process_loads_the_model_and_its_body(made, tmp_path, server):
    chosen = [("t5", "kronecker"), ("gemma3", "lowrank"), ("gpt2", "safe")]
    words = []
    for name, form in chosen:
        _, result = made(name, form)
        result.save_pretrained(tmp_path / name)
        torch.save(BY_NAME[name].batches()[0], tmp_path / name / "batch.pt")
        words += [str(tmp_path / name), AUTO.get(name, "AutoModelForCausalLM")]
    server.run_code(RELOAD, *words)
    for (name, form), auto in zip(chosen, words[1::2], strict=True):
        _, result = made(name, form)
        batch = BY_NAME[name].batches()[0]
        logits, hidden = (torch.load(tmp_path / name / f"{kind}.pt") for kind in (auto, "AutoModel"))
        assert torch.allclose(logits, output(result.model, batch), rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            whole = result.model(**batch, output_hidden_states=True)
        # The outputs of the last layer are all that a model without its head returns.
        states = whole.decoder_hidden_states if name == "t5" else whole.hidden_states
        assert torch.allclose(hidden, states[-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["bert-mlm", "gemma3"])
def test_full_rank_changes_nothing(name):
    """At the rank of the table both readers of it are what they were, scale and bias included."""
    architecture = BY_NAME[name]
    model = architecture.model()
    table = model.get_input_embeddings().weight
    with torch.no_grad():  # of rank 8, in place, so that it stays tied
        left, scale, right = torch.linalg.svd(table)
        table.copy_(left[:, :8] * scale[:8] @ right[:8])
    model.eval()
    result = eckart.compress(
        model, data=architecture.batches(count=3), keep=1.0, method="svd", embeddings="lowrank", embeddings_keep=0.5
    )
    batch = architecture.batches()[0]
    assert torch.allclose(output(result.model, batch), output(model, batch), rtol=1e-3, atol=1e-3)
    assert result.report["embeddings"][0]["rank"] >= 8


def test_safe_is_low_rank_until_it_is_trained_and_is_not_made_dense(made):
    _, safe = made("gpt2", "safe")
    batch = BY_NAME["gpt2"].batches()[0]
    rank = safe.report["embeddings"][0]["rank"]
    table = safe.model.get_input_embeddings()
    plain = EMBEDDINGS["lowrank"](table.num_embeddings, table.embedding_dim, rank)
    plain.codes.weight, plain.expand.weight = table.codes.weight, table.expand.weight
    assert torch.equal(table(batch["input_ids"]), plain(batch["input_ids"]))
    before = set(safe.model.state_dict())
    with pytest.raises(ModelError, match=r"transformer\.wte: .* cannot be made dense"):
        eckart.densify(safe.model)
    assert set(safe.model.state_dict()) == before
    assert safe.model.config.use_cache is False
    assert any("eckart tune" in note for note in safe.report["notes"])


def test_embedding_and_tied_head_get_one_gradient(made):
    model, result = made("llama-tied", "lowrank")
    ids = BY_NAME["llama-tied"].batches()[0]["input_ids"]
    before = model.model.embed_tokens.weight.clone()
    result.model(ids, labels=ids).loss.backward()
    gradient = result.model.model.embed_tokens.codes.weight.grad
    assert gradient is result.model.lm_head.codes.weight.grad
    assert bool(gradient.any())
    result.model.zero_grad()
    assert torch.equal(model.model.embed_tokens.weight, before)


# -- what is found, counted and refused ----------------------------------------------------------------


def test_tables_include_tied_heads_and_exclude_positions_and_types():
    found = find_embedding_tables(BY_NAME["bert-mlm"].model())
    assert [(t.embeddings, t.output_heads) for t in found.chosen] == [
        (("bert.embeddings.word_embeddings",), ("cls.predictions.decoder",))
    ]
    assert set(found.skipped) == {"bert.embeddings.position_embeddings", "bert.embeddings.token_type_embeddings"}
    assert all("positions" in reason for reason in found.skipped.values())
    (table,) = find_embedding_tables(BY_NAME["t5"].model()).chosen
    assert set(table.modules) == {"shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"}
    (table,) = find_embedding_tables(BY_NAME["gemma3"].model()).chosen
    assert list(table.scales.values()) == [pytest.approx(32**0.5, rel=1e-6)]
    assert not find_embedding_tables(BY_NAME["vit"].model()).chosen
    assert not find_embedding_tables(BY_NAME["gpt2"].model(), ["wte"]).chosen


class Shifted(nn.Embedding):
    """Does more than scale its rows."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def test_embedding_that_is_no_table_is_skipped_with_a_reason(tmp_path):
    model = BY_NAME["llama"].model()
    old = model.model.embed_tokens
    model.model.embed_tokens = Shifted(*old.weight.shape, padding_idx=old.padding_idx)
    result = eckart.compress(model, method="svd", keep=0.8, embeddings="lowrank")
    assert "something else than rows times a number" in result.report["skipped"]["model.embed_tokens"]
    assert result.report["embeddings"] == []
    assert any("no token embedding to factor" in note for note in result.report["notes"])


def test_token_counts_leave_out_padding_and_include_both_sides():
    architecture = BY_NAME["t5"]
    model, batches = architecture.model(), architecture.batches(count=2)
    (table,) = find_embedding_tables(model).chosen
    from eckart.data import load_data

    data = load_data(batches, tokenizer=None, model=model)
    counts = count_tokens(model, table, data)
    expected = torch.zeros(table.shape[0], dtype=torch.float64)
    for batch in batches:
        for side in ("", "decoder_"):
            for row, mask in zip(batch[f"{side}input_ids"], batch[f"{side}attention_mask"], strict=True):
                for token, real in zip(row.tolist(), mask.tolist(), strict=True):
                    expected[token] += real
    assert torch.equal(counts, expected)
    assert counts[PAD] == 0


def test_without_data_all_tokens_have_equal_weight():
    model = BY_NAME["llama-tied"].model()
    result = eckart.compress(model, method="svd", keep=0.8, embeddings="lowrank")
    assert any("every token counts the same" in note for note in result.report["notes"])
    (row,) = result.report["embeddings"]
    assert row["solution"] == "exact"
    values = torch.linalg.svdvals(model.model.embed_tokens.weight.double()).square()
    assert row["lookup_error"] == pytest.approx(float(values[row["rank"] :].sum() / values.sum()), rel=1e-5)


def test_budget_of_the_whole_model_counts_the_factored_embedding():
    architecture = BY_NAME["gpt2"]
    model, options = architecture.model(), {"keep": 0.75, "keep_of": "model", "method": "drone", "refit": False}
    plain = eckart.compress(model, data=architecture.batches(count=3), **options)
    small = eckart.compress(model, data=architecture.batches(count=3), embeddings="lowrank", **options)
    for result in (plain, small):
        assert 0.68 < result.report["kept"]["of_model"] <= 0.75
    assert small.report["kept"]["of_sites"] > plain.report["kept"]["of_sites"] + 0.02


def test_sizes_and_specs_that_cannot_be_are_refused():
    model = BY_NAME["llama-tied"].model()
    with pytest.raises(UsageError, match=r"--embeddings-keep 0\.001: model\.embed_tokens is 96 x 32, .* 0\.0417"):
        eckart.compress(model, method="svd", embeddings="lowrank", embeddings_keep=0.001)
    result = eckart.compress(model, method="svd", keep=0.8, embeddings="lowrank", embeddings_keep=0.0417)
    assert result.report["embeddings"][0]["rank"] == 1
    with pytest.raises(TypeError, match="not an instance of"):
        result.model.resize_token_embeddings(100)
    with pytest.raises(UsageError, match="padding_idx must be"):
        build({**result.model.get_input_embeddings().spec(), "padding_idx": "one"})
    with pytest.raises(UsageError, match="scale must be"):
        build({**result.model.get_input_embeddings().spec(), "scale": None})
    with pytest.raises(UsageError, match="does not divide"):
        EMBEDDINGS["kronecker"](30, 8, 3)
