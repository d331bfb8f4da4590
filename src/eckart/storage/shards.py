"""The weight files of a folder, checked without loading a tensor.

Headers follow https://huggingface.co/docs/safetensors/index#format: eight bytes of length, that much
JSON, then the tensors without gaps.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from eckart.errors import CheckpointError
from eckart.storage.layout import is_there, read_json, stays_inside, unsafe

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEADER_LIMIT = 100_000_000
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
DISTRIBUTED = "shard-[0-9][0-9][0-9][0-9][0-9]-model-*-of-*.safetensors"
AGAIN = "Download the folder again, or save the model again with save_pretrained."
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


class TensorEntry(NamedTuple):
    """One tensor as its file's header describes it."""

    dtype: str
    shape: tuple[int, ...]
    file: Path


@dataclass
class StoredWeights:
    """The weight files of a folder: what they hold, and what is odd but not wrong."""

    files: list[Path]
    tensors: dict[str, TensorEntry]
    warnings: list[str] = field(default_factory=list)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Read and check the header of one safetensors file; its tensors are not touched.

    Args:
        path: the file.

    Returns:
        The tensors by name.

    Raises:
        CheckpointError: the header is too large, garbled, inconsistent, or does not match the file's size.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8:
                raise CheckpointError(f"{path} is truncated: {size} bytes, too short for a safetensors header. {AGAIN}")
            if length > HEADER_LIMIT:
                raise CheckpointError(
                    f"{path} announces a header of {length} bytes; the limit is {HEADER_LIMIT}. The file is "
                    f"damaged, hostile or no safetensors file. {AGAIN}"
                )
            if 8 + length > size:
                raise CheckpointError(
                    f"{path} is truncated: its header needs {8 + length} bytes, the file has {size}. {AGAIN}"
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}). Check its permissions.") from error
    try:
        header = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique
        )  # bytes could be UTF-16, which others refuse
        for name in header if isinstance(header, dict) else ():
            name.encode()  # half a character can be no name
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"The safetensors header of {path} is garbled ({error}). {AGAIN}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"The safetensors header of {path} is garbled (not an object). {AGAIN}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"The safetensors header of {path} is garbled (__metadata__ is not of texts). {AGAIN}")
    spans = {name: _span(path, name, entry) for name, entry in header.items()}
    position = 0
    for name, (start, end) in sorted(spans.items(), key=lambda item: item[1]):
        if start != position:
            what = "overlaps the tensor before it" if start < position else "leaves a gap before it"
            raise CheckpointError(f"Tensor {name!r} in {path} {what} (offset {start}, expected {position}). {AGAIN}")
        position = end
    expected = 8 + length + position
    if size != expected:
        what = "is truncated" if size < expected else "has bytes that no tensor owns"
        raise CheckpointError(f"{path} {what}: {expected} bytes expected, {size} found. {AGAIN}")
    return {name: TensorEntry(entry["dtype"], tuple(entry["shape"]), path) for name, entry in header.items()}


def read_weights(folder: Path, explicit: str | None = None) -> StoredWeights:
    """Find and check every weight file that transformers would read from a folder.

    ``model.safetensors`` wins over an index, as in transformers.

    Args:
        folder: the folder with ``config.json``.
        explicit: ``transformers_weights`` of the config, which names the weight file or index itself.

    Returns:
        The files, the tensors and what is odd about them.

    Raises:
        CheckpointError: there is nothing safe to read, a file is damaged or leaves the folder, or shards or
            tensors are missing; all problems are listed.
    """
    if sharded := sorted(path.name for path in folder.glob(DISTRIBUTED)):
        raise CheckpointError(
            f"{folder} holds a torch.distributed checkpoint ({sharded[0]} and others), which is pickled and "
            "which transformers would prefer to safetensors. Save the model again with "
            "save_pretrained(...)."
        )
    warnings: list[str] = []
    if explicit is not None and (not isinstance(explicit, str) or unsafe(explicit)):
        raise CheckpointError(
            f"transformers_weights in {folder / 'config.json'} is {explicit!r}, which leaves the folder. Do "
            "not load this model: get it again from a source you trust."
        )
    single = folder / (explicit or SINGLE)
    index = folder / (explicit or INDEX)
    if is_there(single) and single.suffix == ".safetensors":
        if explicit is None and is_there(index):
            warnings.append(
                f"{folder} has both {SINGLE} and {INDEX}: {SINGLE} is read and the index ignored, as "
                "transformers does. Delete the one that is stale."
            )
        weights = _read_files(folder, [single.name if explicit is None else explicit], None, warnings)
    elif is_there(index) and index.suffix == ".json":
        mapping = _weight_map(index)
        weights = _read_files(folder, sorted(set(mapping.values())), mapping, warnings)
    else:
        raise CheckpointError(_nothing(folder, explicit))
    unread = sorted({path.name for path in folder.glob("*.safetensors")} - {path.name for path in weights.files})
    if unread:
        weights.warnings.append(f"{folder}: not read, because nothing refers to them: {', '.join(unread)}.")
    return weights


def _read_files(folder: Path, names: list[str], mapping: dict[str, str] | None, warnings: list[str]) -> StoredWeights:
    """Read the headers of all files, hold them against the index, and raise once with all problems."""
    problems: list[str] = []
    weights = StoredWeights([], {}, warnings)
    where: dict[str, list[str]] = {}
    for name in names:
        path = folder / name
        if not stays_inside(path, folder):
            raise CheckpointError(
                f"{path} is a link to {path.resolve()}, outside the folder. Copy the file into the folder "
                "if you trust it."
            )
        if not is_there(path):
            problems.append(f"shard {name} is missing")
            continue
        try:
            header = read_header(path)
        except CheckpointError as error:
            problems.append(str(error).removesuffix(f" {AGAIN}"))
            continue
        weights.files.append(path)
        for tensor, entry in header.items():
            where.setdefault(tensor, []).append(name)
            weights.tensors[tensor] = entry
    problems += _against_index(folder, where, mapping, names, weights) if mapping is not None else []
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise CheckpointError(f"The weights in {folder} are not complete and sound:{listed}\n{AGAIN}")
    return weights


def _against_index(
    folder: Path, where: dict[str, list[str]], mapping: dict[str, str], names: list[str], weights: StoredWeights
) -> list[str]:
    """Problems between the index and the shards; what transformers reads all the same becomes a warning."""
    read = {str(path.relative_to(folder)) for path in weights.files}
    problems = [
        f"tensor {tensor} is missing from {name}"
        for tensor, name in mapping.items()
        if tensor not in where and name in read
    ]
    lost = [tensor for tensor, name in mapping.items() if tensor not in where and name not in read]
    if lost:
        problems.append(f"{len(lost)} tensors are in shards that cannot be read: {', '.join(sorted(lost))}")
    extra = sorted(set(where) - set(mapping))
    if extra:
        weights.warnings.append(f"{folder}: tensors that the index does not name: {', '.join(extra)}.")
    for tensor, files in where.items():
        if len(files) > 1:
            weights.warnings.append(f"{folder}: tensor {tensor} is in several shards: {', '.join(files)}.")
        elif tensor in mapping and mapping[tensor] not in files:
            weights.warnings.append(f"{folder}: tensor {tensor} is in {files[0]}, the index says {mapping[tensor]}.")
    return problems


def _weight_map(index: Path) -> dict[str, str]:
    content = read_json(index)
    mapping = content.get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise CheckpointError(f"{index} has no weight_map. {AGAIN}")
    if not isinstance(content.get("metadata"), dict):
        raise CheckpointError(
            f'{index} has no "metadata", without which transformers does not read it. Add "metadata": {{}} to it, or '
            "download the file again."
        )
    for tensor, name in mapping.items():
        if not isinstance(name, str) or unsafe(name):
            raise CheckpointError(
                f"{index} places tensor {tensor!r} in {name!r}, which leaves the folder. Do not load this "
                "model: get it again from a source you trust."
            )
        if not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index} places tensor {tensor!r} in {name!r}, which is not a safetensors file. "
                f"{_conversion(index.parent)}"
            )
    return mapping


def _span(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """The byte range of a tensor, after checking that its entry makes sense."""
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        sound = (
            dtype in BITS
            and isinstance(shape, list)
            and len(shape) <= 64
            and all(type(number) is int and 0 <= number < 2**63 for number in (*shape, start, end))
        )
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise CheckpointError(f"Tensor {name!r} in {path} has a garbled header entry: {str(entry)[:200]}. {AGAIN}")
    if (end - start) * 8 != math.prod(shape) * BITS[dtype]:
        raise CheckpointError(
            f"Tensor {name!r} in {path} is {dtype} {shape} but has {end - start} bytes (data_offsets). {AGAIN}"
        )
    return start, end


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"duplicate key {key!r}")
        content[key] = value
    return content


def _conversion(folder: Path) -> str:
    return (
        "Pickled weights run code when they are loaded, so eckart never opens them. Convert them once, on a "
        'machine you can afford to lose: python -c "from transformers import AutoModel as A; '
        f"A.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\" (with the AutoModelFor... "
        "class of the model's architecture)."
    )


def _nothing(folder: Path, explicit: str | None) -> str:
    if explicit is not None:
        config = folder / "config.json"
        return f"{config} names the weights {explicit!r}, which is not a safetensors file there. {AGAIN}"
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickled:
        return f"{folder} holds pickled weights only ({', '.join(pickled[:4])}). {_conversion(folder)}"
    listing = ", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "nothing"
    return f"{folder} holds no {SINGLE} and no {INDEX} (found: {listing}). {AGAIN}"
