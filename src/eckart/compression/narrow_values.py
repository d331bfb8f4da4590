"""Narrower value heads, for models whose configuration says how wide they are: the result is a model of its class."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eckart.calibration import why_useless
from eckart.compression.open_run import keep_unchanged, open_run
from eckart.compression.options import combine_options
from eckart.compression.prepare import prepare
from eckart.compression.settings import Settings
from eckart.data.inference import dummy_inputs
from eckart.errors import UsageError
from eckart.linalg import Problem, narrow_heads
from eckart.methods import Method, method_named
from eckart.model import Site, dense_weight, find_sites, unshare_storage
from eckart.model.value_heads import ValueHeads, find_head_width, narrowed_model, possible_head_widths
from eckart.moments import Moments

logger = logging.getLogger(__name__)

OPTIONS = frozenset(
    {"curvature", "seed", "device", "num_samples", "max_seq_length", "batch_size", "revision", "trust_remote_code"}
    | {f"data_{part}" for part in ("config", "split", "column", "target_column", "label_column", "revision")}
)
"""Fields of a recipe that :func:`narrow_value_heads` takes: what to read, and how it is measured."""

UNREACHED = "no token of the calibration data reached it"


@dataclass(frozen=True)
class NarrowedModel:
    """A model with narrower value heads.

    Attributes:
        model: of the same class as before; `model.save_pretrained` writes a checkpoint that transformers alone loads.
        key: of its configuration, the number that says how wide its value heads are.
        before: that number in the original.
        width: that number now.
        lost: output projection -> the share of its output that is lost, in the metric of the method.
        curves: output projection -> (before + 1,) that share with 0, 1, ..., all numbers a head.
        notes: fallbacks.
    """

    model: PreTrainedModel
    key: str
    before: int
    width: int
    lost: Mapping[str, float]
    curves: Mapping[str, Tensor] = field(repr=False)
    notes: tuple[str, ...] = ()


def narrow_value_heads(
    model: PreTrainedModel | str | Path,
    tokenizer: Any = None,
    *,
    width: int,
    data: Any = None,
    method: str | Method = "eckart",
    report_progress: Callable[[str], None] = logger.info,
    **options: Any,
) -> NarrowedModel:
    """Narrow the value heads of a model whose code lets them have a size of their own.

    So it is with `v_head_dim` of DeepSeek-V2 and V3 and their relatives; which number it is, and that it is one, is
    tried. Values and output projection are solved together: the values of head h become P_h v_h, r numbers in place of
    d, and the output projection is the best one for them,

        minimize over P, W'  || H^(1/2) (W - W' P) C^(1/2) ||_F^2,

    with P_h the leading directions of `H^(1/2) W_h C_h^(1/2)` (see :mod:`eckart.linalg.value_heads`). All layers keep
    one width, for the configuration has one number. The result is an ordinary model, smaller and faster by what it
    stores less, also in its cache where that holds values; :func:`compress` may factor it further.

    Args:
        model: a transformers model in any floating-point type, which stays as it is, or the folder or hub name of one;
            not yet compressed. It has to fit into memory.
        tokenizer: needed where a model in memory is calibrated on text.
        width: r, at least 1 and less than there is. Multiples of 8 or 16 are what hardware likes.
        data: to calibrate on, as for :func:`compress`.
        method: whose metric is used.
        report_progress: called with a line on how the model is worked on.
        **options: fields of :class:`eckart.Recipe` that say what is read and how it is measured, such as `num_samples`.

    Returns:
        The model, and what each layer loses.

    Raises:
        UsageError: the model has no such heads, with the reason; the width or an option cannot be.
        EckartError: data or numbers cannot be used.
    """
    if strange := sorted(set(options) - OPTIONS):
        raise UsageError(
            f"eckart.narrow_value_heads: {strange[0]} is no option of it. It takes {', '.join(sorted(OPTIONS))}."
        )
    recipe = combine_options(
        None, {"keep": 1.0, **options}, model=model, data=data, method=method, where="eckart.narrow_value_heads"
    )
    settings = Settings(method_named(recipe.method), "lowrank", "uniform", refit=False)
    with (
        keep_unchanged(model),
        open_run(model, tokenizer, data, recipe, [settings], report_progress=report_progress) as run,
    ):
        possible = possible_head_widths(run.model, find_sites(run.model).chosen)
        found = find_head_width(run.model, possible, _small_batch(run.model))
        if not 1 <= width < found.width:
            raise UsageError(
                f"width={width}: value heads of this model have {found.width} numbers (config.{found.key}); give at "
                f"least 1 and at most {found.width - 1}."
            )
        by_reader = {layer.reader: layer for layer in found.layers}
        readers = recipe.model_copy(update={"targets": tuple(by_reader)})
        context = prepare(replace(run, recipe=readers), data, [settings], [recipe.keep])
        metric = context.adapt_settings(settings).method
        sites = {site.name: site for site in context.sites.chosen}
        solved: dict[str, _Solved] = {}
        for window in context.calibration.windows():
            for name in list(window.moments):
                solved[name] = _solve(by_reader[name], sites[name], run.model, metric, window.moments.pop(name), width)
        for name, site in sites.items():  # all of them, where the method reads no data
            if name not in solved:
                solved[name] = _solve(by_reader[name], site, run.model, metric, None, width)
        made = narrowed_model(run.model, found, width, {name: one.weights for name, one in solved.items()})
        unshare_storage(made, run.model)
    curves = {name: solved[name].curve for name in by_reader}
    notes = [*context.calibration.notes, *(note for one in solved.values() for note in one.notes)]
    lost = {name: float(curve[width]) for name, curve in curves.items()}
    return NarrowedModel(made, found.key, found.width, width, lost, curves, tuple(notes))


def _small_batch(model: PreTrainedModel) -> dict[str, Tensor]:
    """A few tokens that the model reads.

    Raises:
        UsageError: it reads none.
    """
    inputs = {name: tensor.to(model.device) for name, tensor in dummy_inputs(model).items()}
    try:
        with torch.no_grad():
            model(**inputs)
    except Exception as error:
        raise UsageError(
            f"{type(model).__name__}: no small pass runs through it ({type(error).__name__}: {error}), and only such a "
            "pass shows which values may be narrower."
        ) from error
    return inputs


@dataclass(frozen=True)
class _Solved:
    """What one layer becomes: directions, weight and bias of the reader; the share that is lost at every width."""

    weights: tuple[Tensor, Tensor, Tensor | None]
    curve: Tensor
    notes: Sequence[str]


def _solve(
    layer: ValueHeads, site: Site, model: PreTrainedModel, method: Method, moments: Moments | None, width: int
) -> _Solved:
    reader: Any = model.get_submodule(site.name)
    weight = dense_weight(reader).double()
    notes: list[str] = []
    if method.needs and (why := UNREACHED if moments is None else why_useless(moments)):
        notes.append(f"{site.name}: {why}; its value heads were narrowed by its weights alone")
        moments = None
        problem = Problem(weight)
    else:
        if moments is not None:
            moments.centered = method.centered and site.has_bias
        problem = method.metric(weight, moments)  # type: ignore[arg-type]
    heads = narrow_heads(problem, layer.heads, layer.made, site.name)
    directions, narrow = heads.narrowed(width)
    bias = None
    if moments is not None and moments.centered:
        # The metric was the covariance, so the error of the mean output is corrected in the bias.
        mean = moments.mean.to(weight)
        bias = reader.bias.detach().double() + weight @ mean - narrow @ layer.read(mean, directions)
    whole = heads.curve[0].clamp_min(torch.finfo(torch.float64).tiny)
    return _Solved((directions, narrow, bias), (heads.curve / whole).cpu(), [*notes, *heads.slicing.notes])
