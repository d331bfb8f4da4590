"""`--config run.yaml`: the recipe's options, and where to publish."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eckart.config import UNFIT, read_config
from eckart.errors import UsageError

WORDS = {"yes": True, "on": True, "no": False, "off": False}
"""How YAML files spell true and false besides."""


@dataclass(frozen=True)
class OutputSettings:
    """What a run file says of the output. It is no part of the recipe, which is saved with the model."""

    output_dir: Path | None = None
    overwrite: bool = False

    def override(self, output_dir: Path | None, overwrite: bool | None) -> tuple[Path, bool]:
        """The folder to publish and whether it may replace another; flags win over the file.

        Raises:
            UsageError: neither names a folder.
        """
        folder = output_dir or self.output_dir
        if folder is None:
            raise UsageError("--output-dir is missing. Name the folder to publish: --output-dir DIR")
        return folder, self.overwrite if overwrite is None else overwrite


def read_run(config: Path | None) -> tuple[dict[str, Any], OutputSettings]:
    """The options of a run file, and its `output_dir` and `overwrite`.

    Raises:
        UsageError: naming the file and the key.
    """
    if config is None:
        return {}, OutputSettings()
    content = read_config(config)
    folder, overwrite = content.pop("output_dir", None), content.pop("overwrite", False)
    overwrite = WORDS.get(overwrite, overwrite) if isinstance(overwrite, str) else overwrite
    if isinstance(folder, str) and UNFIT.search(folder):
        raise UsageError(f"--config {config}: output_dir {folder!r} holds characters that no path can have. Mend it.")
    if not isinstance(folder, str | None) or not isinstance(overwrite, bool):
        raise UsageError(f"--config {config}: output_dir is the path of a folder, overwrite is true or false.")
    return content, OutputSettings(Path(folder) if folder is not None else None, overwrite)
