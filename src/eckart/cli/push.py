"""`eckart push`, and `--push-to-hub` of the commands that publish a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eckart.cli.console import guarded, say, show
from eckart.cli.options import PrivateOption
from eckart.cli.terminal import Verbatim
from eckart.distributed import is_main
from eckart.errors import UsageError


@guarded
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that eckart published.")],
    name: Annotated[str, typer.Argument(help="Repository on the hub: user/model.")],
    private: PrivateOption = False,
) -> None:
    """Push a published folder to the Hugging Face hub. Log in first: hf auth login.

    The repository is made if it is not there. Weights that it holds are replaced; the model card loads the model by
    the repository's name.

    Example: eckart push smol-70 me/smol-70
    """
    push_published(folder, name, private)


def check(name: str | None, private: bool) -> None:
    """Refuse a push that would fail, before any work is done.

    Raises:
        UsageError: there is no such name, nobody is logged in, or nothing is pushed that could be private.
    """
    if name is None:
        if private:
            raise UsageError("--private: nothing is pushed. Name the repository as well: --push-to-hub user/model")
        return
    from eckart.checkpoint.push import check_push

    check_push(name)


def push_published(folder: Path | None, name: str | None, private: bool) -> None:
    """Push what was published, where that was asked for; of several processes one does."""
    if name is None or folder is None or not is_main():
        return
    from eckart.checkpoint.push import push_folder

    say(f"pushing {folder} to {name}", "dim")
    show(Verbatim(f"pushed to {push_folder(folder, name, private=private or None)}"))
