"""What an unfinished run has done so far, in ``OUTPUT.partial/``, so that a killed run goes on from there.

The folder holds ``journal.json`` (what the run depends on), ``entries/STAGE/`` (two files an entry: its tensors, and
its other content with the size and checksum of the tensors) and ``files/`` (whatever else the run keeps there). An
entry is there once its JSON file is: that is renamed into place last.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from eckart.errors import CheckpointError, NumericalError
from eckart.storage.cache import (
    PIECE,
    SUFFIX,
    read_tensors,
    tensor_bytes,
    write_failed,
    write_tensors,
)
from eckart.storage.files import TEMPORARY, sync_folder, write_file
from eckart.storage.layout import unsafe
from eckart.storage.lock import output_path
from eckart.storage.record import RECORD, begin, continues, discard
from eckart.storage.sealed import not_finite, sealed, unsealed

logger = logging.getLogger(__name__)


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
        self._entries = entries  # stage -> name -> JSON file, in the order written

    @classmethod
    def open(cls, output_dir: str | Path, key: Mapping[str, Any], *, restart: bool = False) -> Journal:
        """Go on with the unfinished run of an output folder, or begin one.

        Entries are checked in the order they were written. From the first that is damaged on, those of its stage are
        dropped with a warning, for the later ones may have been made from it.

        Args:
            output_dir: the output folder, which need not exist.
            key: what the run depends on: plain JSON, at most one level nested.
            restart: throw an unfinished run away, whatever it was.

        Returns:
            The journal.

        Raises:
            CheckpointError: the folder belongs to a run with another key, to a newer version or to somebody else, or
                it cannot be written.
        """
        target = output_path(output_dir)
        folder = target.with_name(f"{target.name}.partial")
        plain: dict[str, Any] = json.loads(json.dumps(dict(key), allow_nan=False))
        try:
            if folder.is_symlink():
                raise CheckpointError(
                    f"{folder} is a symbolic link. Remove it, or choose another --output-dir: eckart keeps "
                    "unfinished runs there."
                )
            if not folder.is_dir() or not continues(folder, plain, restart):
                begin(folder, plain)
            (folder / (RECORD + TEMPORARY)).unlink(missing_ok=True)
            return cls(folder, {path.name: _verified(path) for path in _stages(folder)})
        except OSError as error:
            raise CheckpointError(
                f"{folder}, which keeps the unfinished run, cannot be used ({error.filename or folder}: "
                f"{error.strerror}). Check its permissions and the room on its disk, or choose another --output-dir."
            ) from error

    def entries(self, stage: str) -> list[str]:
        """The names of a stage's entries, in the order they were written.

        Args:
            stage: name of the stage; one without entries will do.

        Returns:
            The names.
        """
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
        """Add an entry: once this returns it outlives a kill and a power cut; before, it was never there.

        Args:
            stage: lower-case letters, digits and ``._-``.
            name: any text, once a stage.
            tensors: dense tensors by name, on any device.
            content: plain JSON that reads back equal: lists, not tuples; text as keys.
            supersedes: it needs none of its stage's entries before it. All but the last of these are removed; that one
                is there in case this one is damaged.

        Raises:
            CheckpointError: the disk is full or cannot be written; the entries before are kept.
            NumericalError: the content holds a number that is not finite (tensors may hold any).
            TypeError: the content would not read back equal.
            ValueError: the stage's name is not of that form, or the entry is there already.
        """
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", stage):
            raise ValueError(f"stage {stage!r}: lower-case letters, digits and ._- only")
        if name in self._entries.get(stage, {}):
            raise ValueError(f"entry {name!r} of stage {stage!r} is written already")
        for place in not_finite(dict(content), "content"):
            raise NumericalError(
                f"{place} of {name!r} ({stage}) is not finite, so {self.folder} does not keep it. Check the model's "
                "weights and the calibration data for NaN and infinite values."
            )
        before = list(self._entries.get(stage, {}).values())
        sequence = _sequence(before[-1]) + 1 if before else 0
        body = {"stage": stage, "name": name, "sequence": sequence, "content": dict(content)}
        if supersedes:
            body["supersedes"] = True
        if json.loads(json.dumps(body)) != body:
            raise TypeError(f"content of {name!r} ({stage}) would not read back equal: plain JSON only")
        folder = self.folder / "entries" / stage
        # The sequence alone makes the file's name unique; the rest is for people. The true name is in the JSON.
        stem = f"{sequence:06d}-{re.sub(r'[^A-Za-z0-9._-]+', '-', name)[:100]}"
        path = folder / f"{stem}.json"
        try:
            if not folder.is_dir():
                folder.mkdir(parents=True)
                sync_folder(folder.parent)
                sync_folder(self.folder)
            size, checksum = write_tensors(_tensors(path), tensors, sync=True)
            write_file(path, [sealed({**body, "bytes": size, "crc32": checksum})], sync=True)
            sync_folder(folder)
            self._entries.setdefault(stage, {})[name] = path
        except BaseException as error:
            self._entries.get(stage, {}).pop(name, None)
            with suppress(OSError):
                _remove(path)
            if isinstance(error, OSError):
                what, needed = f"{name!r} ({stage})", tensor_bytes(tensors)
                then = "run the same command again: it goes on from what is done so far."
                raise CheckpointError(write_failed(error, self.folder, what, needed, then)) from error
            raise
        if supersedes:
            self._forget(stage, before[:-1])

    def _forget(self, stage: str, paths: Sequence[Path]) -> None:
        """Remove entries; what cannot be removed is in nobody's way."""
        for name in [name for name, path in self._entries[stage].items() if path in paths]:
            with suppress(OSError):
                _remove(self._entries[stage].pop(name))

    def read(self, stage: str, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """An entry's tensors and content.

        Args:
            stage: its stage.
            name: its name.

        Returns:
            The tensors on the CPU, mapped and not loaded (changing one leaves the file as it is), and the content.

        Raises:
            CheckpointError: the entry was damaged since the journal was opened.
            KeyError: there is no such entry.
        """
        path = self._entries[stage][name]
        try:
            body = unsealed(path.read_bytes())
            if body is None:
                raise CheckpointError(f"{path} is garbled.")
            return read_tensors(_tensors(path)), body["content"]
        except (CheckpointError, OSError) as error:
            raise CheckpointError(
                f"{path} or its tensors were damaged while the run went on ({str(error).split('. ')[0]}). Check the "
                "disk, and run the same command again: it goes on from the entry before."
            ) from error

    def path(self, *parts: str) -> Path:
        """A place in the journal's folder for files of the run's own; it goes with the journal.

        Args:
            parts: names of folders and a file, none of which need exist.

        Returns:
            The path.

        Raises:
            ValueError: it would lie outside.
        """
        if any(map(unsafe, parts)):
            raise ValueError(f"{'/'.join(parts)} leaves the folder of the journal")
        return self.folder.joinpath("files", *parts)

    def check_space(self, needed_bytes: int, what: str) -> None:
        """Refuse work whose files would not fit on the disk, before it begins.

        Args:
            needed_bytes: what will still be written.
            what: the work, to begin a sentence with.

        Raises:
            CheckpointError: there is less room than that.
        """
        free = shutil.disk_usage(self.folder).free
        if needed_bytes > free:
            raise CheckpointError(
                f"{what} needs {needed_bytes:,} bytes in {self.folder}, and its disk has {free:,} free. Free some, or "
                "choose another --output-dir."
            )

    def remove(self) -> None:
        """Remove the whole folder: the run is finished. Its tensors must not be looked at any more."""
        try:
            discard(self.folder)
            (self.folder / RECORD).unlink()
            self.folder.rmdir()
        except OSError as error:
            logger.warning("%s, no longer needed, cannot be removed (%s).", self.folder, error)
        self._entries.clear()


def _stages(folder: Path) -> list[Path]:
    home = folder / "entries"
    return sorted(path for path in home.iterdir() if path.is_dir()) if home.is_dir() else []


def _verified(folder: Path) -> dict[str, Path]:
    """The sound entries of a stage in the order written; all after the first that is not are removed.

    Unless one of these is sound and needs none before it: then it is gone on from there.
    """
    written = sorted(folder.glob("*.json"), key=lambda path: (_sequence(path), path.name))
    sound: dict[str, Path] = {}
    gone: list[Path] = []
    while written:
        path = written.pop(0)
        body, problem = _check(path, folder.name, len(sound))
        if not problem and body["name"] not in sound:
            sound[body["name"]] = path
            continue
        problem = problem or "it is there twice"
        later = next((i for i, other in enumerate(written) if _supersedes(other, folder.name)), None)
        if later is not None:
            logger.warning("%s: %s. It is dropped; what was written after it needs it not.", path, problem)
            gone += [path, *sound.values(), *written[:later]]
            sound, written = {}, written[later:]
            continue
        last = list(sound)[-1:]
        logger.warning(
            "%s: %s. It and the %d entries of %s after it are dropped; the run goes on %s.",
            path,
            problem,
            len(written),
            folder.name,
            f"after {last[0]!r}" if last else f"from the beginning of {folder.name}",
        )
        gone += [path, *written]
        break
    for path in reversed(gone):
        _remove(path)
    stems = {path.stem for path in sound.values()}
    for path in folder.iterdir():  # of a killed writer, which had not come to the JSON file
        if path.name.endswith((TEMPORARY, SUFFIX)) and path.name.removesuffix(SUFFIX) not in stems:
            path.unlink()
    sync_folder(folder)  # or entries yet to be written could find these behind them after a power cut
    return sound


def _supersedes(path: Path, stage: str) -> bool:
    """Whether an entry is sound, and needs none before it."""
    body, problem = _check(path, stage, -1)
    return not problem and body.get("supersedes") is True


def _check(path: Path, stage: str, sequence: int) -> tuple[dict[str, Any], str]:
    """What an entry's JSON file says, and what is wrong with the entry; nothing if that is empty."""
    file, size, checksum = path, 0, 0
    try:
        body = unsealed(file.read_bytes())
        if body is None or not isinstance(body.get("name"), str) or not isinstance(body.get("content"), dict):
            return {}, "it is damaged"
        expected = _sequence(path) if body.get("supersedes") is True else sequence
        if (body.get("stage"), body.get("sequence")) != (stage, expected):
            return body, f"entry {sequence} is missing before it"
        file = _tensors(path)
        with file.open("rb") as stream:
            while piece := stream.read(PIECE):
                size += len(piece)
                checksum = zlib.crc32(piece, checksum)
    except PermissionError:  # not the entry's fault
        raise
    except OSError as error:
        return {}, f"{file.name} cannot be read ({error.strerror})"
    if size != body.get("bytes"):
        return body, f"{file.name} has {size} bytes, not {body.get('bytes')}"
    if checksum != body.get("crc32"):
        return body, f"{file.name} is damaged, its checksum differs"
    return body, ""


def _sequence(path: Path) -> int:
    """An entry's number in its stage, which its file's name begins with."""
    number = path.name.partition("-")[0]
    return int(number) if number.isdecimal() else -1


def _tensors(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".json") + SUFFIX)


def _remove(path: Path) -> None:
    # The JSON file first: without it the tensors count for nothing.
    path.unlink(missing_ok=True)
    _tensors(path).unlink(missing_ok=True)
