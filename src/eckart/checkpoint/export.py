"""A factored checkpoint as an ordinary one, which loads without eckart."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from eckart.checkpoint.description import detach_config, is_special
from eckart.checkpoint.load import load
from eckart.checkpoint.save import save
from eckart.checkpoint.source import resolve
from eckart.checkpoint.tokenizer import load_tokenizer
from eckart.errors import ModelError
from eckart.model import fuse_experts, to_dense_modules
from eckart.storage.lock import OutputLock
from eckart.storage.publish import check_output


def densify(model: PreTrainedModel) -> PreTrainedModel:
    """Replace every factored weight of a model by the dense matrix that it stands for, in place.

    Weights that layers share are copied into each of them.

    Args:
        model: a model that :func:`eckart.compress` made or `from_pretrained` loaded.

    Returns:
        The same model with plain Linear and Conv1D modules; `save_pretrained` then writes an ordinary checkpoint
        that needs no eckart.

    Raises:
        ModelError: the model holds no factored weight.
    """
    to_dense_modules(model)
    fuse_experts(model)
    detach_config(model)
    return model


def export_dense(
    folder: str | Path,
    output_dir: str | Path,
    *,
    revision: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Path:
    """Publish an ordinary checkpoint in which every factored weight is multiplied out.

    Args:
        folder: a folder that eckart published, or its name on the hub.
        output_dir: the folder to be written.
        revision: revision of the model on the hub.
        overwrite: replace an output that eckart published earlier.
        trust_remote_code: accept a model that brings its own Python code.

    Returns:
        The published folder.

    Raises:
        CheckpointError: the source cannot be read or the output not be written.
        ModelError: the model is not factored.
    """
    check_output(output_dir, overwrite=overwrite, inputs=[folder])
    source = resolve(str(folder), revision, trust_remote_code=trust_remote_code)
    check_output(output_dir, overwrite=overwrite, inputs=[source])
    with OutputLock(output_dir) as lock:
        model = load(source, trust_remote_code=trust_remote_code)
        if not is_special(model):
            raise ModelError(f"{source} holds no factored weight: it loads without eckart as it is. Copy the folder.")
        densify(model)
        tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
        return save(model, output_dir, tokenizer=tokenizer, source_folder=source, overwrite=overwrite, lock=lock)
