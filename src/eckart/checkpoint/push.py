"""Push a published folder to the Hugging Face hub, with the hub's own client."""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # of its documentation

from eckart.errors import CheckpointError, EckartError, UsageError
from eckart.storage.manifest import renew

REPLACED = ["model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin",
            "pytorch_model.bin.index.json", "eckart/*"]  # fmt: skip
"""Files of a model that was there before and is replaced. Left beside the new weights, they could be loaded instead."""

RECORDS = ("eckart/recipe.yaml", "eckart/report.json", "eckart/report.html", "eckart/export.json")
"""What may name files of this machine."""

logger = logging.getLogger(__name__)


def check_push(name: str, *, token: str | None = None) -> None:
    """Refuse a name or a login that a push would fail on, before any work is done.

    Args:
        name: of the repository, `user/model`.
        token: of the hub; None for the one that `hf auth login` stored.

    Raises:
        UsageError: the name is none, the hub is switched off, or nobody is logged in.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UsageError(
            f"--push-to-hub {name}: not a name that the hub takes ({error}). Names look like user/model."
        ) from None
    if constants.is_offline_mode():
        raise UsageError(f"--push-to-hub {name}: HF_HUB_OFFLINE is set. Unset it, or leave the option out.")
    try:
        HfApi().whoami(token=token)
    except Exception as error:  # the hub's client, httpx and the system each raise their own
        raise UsageError(f"--push-to-hub {name}: {_reason(error, name)}") from error


def push_folder(
    folder: str | Path, name: str, *, private: bool | None = None, message: str | None = None, token: str | None = None
) -> str:
    """Push a folder, which stays as it is.

    The repository is made if it is not there yet. Weights that it holds are replaced, other files stay. The model card
    loads the model by the repository's name, and the records of the run say files of this machine by their last part.

    Args:
        folder: that eckart published.
        name: of the repository: `user/model`, `organization/model`, or `model` alone for the user's own.
        private: whether only its owner sees it; None for what the hub does by default, or for what it is.
        message: of the commit.
        token: of the hub; None for the one that `hf auth login` stored.

    Returns:
        The address of the model's page.

    Raises:
        CheckpointError: the folder is not there, or the push failed; then the folder is still there.
        UsageError: the name is none, nobody is logged in, or a private repository was asked for and a public one is
            there.
    """
    home = Path(folder)
    if not (home / "config.json").is_file() and not (home / "modules.json").is_file():
        raise CheckpointError(f"{home} holds no model to push. Give a folder that eckart published.")
    try:
        check_push(name, token=token)
        return _push(home, name, private, message, token)
    except EckartError as error:
        raise type(error)(
            f"{home} is published, and was not pushed to {name} (try again: eckart push {home} {name}). {error}"
        ) from error


def _push(home: Path, name: str, private: bool | None, message: str | None, token: str | None) -> str:
    try:
        api = HfApi(token=token)
        made = api.create_repo(name, private=private, exist_ok=True)
        if private and not api.repo_info(made.repo_id).private:  # which was there
            raise UsageError(
                f"--private: {made.repo_id} is there already and is public. Make it private in its settings on the "
                "hub, or choose another name."
            )
        with tempfile.TemporaryDirectory(prefix="eckart-push-") as place:
            api.upload_folder(
                repo_id=made.repo_id,
                folder_path=_stage(home, Path(place), made.repo_id),
                commit_message=message or "Upload a model compressed with eckart",
                delete_patterns=[*REPLACED],
            )
    except EckartError:
        raise
    except Exception as error:  # the hub's client, httpx, hf_xet and the system each raise their own
        raise CheckpointError(_reason(error, name)) from error
    logger.info("pushed %s to %s", home, made.repo_id)
    return str(made)


def push_result(
    save: Callable[[Path], Path], folder: Path | None, name: str, *, private: bool | None, token: str | None
) -> str:
    """Push what a run has published, or what it would publish; arguments as of :func:`push_folder`.

    Args:
        save: publishes the result in a folder.
        folder: where it is published; None where it is not.
        name: of the repository.
        private: whether only its owner sees it.
        token: of the hub.
    """
    if folder is not None:
        return push_folder(folder, name, private=private, token=token)
    check_push(name, token=token)
    with tempfile.TemporaryDirectory(prefix="eckart-push-") as place:
        try:
            return _push(save(Path(place) / name.rpartition("/")[2]), name, private, None, token)
        except EckartError as error:
            raise type(error)(
                f"The result was not pushed to {name}, and is in memory: keep it with save_pretrained(FOLDER). {error}"
            ) from error


def _stage(home: Path, place: Path, name: str) -> Path:
    """The folder as it is pushed: links to its files, the card with the repository's name, records without places."""
    places = _places(home)
    changed = []
    for file in sorted(home.rglob("*")):
        if not file.is_file():
            continue
        inner = file.relative_to(home).as_posix()
        target = place / inner
        target.parent.mkdir(parents=True, exist_ok=True)
        if inner == "README.md" or inner in RECORDS:
            text = file.read_text(encoding="utf-8")
            text = _renamed(text, home.name, name) if inner == "README.md" else text
            for where, known_as in places.items():
                text = text.replace(where, known_as)
            target.write_text(text, encoding="utf-8")
            changed.append(inner)
            continue
        try:
            os.symlink(file.resolve(), target)
        except OSError:  # a system without links
            shutil.copyfile(file, target)
    for inner in changed:
        renew(place, inner)
    return place


def _places(home: Path) -> dict[str, str]:
    """Where models and data lay on this machine, as the records of a folder say -> the last part, which stays."""
    found: set[str] = set()

    def collect(value: Any) -> None:
        if isinstance(value, str) and Path(value).is_absolute():
            found.add(value)
        for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
            collect(inner)

    for record in RECORDS:
        try:
            collect(yaml.safe_load((home / record).read_text(encoding="utf-8")))  # JSON is YAML
        except (OSError, ValueError, yaml.YAMLError):
            continue
    return {where: Path(where).name for where in sorted(found, key=len, reverse=True) if Path(where).name}


def _renamed(card: str, old: str, new: str) -> str:
    """The card with the repository's name for the folder's in its lines of Python."""

    def rename(block: re.Match[str]) -> str:
        return block[0].replace(f'"{old}"', f'"{new}"')

    return re.sub(r"```python\n.*?```", rename, card, flags=re.DOTALL)


def _reason(error: Exception, name: str) -> str:
    """What went wrong, and the way out."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    if isinstance(error, LocalTokenNotFoundError):
        return "Nobody is logged in to the hub. Log in with a token that may write: hf auth login"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set. Unset it."
    if status == 401:
        return "The hub does not accept the token. Log in again with one that may write: hf auth login"
    if status == 403:
        return (
            f"The hub does not let this login write to {name} ({_words(error)}). Log in with a token that may write "
            "(hf auth login), or choose a name of your own: user/model."
        )
    if status is not None:
        return f"The hub answered {status} ({_words(error)})."
    return f"The hub's client failed ({type(error).__name__}: {_words(error)}). Check the connection, and try again."


def _words(error: Exception) -> str:
    said = getattr(error, "server_message", None) or str(error)
    return " ".join(said.split())[:300].rstrip(". ")
