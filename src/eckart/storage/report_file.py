"""Reports as JSON files (``--json PATH``), which replace earlier reports and nothing else."""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eckart.errors import UsageError
from eckart.storage.files import write_file
from eckart.storage.publish import existing_inputs, probe_folder

MARK = {"written_by": "eckart"}
"""What a report begins with; a file that does not is never replaced."""


def check_report_file(path: str | Path, inputs: Sequence[Any] = ()) -> None:
    """Refuse a report file that could not be written or would replace something, before any work is done.

    Args:
        path: a new file, an earlier report of eckart, an empty file, or a stream such as ``/dev/stdout``.
        inputs: what the run reads: paths of files and folders; anything else is passed over.

    Raises:
        UsageError: naming the file and the way out.
    """
    path = Path(path)
    target = path.resolve()
    if _is_stream(target):
        return
    for given, home in existing_inputs(inputs):
        if home == target or home in target.parents:
            raise UsageError(
                f"{path} {'is' if home == target else 'lies inside'} {given}, an input of this run. Choose another "
                "file for the report."
            )
    if target.exists() and not _is_report(target):
        raise UsageError(f"{path} is there already and is not a report of eckart. Choose another file for the report.")
    if not target.parent.is_dir():
        raise UsageError(f"{path} cannot be written: there is no folder {target.parent}. Make it, or choose another.")
    try:
        probe_folder(target.parent)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written ({error.strerror}). Choose another file for the report, or change the "
            f"permissions of {target.parent}."
        ) from error


def write_report(path: str | Path, content: Mapping[str, Any], inputs: Sequence[Any] = ()) -> None:
    """Write a report; numbers that are not finite become strings.

    Args:
        path: see :func:`check_report_file`, which is asked again.
        content: JSON values.
        inputs: what the run has read.

    Raises:
        UsageError: the file would replace something else than a report, or cannot be written.
    """
    check_report_file(path, inputs)
    target = Path(path).resolve()
    text = format_report(content)
    try:
        if _is_stream(target):
            target.write_text(text, encoding="utf-8")
        else:
            write_file(target, [text.encode()])
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written ({error.strerror}). Choose another file for the report, or free some space."
        ) from error


def format_report(content: Mapping[str, Any]) -> str:
    """A report as the text of a file; numbers that are not finite become strings."""
    return json.dumps(MARK | finite(content), indent=2, allow_nan=False) + "\n"


def finite(content: Any) -> Any:
    """JSON has no NaN and no infinity: they become strings, so that they stay visible."""
    if isinstance(content, float) and not math.isfinite(content):
        return str(content)
    if isinstance(content, Mapping):
        return {str(key): finite(value) for key, value in content.items()}
    return [finite(value) for value in content] if isinstance(content, list | tuple) else content


def _is_stream(path: Path) -> bool:
    """Whether a path is a terminal, a pipe or the like, which hold nothing that could be lost."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)


def _is_report(path: Path) -> bool:
    try:
        if not path.is_file():
            return False
        content = json.loads(path.read_bytes() or json.dumps(MARK))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and MARK.items() <= content.items()
