"""README.md of an exported folder: how it is loaded and served."""

from __future__ import annotations

from pathlib import Path

from eckart.exports.base import ExportSource
from eckart.exports.card import keep_of_card
from eckart.exports.remote_code.folder import Written
from eckart.report.card import render_model_card
from eckart.report.loading import find_loading

SPLITS = "It may be split among processes: `--tensor-parallel-size`."


def write_card(source: ExportSource, staging: Path, written: Written, quantize: str | None) -> None:
    """Write README.md at the top of the folder."""
    rounded = f" --quantize {quantize}" if quantize else ""
    card = render_model_card(
        source.name,
        loading=find_loading(source.model, source.folder, needs_eckart=False).with_arguments(trust_remote_code=True),
        summary=f"with weights as factors{f', in {quantize} by torchao' if quantize else ''}, made by eckart",
        notice=(
            f"`{written.names.module}.py` puts the factors in place: read it before you trust it. eckart is not needed"
            f"{', torchao is: `pip install torchao`' if quantize else ''}."
        ),
        about=_about(source.name, written),
        records="`eckart/export.json` says what was compared before it was published, and the largest difference.",
        command=f"eckart export FOLDER --format remote-code{rounded} --output-dir {source.name}",
        tags=["custom_code"],
        **keep_of_card(source.folder, exact=quantize is None),
    )
    (staging / "README.md").write_text(card, encoding="utf-8")


def _about(name: str, written: Written) -> list[str]:
    causal = written.auto_classes[0] == "AutoModelForCausalLM"
    found: list[str] = []
    if causal:
        arguments = f"pretrained={name},trust_remote_code=True"
        found.append(f"Scored by lm_eval: `lm_eval --model hf --model_args {arguments} --tasks TASKS`")
    if written.rounded is not None:  # not tried in vLLM
        return found
    if written.unserved:
        return [*found, written.unserved]
    runner = "" if causal else " --runner pooling"
    served = f"Served by vLLM: `vllm serve {name} --trust-remote-code{runner}`"
    return [*found, f"{served}. {written.parallel.refusal or SPLITS}"]
