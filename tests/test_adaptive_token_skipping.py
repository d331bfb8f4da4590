"""Tokens that leave between blocks: the same row by row as alone, whatever the padding, and nothing where all stay."""

from __future__ import annotations

import copy

import pytest
import torch
from adaptive_models import LENGTHS, blocks_of, classifier, texts, with_exits
from transformers import BertConfig, BertModel

from eckart.adaptive import attach, behaviors_of, detach
from eckart.adaptive.token_skipping import TokenSkipping, attention_in, choose_tokens, hidden_change, staying
from eckart.errors import ModelError, UsageError

ATTENTION = {"Bert": "attention.self", "DistilBert": "attention", "ModernBert": "attn", "MPNet": "change",
             "Albert": "albert_layers.0.attention"}  # fmt: skip
HALF = ("power-bert", (0.7, 0.4, 0.4))
ABOVE = ("ltp", (0.7, 0.9, 1.0))


def skipping(kind="Bert", rule=HALF, **options):
    model = classifier(kind, **options)
    attach(model, TokenSkipping(*rule, ATTENTION[kind]), blocks_of(model))
    return model


def alone(model, lengths=LENGTHS):
    given = texts(lengths)
    return torch.cat([model(given["input_ids"][i : i + 1, :n]).logits for i, n in enumerate(lengths)])


@pytest.mark.parametrize("kind", list(ATTENTION))
@pytest.mark.parametrize("rule", [HALF, ABOVE], ids=["power-bert", "ltp"])
def test_rows_of_a_batch_get_what_each_gets_alone_whatever_the_padding(kind, rule):
    model = skipping(kind, rule)
    together = model(**texts()).logits
    torch.testing.assert_close(together, alone(model), atol=2e-6, rtol=1e-4)
    torch.testing.assert_close(model(**texts(extra=4)).logits, together, atol=2e-6, rtol=1e-4)
    # Rows of one length have no mask at all, and may keep different numbers of tokens.
    equal = texts((6, 6, 6))
    torch.testing.assert_close(model(equal["input_ids"]).logits, alone(model, (6, 6, 6)), atol=2e-6, rtol=1e-4)
    detach(model)
    assert not torch.allclose(model(**texts()).logits, together, atol=1e-3)


@pytest.mark.parametrize("kind", list(ATTENTION))
@pytest.mark.parametrize("rule", [("power-bert", (1, 1, 1)), ("ltp", (0, 0, 0))], ids=["power-bert", "ltp"])
def test_keeping_everything_gives_the_models_own_numbers(kind, rule):
    model = classifier(kind, attention="eager")
    expected, padded = model(**texts()).logits, model(**texts(extra=3)).logits
    attach(model, TokenSkipping(*rule, ATTENTION[kind]), blocks_of(model))
    assert torch.equal(model(**texts()).logits, expected)
    torch.testing.assert_close(model(**texts(extra=3)).logits, padded, atol=1e-6, rtol=1e-5)  # padding goes


def test_blocks_read_so_many_tokens_of_each_row():
    model = skipping()
    counts = []
    own = TokenSkipping.before_block

    class Counting(TokenSkipping):
        def before_block(self, walk, args, kwargs):
            counts.append((walk.real.sum(1).tolist(), args[0].shape[1]))
            return own(self, walk, args, kwargs)

    attach(model, Counting(*HALF, ATTENTION["Bert"]), blocks_of(model))
    model(**texts(extra=2))
    rounded = [[max(1, int(n * fraction + 0.5)) for n in LENGTHS] for fraction in (1, 0.7, 0.4, 0.4)]
    assert [each for each, _ in counts] == rounded
    # What is computed is as wide as the longest row; the first block alone reads the padding.
    assert [width for _, width in counts] == [max(LENGTHS) + 2, *(max(each) for each in rounded[1:])]


def test_the_least_looked_at_leave_and_keep_their_state():
    model = classifier(layers=2, attention="eager")
    whole = model.bert(**texts((6,)), output_attentions=True, output_hidden_states=True)
    received = whole.attentions[0].sum((1, 2))[0]
    attach(model, TokenSkipping("power-bert", (0.5,), ATTENTION["Bert"]), blocks_of(model))
    states = []
    model.bert.encoder.register_forward_hook(lambda _, args, output: states.append(output[0]))
    model(**texts((6,)))
    rest = sorted(range(1, 6), key=lambda token: -received[token])
    stay = [0, *rest[:2]]
    for token in range(6):
        same = torch.allclose(states[0][0, token], whole.hidden_states[1][0, token], atol=1e-5)
        assert same == (token not in stay)


def test_the_first_and_the_last_real_token_can_be_told_to_stay():
    real = torch.tensor([[False, True, True, True], [True, True, False, False]])
    assert staying(real, ("first",)).tolist() == [[False, True, False, False], [True, False, False, False]]
    assert staying(real, ("last",)).tolist() == [[False, False, False, True], [False, True, False, False]]
    assert not staying(torch.zeros(1, 3, dtype=torch.bool), ("first", "last")).any()
    scores, lengths = torch.tensor([[9.0, 0.1, 0.5, 0.2]] * 2), real.sum(1)
    kept = choose_tokens("power-bert", 0.0, scores, real, lengths, ("first", "last"))
    assert kept.tolist() == [[False, True, False, True], [True, True, False, False]]
    assert choose_tokens("ltp", 50.0, scores, real, lengths, ("last",)).sum(1).tolist() == [1, 1]


def test_outputs_of_tokens_keep_their_places():
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    model = BertModel(BertConfig(**sizes, num_hidden_layers=3, max_position_embeddings=24)).eval().requires_grad_(False)
    attach(model, TokenSkipping("power-bert", (0.6, 0.4), ATTENTION["Bert"]), blocks_of(model))
    output = model(**texts(extra=2))
    assert output.last_hidden_state.shape == (len(LENGTHS), max(LENGTHS) + 2, 16)
    assert model(**texts(extra=2), return_dict=False)[0].shape == output.last_hidden_state.shape
    for row, length in enumerate(LENGTHS):
        single = model(texts()["input_ids"][row : row + 1, :length]).last_hidden_state
        torch.testing.assert_close(output.last_hidden_state[row, :length], single[0], atol=2e-6, rtol=1e-4)


def test_a_call_can_ask_for_all_tokens():
    model = skipping()
    skipped = model(**texts()).logits
    whole = model(**texts(), skip_tokens=False).logits
    assert not torch.allclose(skipped, whole, atol=1e-3)
    assert torch.equal(model(**texts()).logits, skipped)
    detach(model)
    torch.testing.assert_close(model(**texts()).logits, whole, atol=1e-6, rtol=1e-5)  # not eager any more


def test_attention_is_eager_while_tokens_are_skipped_and_copies_stand_alone():
    model = skipping()
    assert model.config._attn_implementation == "eager"
    copied = copy.deepcopy(model)
    expected = model(**texts()).logits
    detach(model)
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(copied(**texts()).logits, expected)
    attach(copied, TokenSkipping(*ABOVE, ATTENTION["Bert"]), blocks_of(copied))  # another in its place
    assert len(copied.get_submodule(f"bert.encoder.layer.0.{ATTENTION['Bert']}")._forward_hooks) == 1
    assert not torch.allclose(copied(**texts()).logits, expected, atol=1e-4)


def test_specs_come_back_and_what_cannot_be_is_refused():
    for rule in (HALF, ABOVE):
        behavior = TokenSkipping(*rule, "attn", ("first", "last"))
        assert vars(TokenSkipping.from_spec(behavior.spec())) == vars(behavior)
        assert "blocks" in behavior.in_words(4)
    for given, named in (
        (("nothing", (0.5,)), "rule: 'nothing' is not one of power-bert, ltp"),
        (("power-bert", (1.5,)), r"fractions: \[1.5\] are not all in \[0, 1\]"),
        (("ltp", (-1.0,)), "thresholds"),
        (("ltp", (1.0,), "attn", ("middle",)), "stays"),
    ):
        with pytest.raises(UsageError, match=named):
            TokenSkipping(*given)
    model = classifier()
    with pytest.raises(ModelError, match="it says what stays after 2 blocks, and 3 have others after them"):
        attach(model, TokenSkipping("power-bert", (0.5, 0.5), ATTENTION["Bert"]), blocks_of(model))


def test_maps_are_found_among_what_attention_returns_and_the_stand_in_is_a_norm():
    maps = torch.rand(2, 3, 5, 5)
    assert attention_in((torch.zeros(2, 5, 4), maps)) is maps
    assert attention_in((torch.zeros(2, 5, 4), maps), tokens=6) is None
    assert attention_in((torch.zeros(2, 5, 4), None)) is None
    assert attention_in(maps) is None
    read = torch.zeros(1, 2, 2)
    assert hidden_change(read, torch.tensor([[[3.0, 4.0], [0.0, 1.0]]])).tolist() == [[5, 1]]


@pytest.mark.parametrize("rule", [HALF, ABOVE], ids=["power-bert", "ltp"])
def test_rows_leave_early_while_tokens_leave(rule):
    model = with_exits(skipping(rule=rule), threshold=0.5)
    together = model(**texts())
    assert len(set(together.exit_blocks.tolist())) > 1
    single = [model(texts()["input_ids"][i : i + 1, :n]) for i, n in enumerate(LENGTHS)]
    assert together.exit_blocks.tolist() == [int(one.exit_blocks) for one in single]
    torch.testing.assert_close(together.logits, torch.cat([one.logits for one in single]), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(model(**texts(extra=3)).logits, together.logits, atol=2e-5, rtol=1e-4)
    detach(model, "token-skipping")
    assert list(behaviors_of(model)) == ["early-exit"]
    assert model.config._attn_implementation == "sdpa"
    assert not torch.allclose(model(**texts()).logits, together.logits, atol=1e-3)
