"""Small models and texts that stand where the pages of the site name large ones.

A page says in its first line what is there: `<!-- here: MODEL = causal, texts.txt = lines -->`. tools/run_docs.py puts
a folder or file of that name where the page's commands run, so that they run as they are written.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

FIRST = ["models", "text", "layers", "weights", "factors", "ranks"]
SECOND = ["tokens", "words", "books", "rivers", "roads", "lamps"]
SENTENCES = [
    f"The {first} of {number} {second} are {third}."
    for number in (2, 3, 5, 7)
    for first in FIRST
    for second in SECOND
    for third in ("long", "small", "new")
]


def place(name: str, kind: str) -> None:
    """Put a stand-in of a kind in the working directory.

    Raises:
        KeyError: there is no such kind.
    """
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    STAND_INS[kind](path)


def causal(path: Path) -> None:
    from tiny import llama, place

    place(llama(), path)


def chat(path: Path) -> None:
    """A causal model with a chat template."""
    causal(path)
    tokenizer = _tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(path)


def demo(path: Path) -> None:
    from tiny import DEMO

    shutil.copytree(DEMO, path)


def factored(path: Path) -> None:
    """A causal model as above, compressed by plain SVD."""
    from tiny import llama

    import eckart

    eckart.compress(llama().float(), _tokenizer(), method="svd", keep=0.5).save_pretrained(path)


def mixture(path: Path) -> None:
    import torch
    from architectures import scaled
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=8192, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    _save(scaled(MixtralForCausalLM(config)), path)


def sentence_encoder(path: Path) -> None:
    """A BERT with mean pooling and normalization, as sentence-transformers saves it."""
    from transformers import BertModel

    _save(_bert(BertModel), path)
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": place, "type": f"sentence_transformers.models.{kind}"}
        for i, (place, kind) in enumerate(kinds.items())
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (path / "sentence_bert_config.json").write_text('{"max_seq_length": 32, "do_lower_case": false}')


def classifier(path: Path) -> None:
    from transformers import BertForSequenceClassification

    _save(_bert(BertForSequenceClassification, num_labels=2), path)


def vision(path: Path) -> None:
    import torch
    from architectures import scaled
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    scaled(ViTForImageClassification(config)).save_pretrained(path)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(path)


def images(path: Path) -> None:
    """A folder of pictures."""
    import numpy
    from PIL import Image

    path.mkdir()
    stream = numpy.random.default_rng(0)
    for number in range(24):
        Image.fromarray(stream.integers(0, 256, (20, 20, 3), dtype="uint8")).save(path / f"{number}.png")


def lines(path: Path) -> None:
    """A sentence a line."""
    path.write_text("\n".join(SENTENCES) + "\n", encoding="utf-8")


def pairs(path: Path) -> None:
    """Two sentences and how alike they are."""
    rows = [
        f'"{one}","{two}",{(i % 6) / 5}' for i, (one, two) in enumerate(zip(SENTENCES, SENTENCES[7:], strict=False))
    ]
    path.write_text("\n".join(["sentence1,sentence2,score", *rows[:60]]) + "\n", encoding="utf-8")


def labeled(path: Path) -> None:
    """A sentence and its class."""
    rows = [f'"{text}",{i % 2}' for i, text in enumerate(SENTENCES)]
    path.write_text("\n".join(["sentence,label", *rows[:80]]) + "\n", encoding="utf-8")


def chats(path: Path) -> None:
    """Conversations, one a line."""
    rows = [
        {"messages": [{"role": "user", "content": one}, {"role": "assistant", "content": two}]}
        for one, two in zip(SENTENCES[:40], SENTENCES[40:80], strict=True)
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")


def _bert(kind: type, **more: Any) -> Any:
    import torch
    from architectures import scaled
    from transformers import BertConfig

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=8256, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=0, **more,
    )  # fmt: skip
    return scaled(kind(config)).eval()


def _save(model: Any, path: Path) -> None:
    model.save_pretrained(path)
    _tokenizer().save_pretrained(path)


def _tokenizer() -> Any:
    from tiny import DEMO
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


STAND_INS: dict[str, Callable[[Path], None]] = {
    "causal": causal,
    "chat": chat,
    "demo": demo,
    "factored": factored,
    "mixture": mixture,
    "sentence encoder": sentence_encoder,
    "classifier": classifier,
    "vision": vision,
    "images": images,
    "lines": lines,
    "pairs": pairs,
    "labeled": labeled,
    "chats": chats,
}
