"""The usual names of columns of text, of pairs of texts and of labels."""

from __future__ import annotations

TEXT_NAMES = (
    ("text", "sentence", "content"),
    ("messages", "conversations", "conversation"),
    ("document", "review", "review_text", "body", "comment", "comment_text", "article", "abstract", "passage", "tweet",
     "message", "utterance", "description", "paragraph", "story"),
)  # fmt: skip
"""Names of a column of text, used if the user names none: those of a later row only if there is none of an earlier."""

PAIR_NAMES = (
    ("sentence1", "sentence2"),
    ("sentence_1", "sentence_2"),
    ("sentence_a", "sentence_b"),
    ("sentencea", "sentenceb"),
    ("text1", "text2"),
    ("text_1", "text_2"),
    ("text_a", "text_b"),
    ("#1_string", "#2_string"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "context"),
    ("query", "passage"),
    ("query", "document"),
    ("query", "positive"),
    ("anchor", "positive"),
    ("source", "target"),
)
"""Names of two columns of text that belong together, used if the user names none."""

LABEL_NAMES = (
    ("label", "labels", "score"),
    ("similarity_score", "similarity", "relatedness_score", "gold_label", "label_text", "target", "class", "rating",
     "stars", "sentiment", "quality", "is_duplicate", "category", "intent", "emotion", "toxicity"),
)  # fmt: skip
"""Names of a column of labels, by rows as above."""

TOKEN_NAMES = ("input_ids", "token_ids")
"""Names of a column of token ids."""

_KNOWN = frozenset(
    name for names in (*TEXT_NAMES, *PAIR_NAMES, *LABEL_NAMES) for name in names if name not in ("positive",)
)


def normalize_name(name: str) -> str:
    """A name of a column without regard to case, and to what stands between its words."""
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def is_known_name(cell: str) -> bool:
    """Whether a cell holds the usual name of a column."""
    return normalize_name(cell) in _KNOWN
