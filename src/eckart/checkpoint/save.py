"""The whole published folder: model, tokenizer, what the source had beside its weights, report and card."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter

from eckart.adaptive import adaptive_spec
from eckart.checkpoint.description import METHOD, attach_config, described, detach_config, is_special, quantization_of
from eckart.checkpoint.read_back import read_back_in_fresh_process, write_record
from eckart.checkpoint.stored import stored_size
from eckart.errors import CheckpointError, UsageError
from eckart.forms.transformers_internals import has_adapters, names_not_saved, weight_conversions
from eckart.model import factored_modules, shared_parameters
from eckart.storage.layout import model_folder, read_json, sentence_modules, stays_inside
from eckart.storage.lock import OutputLock, output_path
from eckart.storage.publish import publish
from eckart.storage.report_file import finite
from eckart.storage.shards import read_weights

# Carried over by suffix, so that no weight, pickle or program comes along under any name.
CARRIED = {".json", ".jinja", ".model", ".tiktoken", ".spm", ".bpe", ".vocab"}
# Other text files beside a model may be anything: training data, say.
CARRIED_NAMES = {"LICENSE", "NOTICE", "LICENSE.md", "LICENSE.txt", "vocab.txt", "merges.txt", "dict.txt"}
STALE = {"config.json", "adapter_config.json", "trainer_state.json", "all_results.json", "train_results.json",
         "eval_results.json", "quantize_config.json"}  # fmt: skip
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}


def save(
    model: PreTrainedModel,
    output_dir: str | Path,
    *,
    tokenizer: Any = None,
    processor: Any = None,
    source_folder: str | Path | None = None,
    recipe_yaml: str | None = None,
    plan: Mapping[str, Any] | None = None,
    report: Mapping[str, Any] | None = None,
    report_html: str | None = None,
    card: str | None = None,
    inputs: Sequence[Any] = (),
    overwrite: bool = False,
    max_shard_size: int | str = "50GB",
    lock: OutputLock | None = None,
    verify: bool = False,
    trust_remote_code: bool = False,
) -> Path:
    """Publish a model, factored or dense, as one folder; on any error nothing is published.

    Args:
        model: the model; its forms are described in ``config.json``.
        output_dir: the folder to be published.
        tokenizer: saved with it; without one the source's files are carried over.
        processor: saved with it, likewise.
        source_folder: where the model came from; what lies beside its weights is carried over.
        recipe_yaml: ``eckart/recipe.yaml``.
        plan: ``eckart/plan.json``.
        report: ``eckart/report.json``; numbers that are not finite are written as strings.
        report_html: ``eckart/report.html``.
        card: ``README.md``, see :func:`eckart.report.card.render_model_card`.
        inputs: what the run has read, which is never replaced: see :func:`eckart.storage.publish.check_output`. The
            source, and the folder that the model was loaded from, are added.
        overwrite: replace a folder that eckart published earlier.
        max_shard_size: as in ``save_pretrained``. Tensors that lie in files take the memory of one shard at most.
        lock: the lock on ``output_dir`` if the caller holds it.
        verify: let a fresh process read the folder back before it is put in place.
        trust_remote_code: allow the model's own Python code to run there.

    Returns:
        The published folder.

    Raises:
        CheckpointError: the folder cannot be published, or what was written is not the model.
        UsageError: the model is no ``PreTrainedModel``, or has adapters.
    """
    check_savable(model, source_folder)
    size = stored_bytes(model)
    inputs = [*inputs, source_folder, model.config.name_or_path]
    with publish(output_dir, overwrite=overwrite, inputs=inputs, needed_bytes=size + size // 20, lock=lock) as staging:
        write(model, staging, tokenizer=tokenizer, processor=processor, source_folder=source_folder,
              max_shard_size=max_shard_size)  # fmt: skip
        _write_records(staging, recipe_yaml, plan, report, report_html)
        if card is not None:
            (staging / "README.md").write_text(card, encoding="utf-8")
        write_record(staging, model)
        if verify:
            read_back_in_fresh_process(staging, trust_remote_code=trust_remote_code)
    return output_path(output_dir)


def check_savable(model: PreTrainedModel, source_folder: str | Path | None = None) -> None:
    """Refuse a model that is no checkpoint of its own, or whose folder holds pickled modules.

    Raises:
        CheckpointError: a module of the source folder is pickled.
        UsageError: the model is no ``PreTrainedModel``, or has adapters.
    """
    if not isinstance(model, PreTrainedModel) or has_adapters(model):
        raise UsageError(
            f"{type(model).__name__} cannot be published as a checkpoint of its own. Give the transformers "
            "model; merge adapters first: model.merge_and_unload()."
        )
    if source_folder is not None:
        _refuse_pickled_modules(Path(source_folder))


def stored_bytes(model: PreTrainedModel) -> int:
    """Bytes of the tensors that a checkpoint of the model holds."""
    return sum(tensor.numel() * tensor.element_size() for _, tensor in _state(model))


def write(
    model: PreTrainedModel,
    staging: Path,
    *,
    tokenizer: Any = None,
    processor: Any = None,
    source_folder: str | Path | None = None,
    max_shard_size: int | str = "50GB",
) -> Path:
    """Write weights, config, tokenizer and what the source has beside them into a folder, and check what was written.

    Args:
        model: as of :func:`save`, like the other arguments.
        staging: an empty folder.
        tokenizer: saved with it.
        processor: saved with it.
        source_folder: where the model came from.
        max_shard_size: of a file of weights.

    Returns:
        The folder inside ``staging`` that holds ``config.json``.

    Raises:
        CheckpointError: what was written is not the model.
    """
    (attach_config if is_special(model) else detach_config)(model)
    source = Path(source_folder) if source_folder is not None else None
    inner = model_folder(source).relative_to(source) if source is not None else Path()
    home = staging / inner
    home.mkdir(parents=True, exist_ok=True)
    with _shard_by_shard(model):
        model.save_pretrained(home, max_shard_size=max_shard_size)
    write_companions(staging, tokenizer=tokenizer, processor=processor, source_folder=source)
    _verify(model, home)
    return home


def write_companions(
    staging: Path, *, tokenizer: Any = None, processor: Any = None, source_folder: str | Path | None = None
) -> None:
    """Write what goes beside a model: tokenizer, processor, and the source's own files that are not there yet."""
    source = Path(source_folder) if source_folder is not None else None
    inner = model_folder(source).relative_to(source) if source is not None else Path()
    home = staging / inner
    home.mkdir(parents=True, exist_ok=True)
    for part in (tokenizer, processor):
        if part is not None:
            part.save_pretrained(home)
    if source is not None:
        _carry(source, staging, inner, () if tokenizer is None else _tokenizer_files(tokenizer))


def _write_records(
    folder: Path,
    recipe_yaml: str | None,
    plan: Mapping[str, Any] | None,
    report: Mapping[str, Any] | None,
    report_html: str | None,
) -> None:
    files = {"recipe.yaml": recipe_yaml, "report.html": report_html}
    for name, content in (("plan.json", plan), ("report.json", report)):
        if content is not None:
            files[name] = json.dumps(finite(content), indent=2, allow_nan=False, default=str) + "\n"
    for name, text in files.items():
        if text is not None:
            (folder / "eckart").mkdir(exist_ok=True)
            (folder / "eckart" / name).write_text(text, encoding="utf-8")


@contextmanager
def _shard_by_shard(model: PreTrainedModel) -> Iterator[None]:
    """Let ``save_pretrained`` take fused weights apart one shard at a time, not all of them before the first.

    transformers does so for models that it believes to be offloaded. It cannot where a stored tensor is made of several
    of the model's, which may be in different shards.
    """
    fused = [conversion for conversion in weight_conversions(model) if isinstance(conversion, WeightConverter)]
    apart = all(
        len(conversion.target_patterns) == 1 and "*" not in conversion.target_patterns[0] for conversion in fused
    )
    if not fused or not apart or hasattr(model, "hf_device_map"):
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
        model.hf_device_map = {"": "cpu"}  # type: ignore[assignment]
        try:
            yield
        finally:
            del model.hf_device_map


def _state(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a checkpoint of the model holds, tied ones once."""
    state = model.state_dict()
    tied = {key for key, origin in model.all_tied_weights_keys.items() if key in state and origin in state}
    tied |= {key for key in shared_parameters(model) if state[key].is_meta}  # elsewhere one place in memory says so
    seen = set()
    for name, tensor in state.items():
        if name in tied or name in names_not_saved(model):
            continue
        if not tensor.is_meta and tensor.numel():
            place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
            if place in seen:
                continue
            seen.add(place)
        yield name, tensor


def _verify(model: PreTrainedModel, folder: Path) -> None:
    """Hold what was written against the model in memory."""
    written = read_weights(folder).tensors
    expected = dict(_state(model))
    there = stored_size(written)
    here = sum(tensor.numel() for tensor in expected.values()), sum(tensor.nbytes for tensor in expected.values())
    if there != here:
        raise CheckpointError(
            f"{there[0]:,} numbers ({there[1]:,} bytes) were written to {folder}, but the model holds {here[0]:,} "
            f"({here[1]:,} bytes); nothing was published. Please report this with the model's name and the output of "
            "`pip list`."
        )
    lost, new = set(expected) - set(written), set(written) - set(expected)
    guards = sum(0 in entry.shape for entry in written.values())
    # Some models have other names in their checkpoints than in their modules: then both sets are filled.
    if (lost and not new) or guards < len(factored_modules(model)):
        raise CheckpointError(
            f"Tensors are missing from what was written to {folder}: {', '.join(sorted(lost)[:8])}; nothing "
            "was published. Please report this with the model's name."
        )
    said = read_json(folder / "config.json").get("quantization_config") or {}
    here_said = described(model), shared_parameters(model), quantization_of(model), adaptive_spec(model)
    if (said.get("modules", {}), said.get("ties", {}), said.get("quantization"), said.get("adaptive")) != here_said:
        raise CheckpointError(
            f"quantization_config in {folder / 'config.json'} does not describe the factored modules "
            f"({METHOD}); nothing was published. Please report this with the model's name."
        )


def _carry(source: Path, staging: Path, inner: Path, replaced: tuple[str, ...]) -> None:
    """Copy what lies beside the weights and is not written already: the top, and the modules' own folders."""
    modules = {Path(name) for name in sentence_modules(source) or ()} - {Path()}
    folders = {Path(), inner, *modules, Path("additional_chat_templates")}
    for folder in sorted(folders):
        own = folder in modules and folder != inner  # pooling, dense layers: theirs, weights included
        for path in sorted((source / folder).iterdir()) if (source / folder).is_dir() else ():
            name = folder / path.name
            wanted = path.suffix in CARRIED or path.name in CARRIED_NAMES
            stale = path.name in STALE or path.name.endswith(".index.json") or path.name in replaced
            wanted = path.suffix in {".json", ".txt", ".safetensors"} if own else wanted and not stale
            hidden = path.name.startswith(".")
            inside = path.is_file() and stays_inside(path, source)
            if wanted and inside and not hidden and not (staging / name).exists():
                (staging / folder).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, staging / name)


def _tokenizer_files(tokenizer: Any) -> tuple[str, ...]:
    """What a tokenizer writes: the source's versions must not be mixed with a changed tokenizer."""
    return (*TOKENIZER, *getattr(tokenizer, "vocab_files_names", {}).values())


def _refuse_pickled_modules(source: Path) -> None:
    """A sentence-transformers module with pickled weights cannot be carried over."""
    for name in sentence_modules(source) or ():
        pickled, safe = source / name / "pytorch_model.bin", source / name / "model.safetensors"
        if name and safe.parent != model_folder(source) and pickled.is_file() and not safe.is_file():
            raise CheckpointError(
                f"{pickled} is pickled, and eckart publishes no pickles. Convert the source first: "
                f"SentenceTransformer('{source}').save('{source.name}-safetensors')"
            )
