"""README.md of a folder with a graph: how it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import ModelCard

from eckart.exports.base import ExportSource
from eckart.exports.card import keep_of_card
from eckart.exports.engines.trace import SENTENCE, Graph
from eckart.report.card import format_rows, name_original

TEMPLATE = Path(__file__).with_name("card.md.jinja")
CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag", "base_model")

TASKS = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice", "MaskedLM",
         "ImageClassification", "CausalLM")  # fmt: skip
"""Optimum's, by which the classes of models end."""

KINDS = {"int8": "weights in 8 bits", "int8-dynamic": "weights in 8 bits, and their inputs while it runs",
         "int4": "weights in 4 bits"}  # fmt: skip


def write_card(
    source: ExportSource, staging: Path, engine: str, graph: Graph, file: Path, quantize: str | None
) -> None:
    """Write README.md at the top of the folder."""
    stated = _stated(source.folder / "README.md")
    kept = keep_of_card(source.folder, exact=False)
    header, rows = format_rows(kept["measured"])
    sentence = (source.folder / "modules.json").is_file()
    library = "sentence-transformers" if sentence else engine
    kind = type(graph.model).__name__
    task = next((task for task in TASKS if kind.endswith(f"For{task}")), "FeatureExtraction")
    task = "CausalLM" if graph.causal else task
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        metadata=yaml.safe_dump(
            {**stated, "library_name": library, "tags": ["eckart", engine]}, sort_keys=False
        ).rstrip(),
        name=source.name,
        original=name_original(kept["base_model"]) or "A pretrained model",
        header=header,
        rows=rows,
        engine=engine,
        file=file.relative_to(staging).as_posix(),
        kind=KINDS[quantize] if quantize is not None else None,
        sentence=sentence,
        embedding=SENTENCE in graph.outputs,
        causal=graph.causal,
        tokenized=source.tokenizer is not None and any(port.name == "input_ids" for port in graph.inputs),
        task=task,
        inputs=[f"{port.name} {_shape(port.axes)}" for port in graph.inputs if not port.name.startswith("past_")],
        outputs=[name for name in graph.outputs if not name.startswith("present.")],
    )
    (staging / "README.md").write_text(text, encoding="utf-8")


def _shape(axes: Any) -> str:
    return f"({', '.join(map(str, axes))})"


def _stated(file: Path) -> dict[str, object]:
    """What the card of the source says of licence, language, task and origin."""
    if not file.is_file():
        return {}
    try:
        stated = ModelCard.load(file).data.to_dict()
    except (ValueError, yaml.YAMLError):  # without metadata, or with broken metadata
        return {}
    return {key: stated[key] for key in CARRIED if stated.get(key)}
