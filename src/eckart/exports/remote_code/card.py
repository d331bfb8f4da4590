"""README.md of an exported folder: how it is loaded and served."""

from __future__ import annotations

from pathlib import Path

import jinja2
import yaml
from huggingface_hub import ModelCard

from eckart.exports.base import ExportSource
from eckart.exports.remote_code.folder import Written

TEMPLATE = Path(__file__).with_name("card.md.jinja")
CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag", "base_model")


def write_card(source: ExportSource, staging: Path, written: Written) -> None:
    """Write README.md at the top of the folder."""
    stated = _stated(source.folder / "README.md")
    base = stated.get("base_model")
    sentence = (source.folder / "modules.json").is_file()
    library = "sentence-transformers" if sentence else "transformers"
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        metadata=yaml.safe_dump(
            {**stated, "library_name": library, "tags": ["eckart", "custom_code"]}, sort_keys=False
        ).rstrip(),
        name=source.name,
        original=base if isinstance(base, str) else "A pretrained model",
        module=written.names.module,
        sentence=sentence,
        auto_class=written.auto_classes[0],
        causal=written.auto_classes[0] == "AutoModelForCausalLM",
        unserved=written.unserved,
        splits=written.parallel.refusal or "It may be split among processes: --tensor-parallel-size.",
    )
    (staging / "README.md").write_text(text, encoding="utf-8")


def _stated(file: Path) -> dict[str, object]:
    """What the card of the source says of licence, language, task and origin."""
    if not file.is_file():
        return {}
    try:
        stated = ModelCard.load(file).data.to_dict()
    except (ValueError, yaml.YAMLError):  # without metadata, or with broken metadata
        return {}
    return {key: stated[key] for key in CARRIED if stated.get(key)}
