"""`eckart verify`: whether a published folder is still what was published."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eckart.cli.console import check_json, guarded, show, write_json
from eckart.cli.options import JsonOption
from eckart.errors import CheckpointError


@guarded
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that eckart published.")],
    json: JsonOption = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Allow the model's own Python code to run.")
    ] = False,
) -> None:
    """Read a published folder back: every file by its hash, every tensor, and what config.json says of the modules.

    Each tensor is loaded as `from_pretrained` loads it and compared with what was in memory when the folder was
    written.

    Example: eckart verify smol-70
    """
    check_json(json, [folder])

    from eckart.checkpoint.read_back import verify_folder

    found = verify_folder(folder, trust_remote_code=trust_remote_code)
    write_json(json, found.as_dict(), [folder])
    if found.problems:
        listed = "".join(f"\n  - {problem}" for problem in found.problems)
        raise CheckpointError(f"{folder} is not what eckart published:{listed}\nDownload it or publish it again.")
    model = f"; {found.compared} tensors of {found.model}, {found.numbers:,} numbers" if found.model else ""
    notes = [f"note: {note}" for note in found.notes]
    show(f"{folder} is whole: {found.files} files{model}", *found.behaviors, *notes)
