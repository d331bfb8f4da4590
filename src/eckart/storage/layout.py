"""Where things lie in a model folder, and which paths still belong to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eckart.errors import CheckpointError

READ = {".json", ".jinja", ".model", ".tiktoken", ".spm", ".bpe", ".vocab", ".txt", ".safetensors", ".py", ".md"}
LICENSES = ("LICENSE", "NOTICE")
"""What of a model folder is read or carried over."""

JSON_LIMIT = 256 * 1024 * 1024


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of the model folder.

    Args:
        path: the file.

    Returns:
        The object.

    Raises:
        CheckpointError: the file cannot be read, is huge, is not JSON, or holds no object.
    """
    content = _parse(path)
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds a JSON {type(content).__name__} where an object is expected. Download the file again."
        )
    return content


def stays_inside(path: Path, folder: Path) -> bool:
    """Whether a file of ``folder`` is really stored there once symbolic links are followed.

    The cache of the Hugging Face hub links ``snapshots/<revision>/file`` to ``blobs/<hash>`` of the same
    repository, which counts as inside.

    Args:
        path: the file as named by the folder.
        folder: the folder, which may itself be reached through a link.

    Returns:
        True if the real path lies in the real folder or in the blobs of its hub cache entry.
    """
    real = path.resolve()
    home = folder.resolve()
    if real == home or home in real.parents:
        return True
    for start in (folder.absolute(), home):
        for part in (start, *start.parents):
            if part.name == "snapshots" and part.parent.name.startswith("models--"):
                blobs = part.parent / "blobs"  # as a link it could lead anywhere
                return not blobs.is_symlink() and real.parent == blobs.resolve()
    return False


def require_files_inside(folder: Path) -> None:
    """Refuse a model folder with a link to a file elsewhere: what is read there would be published with the model.

    Args:
        folder: the model folder; the folders that its modules lie in are looked at as well.

    Raises:
        CheckpointError: naming the link and where it leads.
    """
    named = [name for name in sentence_modules(folder) or () if name]
    for part in (folder, *(folder / name for name in (*named, "additional_chat_templates"))):
        for path in sorted(part.iterdir()) if part.is_dir() else ():
            read = path.suffix.lower() in READ or path.name.startswith(LICENSES)
            if read and path.is_symlink() and not stays_inside(path, folder):
                raise CheckpointError(
                    f"{path} is a link to {path.resolve()}, outside the folder. Copy the file into the folder if you "
                    "trust it, or remove the link."
                )


def sentence_modules(folder: Path) -> list[str] | None:
    """The module folders that the ``modules.json`` of a sentence-transformers model names, in its order.

    Args:
        folder: the model folder.

    Returns:
        Relative paths (``""`` is the folder itself), or None for a folder without ``modules.json``.

    Raises:
        CheckpointError: the file is malformed, or a path leaves the folder.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return None
    content = _parse(path)
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise CheckpointError(f"{path} is not a list of modules. Download the file again.")
    names = []
    for entry in content:
        name = entry.get("path", "")
        if not isinstance(name, str) or unsafe(name) or not stays_inside(folder / name, folder):
            raise CheckpointError(
                f"{path} names the module path {name!r}, which leaves the folder. Do not load this model: "
                "get it again from a source you trust."
            )
        names.append(name)
    return names


def model_folder(folder: Path) -> Path:
    """The folder that holds the transformers model: a subfolder in some sentence-transformers models.

    Args:
        folder: the model folder.

    Returns:
        The folder itself or a subfolder such as ``0_Transformer``.
    """
    if (folder / "config.json").is_file():
        return folder
    for name in sentence_modules(folder) or []:
        config = folder / name / "config.json"
        if name and config.is_file() and "model_type" in read_json(config):
            return folder / name
    return folder


def is_there(path: Path) -> bool:
    """Whether a file that a checkpoint names is there; one that no file can be called is not."""
    try:
        return path.is_file()
    except OSError:
        return False


def unsafe(name: str) -> bool:
    """Whether a relative file name given by a checkpoint could point out of its folder.

    Args:
        name: the name, in POSIX or Windows spelling.

    Returns:
        True for absolute names, drive letters, ``..``, backslashes, NUL, and half characters, which no name has.
    """
    if any("\ud800" <= character <= "\udfff" for character in name):
        return True
    return name.startswith("/") or "\\" in name or "\0" in name or ":" in name or ".." in name.split("/")


def _parse(path: Path) -> Any:
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise CheckpointError(f"{path} is larger than {JSON_LIMIT} bytes. Download the model again.")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}). Check the folder's permissions.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}). Download the file again.") from error
