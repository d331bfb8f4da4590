"""What every format of an export is: one file in this package, and one line in :data:`eckart.registry.EXPORTS`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedModel


@dataclass(frozen=True)
class ExportSource:
    """What is exported.

    Attributes:
        model: in evaluation mode on the CPU, for this export alone: it may be changed.
        folder: where it came from.
        tokenizer: None where the folder has none.
        trust_remote_code: whether the model's own Python code may run.
        name: what the published folder will be called, for its card.
        made_whole: whether the folder's model did less for easy inputs, and this one does not.
    """

    model: PreTrainedModel
    folder: Path
    tokenizer: Any
    trust_remote_code: bool
    name: str
    made_whole: bool = False


class Exporter:
    """A format.

    Attributes:
        name: as users give it.
        title: what it is, one line for `--help`.
        extra: the extra of eckart that brings the libraries it needs; "" for none.
        takes_dense: whether a model without factors can be exported too.
        keeps_behaviors: whether it holds what lets a model do less for easy inputs (:mod:`eckart.adaptive`).
    """

    name: ClassVar[str]
    title: ClassVar[str]
    extra: ClassVar[str] = ""
    takes_dense: ClassVar[bool] = False
    keeps_behaviors: ClassVar[bool] = False

    def check(self, source: ExportSource, quantize: str | None) -> None:
        """Refuse what cannot be exported, before any work.

        Raises:
            ModelError: not this model.
            UsageError: a library is missing, or the format knows no such quantisation.
        """

    def write(self, source: ExportSource, staging: Path, quantize: str | None) -> Mapping[str, Any]:
        """Write the whole folder, and hold it against the model.

        Args:
            source: the model.
            staging: an empty folder, which is published afterwards.
            quantize: "int8", "int8-dynamic", "int4" or None.

        Returns:
            What `eckart/export.json` says of it: plain JSON values, with what was compared and the largest difference.

        Raises:
            CheckpointError: what was written does not compute what the model computes; nothing is published.
        """
        raise NotImplementedError
