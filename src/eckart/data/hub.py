"""Data sets of the Hugging Face hub."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eckart.data.rows import SUFFIXES
from eckart.errors import DataError

if TYPE_CHECKING:
    import datasets

DEFAULT = ("Salesforce/wikitext", "wikitext-2-raw-v1", "text")
"""Identifier, configuration and column of the default data set."""

RUNNING_TEXT = frozenset({"Salesforce/wikitext", "wikitext"})
"""Data sets whose rows are lines of one text, not separate documents."""

STREAM_ABOVE = 1_000_000_000
"""Data sets of more bytes than this, or of unknown size, are streamed instead of downloaded."""


def open_hub(
    identifier: str, *, config: str | None, split: str, revision: str | None
) -> tuple[datasets.Dataset | datasets.IterableDataset, dict[str, Any]]:
    """Open a data set of the hub, or of the local cache if the hub cannot be reached.

    Args:
        identifier: Such as "allenai/c4".
        config: The configuration ("subset"), if it has several.
        split: The split; slices such as "train[:10%]" are downloaded, not streamed.
        revision: Branch, tag or commit.

    Returns:
        The data set, and a description: source, config, split, revision, streamed.

    Raises:
        DataError: If it cannot be opened; the message names it and what works without the hub.
    """
    import datasets  # takes seconds
    from datasets import packaged_modules

    if identifier in getattr(packaged_modules, "_PACKAGED_DATASETS_MODULES", ()):
        raise DataError(
            f"data set {identifier!r} is a file format of the datasets library, which would read every such file "
            f"in the current folder{_ask_near(identifier)}: name a file or a folder of your own, or a data set on the "
            "hub"
        )
    try:
        builder = datasets.load_dataset_builder(identifier, config, revision=revision)
        size = builder.info.download_size or builder.info.dataset_size
        streaming = "[" not in split and (size is None or size > STREAM_ABOVE)
        data = datasets.load_dataset(identifier, config, split=split, revision=revision, streaming=streaming)
    except Exception as error:  # the hub, fsspec, httpx and the builder each raise their own
        asked = " ".join(str(part) for part in (config, f"split {split}", revision and f"revision {revision}") if part)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"data set {identifier!r} ({asked}) cannot be opened: {reason}{_ask_near(identifier)} - check the name and "
            "the network, or calibrate without the hub: --data self (text that the model samples) or "
            "--data FILE (.txt, .jsonl, .csv or .tsv of your own)"
        ) from error
    # The builder's path ends in the commit that the branch is at: hf://datasets/NAME@COMMIT.
    _, _, commit = str(builder.base_path or "").rpartition("@")
    return data, {
        "source": identifier,
        "config": config,
        "split": split,
        "revision": commit or revision,
        "streamed": streaming,
    }


def _ask_near(name: str) -> str:
    """A question after the file or folder here whose name is nearest to that of a data set that is not there."""
    try:
        found = sorted(path.name for path in Path.cwd().iterdir() if path.suffix.lower() in SUFFIXES or path.is_dir())
    except OSError:
        return ""
    near = get_close_matches(name, found, 1)
    return f"; did you mean --data {near[0]}?" if near else ""
