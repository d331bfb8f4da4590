"""`--config run.yaml`: the recipe's options, and where to publish."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eckart.compression.recipe import read_config
from eckart.errors import UsageError


@dataclass(frozen=True)
class Where:
    """What a run file says of the output: no part of the recipe, which is saved with the model."""

    output_dir: Path | None = None
    overwrite: bool = False


def read_run(config: Path | None) -> tuple[dict[str, Any], Where]:
    """The options of a run file, and its `output_dir` and `overwrite`.

    Raises:
        UsageError: naming the file and the key.
    """
    if config is None:
        return {}, Where()
    content = read_config(config)
    folder, overwrite = content.pop("output_dir", None), content.pop("overwrite", False)
    if not isinstance(folder, str | None) or not isinstance(overwrite, bool):
        raise UsageError(f"--config {config}: output_dir is the path of a folder, overwrite is true or false.")
    return content, Where(Path(folder) if folder is not None else None, overwrite)
