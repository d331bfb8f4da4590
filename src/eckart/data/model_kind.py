"""Whether a model reads running text, separate texts, or a source and a target; and how long they may be."""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from eckart.data.auto_classes import head_classes

ModelKind = Literal["causal", "encoder", "encoder-decoder"]
"""`causal` reads packed windows of text, `encoder` separate padded texts, `encoder-decoder` pairs of them."""

HEADS_ON_SEPARATE_TEXTS = {
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForDocumentQuestionAnswering",
    "AutoModelForTableQuestionAnswering",
    "AutoModelForVisualQuestionAnswering",
    "AutoModelForMultipleChoice",
    "AutoModelForNextSentencePrediction",
    "AutoModelForAudioClassification",
}
"""What loads heads that read separate texts (or pairs, or sounds), whatever their body is."""

UNLIMITED = 1_000_000
"""A larger `model_max_length` is no limit: tokenizers without one have 1e30."""

logger = logging.getLogger(__name__)


def model_kind(config: PretrainedConfig, model: nn.Module | None = None) -> ModelKind:
    """Return what a model reads.

    Args:
        config: The model's configuration.
        model: The model, if it is loaded: its class decides what a configuration leaves open.
    """
    classes = [type(model)] if model is not None else list(config.architectures or [])
    heads = {auto for one in classes for auto in head_classes(config, one)}
    if heads & HEADS_ON_SEPARATE_TEXTS:
        return "encoder"
    if config.is_encoder_decoder:
        return "encoder-decoder"
    return "causal" if "AutoModelForCausalLM" in heads or reads_on(config) else "encoder"


def reads_on(config: PretrainedConfig) -> bool:
    """Whether the body of a model reads from left to right, whatever its head is."""
    text = config.get_text_config(decoder=True)
    named = text.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    fills_in = text.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES  # BERT and others are in both
    return bool(getattr(text, "is_decoder", False)) or (named and not fills_in)


def has_head(config: PretrainedConfig, model: nn.Module | None, *names: str) -> bool:
    """Whether a model's class is one that one of these auto classes gives, such as "AutoModelForCausalLM".

    Args:
        config: The model's configuration.
        model: The model; None where it is not loaded, and the configuration's classes count.
        names: Auto classes.
    """
    classes = [type(model)] if model is not None else list(config.architectures or [])
    return not {auto for one in classes for auto in head_classes(config, one)}.isdisjoint(names)


CLASSIFIERS = (
    "AutoModelForSequenceClassification",
    "AutoModelForImageClassification",
    "AutoModelForAudioClassification",
    "AutoModelForVideoClassification",
)
"""What loads heads with one answer for each input, of which a configuration says the kind."""


def head_problem(model: Any) -> str | None:
    """Return the `problem_type` of a model's head, or None if it has no such head.

    Args:
        model: The model.

    Returns:
        "regression", "multi_label_classification" or "single_label_classification".
    """
    return problem_of(model.config) if has_head(model.config, model, *CLASSIFIERS) else None


def problem_of(config: Any) -> str:
    """The `problem_type` of a classifier's configuration, or what transformers takes it for if it names none."""
    named = getattr(config, "problem_type", None)
    return str(named or ("regression" if getattr(config, "num_labels", 2) == 1 else "single_label_classification"))


def max_positions(config: PretrainedConfig, model: nn.Module | None = None) -> int | None:
    """Return how many tokens a model has positions for.

    RoBERTa and similar models number positions from `padding_idx + 1`, so that a table of 514 serves 512 tokens. Their
    position table has a padding row; without a model, its class is built on the meta device to see that.

    Args:
        config: The model's configuration.
        model: The model, if it is loaded.

    Returns:
        The largest length, or None if there is no limit (relative positions, state-space models).
    """
    table = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(table, int) or table < 1:
        return None
    if model is None and model_kind(config) == "encoder":
        model = _skeleton(config)
    for name, module in model.named_modules() if model is not None else ():
        if not isinstance(module, nn.Embedding) or "position" not in name or module.num_embeddings != table:
            continue
        if module.padding_idx is not None:
            return table - module.padding_idx - 1
    return table


def sequence_length(
    asked: int | None,
    default: int,
    *,
    tokenizer: Any,
    config: PretrainedConfig | None,
    model: nn.Module | None = None,
) -> int:
    """Return the number of tokens that texts are cut to.

    Args:
        asked: The length that the user named, in tokens; None for the default.
        default: Used for None, unless the tokenizer or the model has a lower limit.
        tokenizer: The tokenizer; only its `model_max_length` is read.
        config: The model's configuration, if known.
        model: The model, if it is loaded.

    Returns:
        A length that the model has positions for; a larger one is lowered with a warning.
    """
    limit = max_positions(config, model) if config is not None else None
    if asked is None:
        named = getattr(tokenizer, "model_max_length", None) or UNLIMITED
        asked = min(default, named if named < UNLIMITED else default)
        return min(asked, limit or asked)
    if limit is not None and asked > limit:
        logger.warning("max_seq_length %d is lowered to %d: the model has no more positions", asked, limit)
        return limit
    return asked


def pad_token(tokenizer: Any, config: PretrainedConfig | None) -> int:
    """Return the id of the padding token: the model's, or else the tokenizer's.

    Args:
        tokenizer: The tokenizer, or None.
        config: The model's configuration, or None.

    Returns:
        A token id that the model has an embedding for; 0 if neither has one (padding is always masked).
    """
    text = config.get_text_config() if config is not None else None
    rows = getattr(text, "vocab_size", None)
    for holder, name in ((text, "pad_token_id"), (tokenizer, "pad_token_id"), (tokenizer, "eos_token_id")):
        value = getattr(holder, name, None)
        if isinstance(value, int) and value >= 0 and (not isinstance(rows, int) or value < rows):
            return value
    return 0


def _skeleton(config: PretrainedConfig) -> nn.Module | None:
    """Build the model on the meta device, or return None if transformers cannot."""
    try:
        with torch.device("meta"):
            return AutoModel.from_config(config)
    except (ValueError, KeyError, RuntimeError, NotImplementedError):
        return None
