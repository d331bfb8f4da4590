"""What an unfinished run has done so far, in ``OUTPUT.partial/``: a killed run resumes from it.

The folder holds ``journal.json`` (what the run depends on), ``entries/STAGE/`` (one file an entry: its tensors, its
other content and a checksum, renamed into place when it is complete) and ``files/`` (other files of the run).
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from eckart.errors import CheckpointError, NumericalError
from eckart.storage.files import TEMPORARY, describe_failed_write, sync_folder
from eckart.storage.layout import unsafe
from eckart.storage.lock import output_path
from eckart.storage.run_key import KEY_FILE, begin, discard, is_continued, is_journal
from eckart.storage.tensor_file import SUFFIX, find_damage, read_metadata, read_tensors, tensor_bytes, write_tensors

logger = logging.getLogger(__name__)

ENTRY = "entry"  # under which the metadata of a file holds what the entry is


class Journal:
    """The journal of the run that writes one output folder. Make it with :meth:`open`, under the output's lock.

    Attributes:
        folder: ``OUTPUT.partial``, next to the output folder.

    Example:
        >>> journal = Journal.open("smol-70", {"model": "3f2a", "recipe": {"keep": 0.7}})  # doctest: +SKIP
        >>> for name in set(blocks) - set(journal.entries("factors")):  # doctest: +SKIP
        ...     journal.write("factors", name, factors(name), {"loss": 0.25})
    """

    def __init__(self, folder: Path, entries: dict[str, dict[str, Path]]) -> None:
        self.folder = folder
        self._entries = entries  # stage -> name -> file, in the order written

    @classmethod
    def open(cls, output_dir: str | Path, key: Mapping[str, Any], *, restart: bool = False) -> Journal:
        """Resume the unfinished run of an output folder, or begin one.

        Every entry is checked. From the first damaged one on, those of its stage are dropped with a warning, for the
        later ones may have been computed from it.

        Args:
            output_dir: the output folder, which need not exist.
            key: what the run depends on: plain JSON, at most one level nested.
            restart: discard an unfinished run, whatever its key.

        Raises:
            CheckpointError: the folder belongs to a run with another key, to a newer version or to somebody else, or
                it cannot be written.
        """
        target = output_path(output_dir)
        folder = target.with_name(f"{target.name}.partial")
        plain: dict[str, Any] = json.loads(json.dumps(dict(key), allow_nan=False))
        try:
            for path in (folder, *_places_inside(folder)):
                if path.is_symlink():
                    raise CheckpointError(
                        f"{path} is a symbolic link. Remove it, or choose another --output-dir: eckart keeps "
                        "unfinished runs there, and removes what is left of them."
                    )
            if not folder.is_dir() or not is_continued(folder, plain, restart):
                begin(folder, plain)
            (folder / (KEY_FILE + TEMPORARY)).unlink(missing_ok=True)
            home = folder / "entries"
            stages = sorted(path for path in home.iterdir() if path.is_dir()) if home.is_dir() else []
            return cls(folder, {path.name: _check_stage(path) for path in stages})
        except OSError as error:
            raise CheckpointError(
                f"{folder}, which keeps the unfinished run, cannot be used ({error.filename or folder}: "
                f"{error.strerror}). Check its permissions and the space on its disk, or choose another --output-dir."
            ) from error

    def entries(self, stage: str) -> list[str]:
        """The names of a stage's entries, in the order they were written."""
        return list(self._entries.get(stage, {}))

    def write(
        self,
        stage: str,
        name: str,
        tensors: Mapping[str, Tensor],
        content: Mapping[str, Any],
        *,
        supersedes: bool = False,
    ) -> None:
        """Add an entry: once this returns it survives a kill and a power cut; until then it is not there.

        Args:
            stage: lower-case letters, digits and ``._-``.
            name: any text, once a stage.
            tensors: dense tensors by name, on any device.
            content: plain JSON that reads back equal: lists, not tuples; text as keys.
            supersedes: it depends on no entry of its stage. All of them but the last are removed; that one is kept in
                case this one is damaged.

        Raises:
            CheckpointError: the disk is full or cannot be written; the entries before are kept.
            NumericalError: the content holds a number that is not finite (tensors may hold any).
            TypeError: the content would not read back equal.
            ValueError: the stage's name is not of that form, or the entry exists already.
        """
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", stage):
            raise ValueError(f"stage {stage!r}: lower-case letters, digits and ._- only")
        if name in self._entries.get(stage, {}):
            raise ValueError(f"entry {name!r} of stage {stage!r} is written already")
        before = list(self._entries.get(stage, {}).items())
        sequence = _sequence(before[-1][1]) + 1 if before else 0
        entry = {
            "stage": stage, "name": name, "sequence": sequence, "supersedes": supersedes, "content": dict(content)
        }  # fmt: skip
        try:
            text = json.dumps(entry, allow_nan=False)
        except ValueError as error:
            raise NumericalError(
                f"The content of {name!r} ({stage}) holds a number that is not finite, so {self.folder} does not keep "
                "it. Check the model's weights and the calibration data for NaN and infinite values."
            ) from error
        if json.loads(text) != entry:
            raise TypeError(f"content of {name!r} ({stage}) would not read back equal: plain JSON only")
        folder = self.folder / "entries" / stage
        # The sequence alone makes the file's name unique; the rest is for people. The true name is in the file.
        path = folder / f"{sequence:06d}-{re.sub(r'[^A-Za-z0-9._-]+', '-', name)[:100]}{SUFFIX}"
        try:
            if not folder.is_dir():
                folder.mkdir(parents=True)
                sync_folder(folder.parent)
                sync_folder(self.folder)
            write_tensors(path, tensors, {ENTRY: text}, sync=True)
            sync_folder(folder)
        except BaseException as error:
            with suppress(OSError):
                path.unlink(missing_ok=True)
            if isinstance(error, OSError):
                what, needed = f"{name!r} ({stage})", tensor_bytes(tensors)
                then = "run the same command again: it resumes from what is done so far."
                raise CheckpointError(describe_failed_write(error, self.folder, what, needed, then)) from error
            raise
        self._entries.setdefault(stage, {})[name] = path
        for old, file in before[:-1] if supersedes else ():
            del self._entries[stage][old]
            with suppress(OSError):  # a file that cannot be removed does no harm
                file.unlink()

    def read(self, stage: str, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """An entry's tensors and content.

        Returns:
            The tensors on the CPU, mapped and not loaded (changing one leaves the file as it is), and the content.

        Raises:
            CheckpointError: the entry was damaged since the journal was opened.
            KeyError: there is no such entry.
        """
        path = self._entries[stage][name]
        try:
            return read_tensors(path), json.loads(read_metadata(path)[ENTRY])["content"]
        except (CheckpointError, OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{path} was damaged during the run ({str(error).split('. ')[0]}). Check the disk, and run the same "
                "command again: it resumes from the entry before."
            ) from error

    def drop(self, stage: str) -> None:
        """Remove a stage; tensors that were read from it must not be used any more."""
        self._entries.pop(stage, None)
        shutil.rmtree(self.folder / "entries" / stage, ignore_errors=True)

    def path(self, *parts: str) -> Path:
        """A place in the journal's folder for other files of the run; it is removed with the journal.

        Raises:
            ValueError: it would lie outside.
        """
        if any(map(unsafe, parts)):
            raise ValueError(f"{'/'.join(parts)} leaves the folder of the journal")
        return self.folder.joinpath("files", *parts)

    def check_space(self, needed_bytes: int, what: str) -> None:
        """Refuse work whose files would not fit on the disk, before it begins; `what` begins the message.

        Raises:
            CheckpointError: there is less space than that.
        """
        free = shutil.disk_usage(self.folder).free
        if needed_bytes > free:
            raise CheckpointError(
                f"{what} needs {needed_bytes:,} bytes in {self.folder}, and its disk has {free:,} free. Free some, or "
                "choose another --output-dir."
            )

    def remove(self) -> None:
        """Remove the whole folder: the run is finished. Tensors that were read must not be used any more."""
        try:
            discard(self.folder)
            (self.folder / KEY_FILE).unlink()
            self.folder.rmdir()
        except OSError as error:
            logger.warning("%s, no longer needed, cannot be removed (%s).", self.folder, error)
        self._entries.clear()


def remove_unfinished(output_dir: str | Path) -> None:
    """Remove the unfinished run of an output that has been published by another one: nothing will resume it.

    A folder under its name that is no journal of eckart is left alone.
    """
    target = output_path(output_dir)
    folder = target.with_name(f"{target.name}.partial")
    if folder.is_symlink() or not is_journal(folder):
        return
    logger.warning("%s, an unfinished run of the same output, is removed: the output is published.", folder)
    Journal(folder, {}).remove()


def _places_inside(folder: Path) -> list[Path]:
    """The folders of a journal that files are written to and removed from."""
    homes = [folder / "entries", folder / "files"]
    return homes + [path for home in homes if home.is_dir() and not home.is_symlink() for path in home.iterdir()]


def _check_stage(folder: Path) -> dict[str, Path]:
    """The entries of a stage in the order written, up to the first damaged one; all others are removed.

    A damaged entry that was superseded by an intact one is the only one to be removed.
    """
    for path in folder.glob(f"*{TEMPORARY}"):  # of a killed writer
        path.unlink()
    files = sorted(folder.glob(f"*{SUFFIX}"), key=_sequence)
    kept: dict[str, Path] = {}
    for index, path in enumerate(files):
        entry, problem = _check_entry(path, folder.name, _sequence(list(kept.values())[-1]) + 1 if kept else 0)
        if problem is None:
            kept[entry["name"]] = path
        elif any(_check_entry(other, folder.name, None)[1] is None for other in files[index + 1 :]):
            logger.warning("%s: %s. It is removed; later entries do not depend on it.", path, problem)
            path.unlink()
        else:
            logger.warning(
                "%s: %s. It and the %d entries of %s after it are removed; the run resumes %s.",
                path,
                problem,
                len(files) - index - 1,
                folder.name,
                f"after {list(kept)[-1]!r}" if kept else f"from the beginning of {folder.name}",
            )
            for other in reversed(files[index:]):
                other.unlink()
            break
    sync_folder(folder)  # or entries yet to be written could find the removed ones beside them after a power cut
    return kept


def _check_entry(path: Path, stage: str, expected: int | None) -> tuple[dict[str, Any], str | None]:
    """What an entry is, and what is wrong with it.

    Args:
        path: its file.
        stage: its stage.
        expected: its number, unless it supersedes those before it; None: it must supersede them.
    """
    if (damage := find_damage(path)) is not None:
        return {}, damage.replace(str(path), "it", 1)
    try:
        entry = json.loads(read_metadata(path)[ENTRY])
        sequence = entry["sequence"]
    except (CheckpointError, ValueError, KeyError, TypeError):
        return {}, "it is not an entry of a journal"
    if entry["stage"] != stage or sequence != _sequence(path):
        return entry, f"it is entry {sequence} of {entry['stage']}, under another name"
    if not entry["supersedes"] and sequence != expected:
        return entry, f"the entry before it, {sequence - 1}, is missing"
    return entry, None


def _sequence(path: Path) -> int:
    """An entry's number in its stage, which its file's name begins with."""
    number = path.name.partition("-")[0]
    return int(number) if number.isdecimal() else -1
