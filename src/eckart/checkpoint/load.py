"""Load a checkpoint, and accept nothing less than all of it."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from eckart.checkpoint import plugin  # noqa: F401  registers the format
from eckart.checkpoint.compare_files import compare_with_files, listed_by_caller
from eckart.checkpoint.description import is_ours
from eckart.checkpoint.model_config import describe_unbuildable, read_model_config, require_countable
from eckart.checkpoint.source import resolve
from eckart.errors import CheckpointError, EckartError, UsageError, is_out_of_memory
from eckart.forms.transformers_internals import model_from_config
from eckart.storage.layout import model_folder, read_json
from eckart.storage.shards import read_weights

logger = logging.getLogger(__name__)


def load(
    folder: str | Path,
    *,
    auto_class: type | str | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: str | dict[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    new_head: list[str] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Load a model, factored or dense, in the class it was saved with.

    ``from_pretrained`` warns of weights that are missing and draws them at random; here that is an error. Tensors
    that an ordinary checkpoint holds and its own class does not use (an old head, say) are warned of.

    Args:
        folder: a folder, or a name on the hub.
        auto_class: another class, such as ``AutoModel`` or ``"AutoModel"``.
        dtype: as in ``from_pretrained``; the default is that of the checkpoint.
        device_map: as in ``from_pretrained``.
        revision: on the hub.
        trust_remote_code: allow the model's own Python code to run.
        new_head: a list: the head of another class may be missing, is drawn from torch's random state, and its
            tensors' names are put into the list.
        settings: fields of the configuration to be changed, such as `num_labels` of a new head.

    Returns:
        The model in eval mode.

    Raises:
        CheckpointError: the folder is damaged, or does not hold exactly the model's weights.
        UsageError: the class is unknown to transformers.
    """
    home = model_folder(resolve(str(folder), revision, trust_remote_code=trust_remote_code))
    config = read_json(home / "config.json")
    tensors = read_weights(home, config.get("transformers_weights")).tensors
    read = read_model_config(home, trust_remote_code=trust_remote_code, settings=settings)
    architectures = config.get("architectures") or []
    remote = _remote_class(config, architectures) if trust_remote_code and auto_class is None else None
    chosen = remote or _class(auto_class, architectures, home)
    if not config.get("quantization_config") or _is_factored(config):
        require_countable(read, home, len(tensors))
        if not _is_factored(config):  # else it is compared when its modules are in place: here they have other shapes
            whole = new_head is None and auto_class is None
            compare_with_files(_on_meta(chosen, read, home, trust_remote_code), tensors, home, whole=whole)
    try:
        with listed_by_caller():
            model, info = chosen.from_pretrained(
                home,
                config=read,
                dtype=dtype or "auto",
                device_map=device_map,
                trust_remote_code=trust_remote_code,  # False instead of a question on the terminal
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that they come back by name and are refused below
            )
    except (EckartError, OSError, ImportError):
        raise
    except Exception as error:  # each class, and each quantizer, stops at its fields in its own way
        if is_out_of_memory(error):
            raise
        raise describe_unbuildable(home, chosen.__name__, error) from error
    missing = sorted(info["missing_keys"])
    if new_head is not None:
        new_head += [key for key in missing if _of_head(model, key)]
        missing = [key for key in missing if not _of_head(model, key)]
    missing = _leave_out_pooler(model, missing)
    # Another class than the one that was saved leaves out the other's head.
    left_out = sorted(info["unexpected_keys"]) if type(model).__name__ in architectures else []
    if left_out and not _is_factored(config):
        listed = f"{', '.join(left_out[:4])}{', ...' if len(left_out) > 4 else ''}"
        logger.warning("%s: %s does not use %d tensors: %s", home, type(model).__name__, len(left_out), listed)
        left_out = []
    wrong = {
        "are missing": missing,
        "have no place": left_out,
        "have another shape": [
            f"{key} {tuple(found)} instead of {tuple(expected)}"
            for key, found, expected in sorted(info["mismatched_keys"])
        ],
    }
    if any(wrong.values()):
        parts = [f"{len(keys)} tensors {what}: {', '.join(keys)}" for what, keys in wrong.items() if keys]
        raise CheckpointError(
            f"{home} does not hold exactly the weights of {type(model).__name__}. {'; '.join(parts)}. Load "
            f"it as {' or '.join(architectures) or 'the class it was saved with'}, or download it again."
        )
    return model.eval()


def blank(folder: str | Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model without its numbers, on the meta device: its modules can be asked, and nothing is read.

    Args:
        folder: a folder.
        trust_remote_code: allow the model's own Python code to run.

    Raises:
        CheckpointError: the config names no class.
        UsageError: the class is unknown to transformers.
    """
    home = model_folder(Path(folder))
    content = read_json(home / "config.json")
    architectures = content.get("architectures") or []
    remote = _remote_class(content, architectures) if trust_remote_code else None
    config = read_model_config(home, trust_remote_code=trust_remote_code)
    require_countable(config, home, len(read_weights(home, content.get("transformers_weights")).tensors))
    return _on_meta(remote or _class(None, architectures, home), config, home, trust_remote_code)


def _on_meta(chosen: Any, config: Any, home: Path, trust_remote_code: bool) -> PreTrainedModel:
    """A model of a class without numbers; the class is one of transformers, or an Auto class."""
    try:
        with torch.device("meta"):
            if hasattr(chosen, "from_config"):
                built: PreTrainedModel = chosen.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
                return built
            return model_from_config(chosen, copy.deepcopy(config))
    except EckartError:
        raise
    except Exception as error:  # whatever a class makes of a configuration
        raise describe_unbuildable(home, chosen.__name__, error) from error


def _of_head(model: PreTrainedModel, key: str) -> bool:
    """Whether a tensor is outside the bare model, or in its pooler, which only some heads read."""
    prefix = f"{model.base_model_prefix}."
    return model.base_model is not model and (not key.startswith(prefix) or key.startswith(f"{prefix}pooler."))


def _leave_out_pooler(model: PreTrainedModel, missing: list[str]) -> list[str]:
    """Make an encoder what it was when it was saved without its pooler, whose output its users do not read.

    Returns:
        The tensors that are missing all the same.
    """
    left = set(missing)
    owner: Any = model.base_model
    pooler = getattr(owner, "pooler", None)
    optional = "add_pooling_layer" in inspect.signature(type(owner).__init__).parameters
    if not left or pooler is None or not optional or model.base_model is not model:  # a head on it reads the pooler
        return missing
    own = {name for name, tensor in model.named_parameters() if any(tensor is each for each in pooler.parameters())}
    if own <= left:
        owner.pooler = None
        left -= own
    return sorted(left)


def _is_factored(config: dict[str, Any]) -> bool:
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and is_ours(quantization.get("quant_method"))


def _remote_class(config: dict[str, Any], architectures: list[str]) -> Any:
    """The Auto class under which a config names its own code; None where it names none."""
    given = config.get("auto_map")
    entries = given.items() if isinstance(given, dict) else ()
    named = {key: entry for key, entry in entries if key.startswith("AutoModel")}
    own = [key for key, entry in named.items() if str(entry).rpartition(".")[2] in architectures]
    return getattr(transformers, next(iter([*own, *named])), None) if named else None


def _class(auto_class: type | str | None, architectures: list[str], home: Path) -> Any:
    """The class to load with: the one asked for, or the architecture that the config names."""
    if isinstance(auto_class, type):
        return auto_class
    if auto_class is None and not architectures:
        raise CheckpointError(
            f"{home / 'config.json'} names no architectures. Add the class that the model was saved with, such as "
            '"architectures": ["LlamaForCausalLM"], or give it from Python: auto_class="AutoModel".'
        )
    name = auto_class or architectures[0]
    found = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not isinstance(found, type) or not hasattr(found, "from_pretrained"):
        where = "auto_class" if auto_class else f"architectures in {home / 'config.json'}"
        kind = UsageError if auto_class else CheckpointError
        remedy = "Give a class that it has: auto_class='AutoModelForCausalLM', or upgrade transformers."
        if read_json(home / "config.json").get("auto_map"):
            remedy = (
                "The model brings its own Python code (auto_map in config.json): read it, and pass "
                "--trust-remote-code (trust_remote_code=True)."
            )
        raise kind(f"transformers {transformers.__version__} has no model class {name!r} ({where}). {remedy}")
    return found
