"""Data sets of the Hugging Face hub."""

from __future__ import annotations

from typing import Any

import datasets

from eckart.errors import DataError

DEFAULT = ("Salesforce/wikitext", "wikitext-2-raw-v1", "text")
"""Identifier, configuration and column of what is read when no data are named."""

RUNNING_TEXT = frozenset({"Salesforce/wikitext", "wikitext"})
"""Data sets whose rows are the lines of one text, not documents of their own."""

STREAM_ABOVE = 1_000_000_000
"""Data sets of more bytes than this, or of unknown size, are streamed instead of downloaded whole."""


def open_hub(
    identifier: str, *, config: str | None, split: str, revision: str | None
) -> tuple[datasets.Dataset | datasets.IterableDataset, dict[str, Any]]:
    """Open a data set of the hub, or of the local cache when the hub is offline.

    Args:
        identifier: Such as "allenai/c4".
        config: The configuration ("subset"), where it has several.
        split: The split; slices such as "train[:10%]" are downloaded, never streamed.
        revision: Branch, tag or commit.

    Returns:
        The data set and a note of what was opened: source, config, split, revision, streamed.

    Raises:
        DataError: If it cannot be had; the message names it and what works without the hub.
    """
    try:
        builder = datasets.load_dataset_builder(identifier, config, revision=revision)
        size = builder.info.download_size or builder.info.dataset_size
        streaming = "[" not in split and (size is None or size > STREAM_ABOVE)
        data = datasets.load_dataset(identifier, config, split=split, revision=revision, streaming=streaming)
    except Exception as error:  # the hub, fsspec, httpx and the builder each raise their own
        asked = " ".join(str(part) for part in (config, f"split {split}", revision and f"revision {revision}") if part)
        reason = str(error).strip().splitlines() or [""]
        raise DataError(
            f"data set {identifier!r} ({asked}) cannot be had: {type(error).__name__}: {reason[0]} - check the name "
            "and the network, or calibrate without the hub: --data self (text the model writes itself) or "
            "--data FILE (.txt, .jsonl, .csv or .tsv of your own)"
        ) from error
    # The builder's path ends in the commit that a branch stood at: hf://datasets/NAME@COMMIT.
    _, _, commit = str(builder.base_path or "").rpartition("@")
    return data, {
        "source": identifier,
        "config": config,
        "split": split,
        "revision": commit or revision,
        "streamed": streaming,
    }
