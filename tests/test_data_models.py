"""Tiny tokenizers and random models that the tests of data and measure share, and what is told of them."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tokenizers import decoders as token_decoders
from transformers import (
    AutoModel,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MambaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    ViTConfig,
)

from eckart.data import max_positions, model_kind
from eckart.data.model_kind import pad_token, sequence_length

WORDS = """the a cat dog sat ran on mat road big small red and then it was good bad film . one two three four""".split()  # noqa: SIM905


def byte_tokenizer(*, bos: bool = False, template: str | None = None) -> PreTrainedTokenizerFast:
    """A token a byte: <s> 0, </s> 1, <pad> 2, then the 256 bytes. With `bos`, a text starts with <s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: place for place, token in enumerate(["<s>", "</s>", "<pad>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = token_decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=int(1e30)
    )
    fast.chat_template = template
    return fast


def word_tokenizer(*, limit: int = 512) -> PreTrainedTokenizerFast:
    """A token a word, [CLS] A [SEP] B [SEP]; with padding and truncation left in its file, as MiniLM has them."""
    vocabulary = {token: place for place, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_padding(length=16, pad_id=0, pad_token="[PAD]")
    tokenizer.enable_truncation(4)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=limit,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def target_tokenizer() -> PreTrainedTokenizerFast:
    """A token a word, A </s>: what T5 reads."""
    vocabulary = {token: place for place, token in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=int(1e30)
    )


def build(cls: type, config: object, seed: int = 0) -> PreTrainedModel:
    """A model with random weights, the global random state left alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cls(config)


def llama_config(**more: object) -> LlamaConfig:
    settings: dict = {
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    return LlamaConfig(**(settings | more))


def llama(seed: int = 0, **more: object) -> LlamaForCausalLM:
    return build(LlamaForCausalLM, llama_config(**more), seed)


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=259, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1, pad_token_id=2
    )
    return build(GPT2LMHeadModel, config, seed)


def bert_config(**more: object) -> BertConfig:
    return BertConfig(
        vocab_size=4 + len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,
        **more,
    )


def t5(seed: int = 0) -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=3 + len(WORDS),
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return build(T5ForConditionalGeneration, config, seed)


def bart(seed: int = 0) -> BartForConditionalGeneration:
    config = BartConfig(
        vocab_size=3 + len(WORDS),
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=40,
        decoder_start_token_id=1,
        forced_eos_token_id=None,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=1,
    )
    return build(BartForConditionalGeneration, config, seed)


ROBERTA = RobertaConfig(
    vocab_size=60,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    max_position_embeddings=34,
    pad_token_id=1,
)


@pytest.mark.parametrize(
    ("config", "kind", "positions"),
    [
        (llama_config(), "causal", 64),
        (GPT2Config(n_positions=48), "causal", 48),
        (MambaConfig(), "causal", None),
        (bert_config(), "encoder", 32),
        (ROBERTA, "encoder", 32),
        (ViTConfig(), "encoder", None),
        (T5Config(), "encoder-decoder", None),
        (BartConfig(max_position_embeddings=40), "encoder-decoder", 40),
        (LlamaConfig(architectures=["LlamaForSequenceClassification"]), "encoder", 2048),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_kind_and_positions_from_a_configuration(config, kind, positions):
    assert model_kind(config) == kind
    assert max_positions(config) == positions


@pytest.mark.parametrize(
    ("cls", "config", "kind"),
    [
        (LlamaModel, llama_config(), "causal"),
        (LlamaForSequenceClassification, llama_config(), "encoder"),
        (BertModel, bert_config(), "encoder"),
        (BertForMaskedLM, bert_config(), "encoder"),
        (BertForSequenceClassification, bert_config(), "encoder"),
        (T5EncoderModel, T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2), "encoder"),
    ],
)
def test_kind_from_a_model(cls, config, kind):
    model = build(cls, config)
    assert model_kind(model.config, model) == kind


def test_roberta_positions_are_really_that_many():
    model = build(RobertaModel, ROBERTA)
    most = max_positions(model.config, model)
    ids = torch.full((1, most), 5)
    assert model(input_ids=ids).last_hidden_state.shape[1] == most
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, most + 1), 5))


def test_sequence_length_minds_every_limit(caplog):
    model = build(RobertaModel, ROBERTA)
    endless = byte_tokenizer()
    settle = {"tokenizer": endless, "config": model.config, "model": model}
    assert sequence_length(None, 512, **settle) == 32
    assert sequence_length(16, 512, **settle) == 16
    assert sequence_length(100, 512, **settle) == 32
    assert "100" in caplog.text
    assert sequence_length(None, 512, tokenizer=word_tokenizer(limit=20), config=T5Config()) == 20
    assert sequence_length(100, 512, tokenizer=word_tokenizer(limit=20), config=T5Config()) == 100
    assert sequence_length(None, 512, tokenizer=endless, config=T5Config()) == 512


def test_padding_token_is_the_models():
    assert pad_token(byte_tokenizer(), llama_config(pad_token_id=7)) == 7
    assert pad_token(byte_tokenizer(), llama_config(pad_token_id=None)) == 2
    assert pad_token(None, None) == 0


def test_backbone_of_the_meta_device_leaves_nothing_behind():
    assert max_positions(ROBERTA) == 32
    assert next(AutoModel.from_config(ROBERTA).parameters()).device.type == "cpu"
