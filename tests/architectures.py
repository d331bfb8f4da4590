"""A zoo of tiny randomly drawn models, with model-ready batches: every family of transformers we claim to handle.

No tokenizer, no download: each model has a few thousand numbers, weights large enough that outputs differ from
token to token, and seeded batches (padded where the model reads padded texts).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

VOCABULARY = 96
ROWS = 4
BATCHES = 3
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Architecture:
    """One model of the matrix.

    Attributes:
        name: of the test.
        class_name: of the model, in transformers.
        config_name: of its configuration.
        options: of the configuration.
        auto: the Auto class that loads it.
        data: "text" (padded), "causal" (not padded), "pair" (encoder-decoder, both sides padded), "image".
        padding: "right" or "left".
    """

    name: str
    class_name: str
    config_name: str
    options: dict[str, Any]
    auto: str
    data: str = "causal"
    padding: str = "right"

    def model(self, **more: Any) -> PreTrainedModel:
        """The model, drawn anew with the same numbers each time, in evaluation mode."""
        torch.manual_seed(1)
        config = getattr(transformers, self.config_name)(**{**self.options, **more})
        return scaled(getattr(transformers, self.class_name)(config)).eval()

    def batches(self, rows: int = ROWS, count: int = BATCHES, seed: int = 0) -> list[Inputs]:
        """`count` batches of `rows` rows each."""
        stream = torch.Generator().manual_seed(seed)
        return [DATA[self.data](stream, rows, self.padding) for _ in range(count)]


def scaled(model: PreTrainedModel, spread: float = 0.15) -> PreTrainedModel:
    """Draw weights with an output of about the input's size, biases that are not zero."""
    stream = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "A_log" not in name:
                parameter.normal_(0, 0.5 if "embed" in name or "wte" in name else spread, generator=stream)
            elif name.endswith("bias"):
                parameter.add_(torch.randn(parameter.shape, generator=stream) * 0.1)
    return model


def output(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    """The logits of a model with a head, else its last hidden state, padding included."""
    with torch.no_grad():
        made = model(**{k: v for k, v in inputs.items() if k != "labels"})
    return made.logits if getattr(made, "logits", None) is not None else made.last_hidden_state


def _mask(stream: torch.Generator, rows: int, length: int, padding: str) -> Tensor:
    """Rows of different lengths, the first one full."""
    lengths = torch.randint(3, length, (rows,), generator=stream)
    lengths[0] = length
    mask = (torch.arange(length)[None] < lengths[:, None]).long()
    return mask.flip(1) if padding == "left" else mask


def _ids(stream: torch.Generator, rows: int, length: int) -> Tensor:
    return torch.randint(4, VOCABULARY, (rows, length), generator=stream)


def _text(stream: torch.Generator, rows: int, padding: str) -> Inputs:
    mask = _mask(stream, rows, 12, padding)
    return {"input_ids": _ids(stream, rows, 12) * mask + PAD * (1 - mask), "attention_mask": mask}


def _causal(stream: torch.Generator, rows: int, padding: str) -> Inputs:
    return {"input_ids": _ids(stream, rows, 12)}


def _pair(stream: torch.Generator, rows: int, padding: str) -> Inputs:
    source = _text(stream, rows, padding)
    mask = _mask(stream, rows, 7, padding)
    ids = _ids(stream, rows, 7) * mask + PAD * (1 - mask)
    return {**source, "decoder_input_ids": ids, "decoder_attention_mask": mask}


def _image(stream: torch.Generator, rows: int, padding: str) -> Inputs:
    return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=stream)}


PAD = 1
DATA: dict[str, Callable[[torch.Generator, int, str], Inputs]] = {
    "text": _text,
    "causal": _causal,
    "pair": _pair,
    "image": _image,
}

_TOKENS: dict[str, Any] = {"pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": 3}
_BODY: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_BERT = {**_BODY, "intermediate_size": 48, "max_position_embeddings": 40, "pad_token_id": PAD}
_LLAMA = {
    **_BODY,
    **_TOKENS,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
_MOE = {**_LLAMA, "num_experts_per_tok": 2}
_MASKED, _CLASSES, _CAUSAL = (
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForCausalLM",
)


def _encoder(name: str, family: str, head: str, auto: str, **options: Any) -> Architecture:
    return Architecture(name, f"{family}{head}", f"{family}Config", options, auto, "text")


ZOO: tuple[Architecture, ...] = (
    _encoder("bert", "Bert", "Model", "AutoModel", **_BERT),
    _encoder("bert-mlm", "Bert", "ForMaskedLM", _MASKED, **_BERT),
    _encoder("bert-classes", "Bert", "ForSequenceClassification", _CLASSES, **_BERT, num_labels=3),
    _encoder("bert-regression", "Bert", "ForSequenceClassification", _CLASSES, **_BERT, num_labels=1),
    _encoder("roberta", "Roberta", "ForMaskedLM", _MASKED, **_BERT),
    _encoder(
        "distilbert",
        "DistilBert",
        "ForSequenceClassification",
        _CLASSES,
        vocab_size=VOCABULARY,
        dim=32,
        hidden_dim=48,
        n_layers=2,
        n_heads=4,
        max_position_embeddings=40,
        pad_token_id=PAD,
    ),
    _encoder(
        "deberta",
        "DebertaV2",
        "ForSequenceClassification",
        _CLASSES,
        **_BERT,
        num_labels=3,
        relative_attention=True,
        position_buckets=6,  # 2 * 6 relative positions: as many as a text has tokens
        max_relative_positions=-1,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
        type_vocab_size=0,
    ),
    _encoder(
        "deberta-apart", "DebertaV2", "ForMaskedLM", _MASKED, **_BERT, relative_attention=True, pos_att_type=["p2c"]
    ),
    _encoder(
        "modernbert",
        "ModernBert",
        "ForMaskedLM",
        _MASKED,
        **_BERT,
        bos_token_id=2,
        eos_token_id=3,
        cls_token_id=2,
        sep_token_id=3,
        global_attn_every_n_layers=2,
        local_attention=8,
    ),
    _encoder("albert", "Albert", "ForMaskedLM", _MASKED, **_BERT, embedding_size=16),
    _encoder("electra", "Electra", "ForSequenceClassification", _CLASSES, **_BERT, embedding_size=16),
    Architecture(
        "xlnet",
        "XLNetForSequenceClassification",
        "XLNetConfig",
        {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "num_labels": 3, **_TOKENS},
        _CLASSES,
        "text",
        "left",  # its head reads the last token
    ),
    Architecture(
        "gpt2",
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, **_TOKENS},
        _CAUSAL,
    ),
    Architecture(
        "opt",
        "OPTForCausalLM",
        "OPTConfig",
        {**_BODY, **_TOKENS, "ffn_dim": 48, "max_position_embeddings": 40, "word_embed_proj_dim": 16},
        _CAUSAL,
        "text",
    ),
    Architecture(
        "gpt-neox",
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {**_BODY, **_TOKENS, "intermediate_size": 48, "max_position_embeddings": 40},
        _CAUSAL,
    ),
    Architecture(
        "bloom",
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, **_TOKENS},
        _CAUSAL,
        "text",
        "left",
    ),
    Architecture("llama", "LlamaForCausalLM", "LlamaConfig", {**_LLAMA, "tie_word_embeddings": False}, _CAUSAL),
    Architecture("llama-tied", "LlamaForCausalLM", "LlamaConfig", {**_LLAMA, "tie_word_embeddings": True}, _CAUSAL),
    Architecture("mistral", "MistralForCausalLM", "MistralConfig", _LLAMA, _CAUSAL, "text", "left"),
    Architecture("qwen3", "Qwen3ForCausalLM", "Qwen3Config", _LLAMA, _CAUSAL),
    Architecture("phi3", "Phi3ForCausalLM", "Phi3Config", {**_LLAMA, "original_max_position_embeddings": 64}, _CAUSAL),
    Architecture("gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", {**_LLAMA, "query_pre_attn_scalar": 8}, _CAUSAL),
    Architecture(
        "t5",
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
            "pad_token_id": PAD,
            "eos_token_id": 3,
            "decoder_start_token_id": PAD,
        },
        "AutoModelForSeq2SeqLM",
        "pair",
    ),
    Architecture(
        "bart",
        "BartForConditionalGeneration",
        "BartConfig",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 40,
            "decoder_start_token_id": 3,
            **_TOKENS,
        },
        "AutoModelForSeq2SeqLM",
        "pair",
    ),
    Architecture(
        "vit",
        "ViTForImageClassification",
        "ViTConfig",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "image_size": 16,
            "patch_size": 4,
            "num_labels": 5,
        },
        "AutoModelForImageClassification",
        "image",
    ),
    Architecture("mixtral", "MixtralForCausalLM", "MixtralConfig", {**_MOE, "num_local_experts": 4}, _CAUSAL),
    Architecture(
        "qwen3-moe",
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        # As many experts as k_proj has outputs, which is not a router for that.
        {**_MOE, "num_experts": 16, "moe_intermediate_size": 8, "decoder_sparse_step": 1},
        _CAUSAL,
    ),
    Architecture(
        "mamba",
        "MambaForCausalLM",
        "MambaConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 8,
            "time_step_rank": 4,
            **_TOKENS,
        },
        _CAUSAL,
    ),
)

BY_NAME = {architecture.name: architecture for architecture in ZOO}
