"""Find the weights that can be factored."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from eckart.errors import ModelError, UsageError
from eckart.forms import Factored
from eckart.forms.quantized import QuantizedLinear
from eckart.model.slicing import sliced_features

# Configuration keys for the number of experts: a Linear of that many outputs beside the experts is a router.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Site:
    """A weight that can be factored.

    Attributes:
        name: dotted module name.
        source: "linear" (weight (out, in)) or "conv1d" (weight (in, out)).
        out_features: m.
        in_features: n.
        has_bias: whether the module adds one.
    """

    name: str
    source: str
    out_features: int
    in_features: int
    has_bias: bool

    @property
    def elements(self) -> int:
        """Numbers in the matrix."""
        return self.out_features * self.in_features

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.out_features, self.in_features

    @property
    def kind(self) -> str:
        """The name with "*" for layer numbers: the same for sites of one role."""
        return re.sub(r"\.\d+(?=\.|$)", ".*", self.name)


@dataclass(frozen=True)
class Sites:
    """The weights of a model.

    Attributes:
        chosen: sites that can be factored, in the order of the model's modules.
        skipped: every other module that holds a matrix -> why it is left alone.
    """

    chosen: tuple[Site, ...]
    skipped: dict[str, str]


def find_sites(model: nn.Module, targets: Sequence[str] | None = None, ignore: Sequence[str] | None = None) -> Sites:
    """Find every Linear (subclasses too) and Conv1D inside the model's body.

    Args:
        model: a transformers model, or any module.
        targets: names, globs or regular expressions; only modules that match one of them are chosen. A
            pattern matches a whole dotted name or its end after a dot ("q_proj" is every q_proj).
        ignore: the same; modules that match one of them are left alone.

    Returns:
        The sites, and why all other modules with matrices are left alone.

    Raises:
        UsageError: if a pattern matches nothing; the message gives similar names.
        ModelError: if nothing is left to factor, or the model is already factored.
    """
    _refuse_factored(model)
    found, skipped = list_matrices(model)
    names = [*found, *skipped]
    kept = dict(found)
    if targets:
        wanted = _matching(targets, names, "--targets")
        refused = [name for name in skipped if name in wanted]
        if refused and not any(name in found for name in wanted):
            raise UsageError(
                f"--targets: {refused[0]} cannot be factored: {skipped[refused[0]]}. "
                "Choose other modules; `eckart inspect` lists them."
            )
        for name in found:
            if name not in wanted:
                skipped[name] = "not among --targets"
                kept.pop(name)
    if ignore:
        for name in _matching(ignore, names, "--ignore"):
            if kept.pop(name, None) is not None:
                skipped[name] = "named by --ignore"
    if not kept:
        listed = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:5])
        raise ModelError(
            f"{type(model).__name__}: no weight is left to factor ({listed or 'it has no Linear or Conv1D'}). "
            "Look at `eckart inspect`, and widen --targets or narrow --ignore."
        )
    return Sites(tuple(kept.values()), skipped)


def list_matrices(model: nn.Module) -> tuple[dict[str, Site], dict[str, str]]:
    """Every module that holds a matrix: a plain linear layer of the body, or why it is something else, by names.

    The leaves of factored modules are among them.
    """
    found: dict[str, Site] = {}
    skipped: dict[str, str] = {}
    output_heads = _output_heads(model)
    uses = _uses(model)
    experts = {
        value for key in EXPERT_COUNTS if isinstance(value := getattr(getattr(model, "config", None), key, None), int)
    }
    inside_attention = {
        id(child)
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
        for child in module.modules()
    }
    near_experts = {
        id(child)
        for module in model.modules()
        if any("expert" in part for part, _ in module.named_children())
        for child in (*module.children(), *(inner for outer in module.children() for inner in outer.children()))
    }
    for name, module in model.named_modules():
        if not _own_matrix(module):
            continue
        reason = _reason(name, module, output_heads, uses, experts, inside_attention, near_experts)
        if reason is None:
            found[name] = _site(name, module)
        else:
            skipped[name] = reason
    return found, skipped


def has_output_head(model: nn.Module) -> bool:
    """Whether the model has an output head; without one, its outputs are hidden states."""
    return bool(_output_heads(model))


def dense_weight(module: nn.Module) -> Tensor:
    """The weight as (out, in), whatever the module's orientation; shares memory with the module."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().mT if isinstance(module, Conv1D) else weight.detach()


def _site(name: str, module: nn.Module) -> Site:
    rows, columns = dense_weight(module).shape
    source = "conv1d" if isinstance(module, Conv1D) else "linear"
    return Site(name, source, rows, columns, getattr(module, "bias", None) is not None)


def _own_matrix(module: nn.Module) -> bool:
    return any(p.dim() >= 2 for p in module.parameters(recurse=False))


def _reason(
    name: str,
    module: nn.Module,
    output_heads: set[int],
    uses: dict[int, int],
    experts: set[int],
    inside_attention: set[int],
    near_experts: set[int],
) -> str | None:
    """Why a module that holds a matrix cannot be factored; None if it can."""
    if isinstance(module, nn.Embedding):
        return "embedding, left alone"
    if id(module) in inside_attention:
        return "inside nn.MultiheadAttention, which bypasses its projections' forward"
    if not isinstance(module, (nn.Linear, Conv1D)):
        shapes = [tuple(p.shape) for p in module.parameters(recurse=False) if p.dim() >= 2]
        if any(len(shape) == 3 for shape in shapes) and "expert" in type(module).__name__.lower():
            return f"fused experts {shapes[0]}, not a single weight"
        return f"{type(module).__name__}, neither Linear nor Conv1D"
    if id(module) in output_heads:
        return "output head, left alone"
    if uses[id(module.weight)] > 1:
        return "its weight is tied to another module's"
    rows, columns = dense_weight(module).shape
    if rows in experts and id(module) in near_experts:
        return "router of a mixture of experts"
    if not module.weight.is_floating_point():
        return f"stored as {module.weight.dtype}, not as floating-point numbers"
    if min(rows, columns) < 2 or rows * columns <= rows + columns:
        return f"too small ({rows} x {columns}): no factors would be smaller"
    if type(module).forward not in (nn.Linear.forward, Conv1D.forward) and not _is_affine(module):
        return f"{type(module).__name__} computes something else than x W^T + b"
    return None


def _is_affine(module: nn.Module) -> bool:
    """Whether a Linear subclass with its own forward still computes `x W^T + b`."""
    if module.weight.is_meta:  # cannot be checked without numbers
        return True
    weight = dense_weight(module)
    stream = torch.Generator().manual_seed(0)
    x = torch.randn(3, weight.shape[1], generator=stream).to(weight)
    bias = getattr(module, "bias", None)
    try:
        with torch.no_grad():
            return torch.allclose(module(x), functional.linear(x, weight, bias), rtol=1e-2, atol=1e-4)
    except Exception:  # any failure means: not a plain linear layer
        return False


def _output_heads(model: nn.Module) -> set[int]:
    """Ids of the output head and of all other modules outside `base_model`."""
    output_heads: set[int] = set()
    body = getattr(model, "base_model", model)
    if body is not model:
        inside = {id(module) for module in body.modules()}
        output_heads |= {id(module) for module in model.modules() if id(module) not in inside}
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    if head is not None:
        output_heads.add(id(head))
    return output_heads


def _uses(model: nn.Module) -> dict[int, int]:
    """Id of a parameter -> number of distinct modules that hold it."""
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    return uses


def _refuse_factored(model: nn.Module) -> None:
    factored = next((n for n, m in model.named_modules() if isinstance(m, Factored)), None)
    sliced = next(iter(sliced_features(model)), None)
    if factored is not None or sliced is not None:
        raise ModelError(
            f"{factored or sliced} is already {'factored' if factored else 'sliced'}. Give the original model, "
            "or turn this one into ordinary weights first with eckart.densify(model)."
        )
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ModelError(
            f"{type(model).__name__} is quantized: its weights are integers. Compress the original model, and quantize "
            "the result with --quantize."
        )
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise ModelError(
            f"{type(model).__name__} is quantized: its weights are not floating-point matrices. "
            "Compress the original model, and quantize the result if you wish."
        )


def _matching(patterns: Sequence[str], names: Sequence[str], option: str) -> set[str]:
    matched: set[str] = set()
    for pattern in patterns:
        hits = {name for name in names if matches(pattern, name)}
        if not hits:
            ends = sorted({name.rsplit(".", 1)[-1] for name in names})
            near = difflib.get_close_matches(pattern, [*names, *ends], 3, 0.4) or ends[:5]
            raise UsageError(
                f"{option}: {pattern!r} matches no module with a weight matrix. "
                f"Near misses: {', '.join(near)}. `eckart inspect` lists all names."
            )
        matched |= hits
    return matched


def matches(pattern: str, name: str) -> bool:
    """Whether a name, glob or regular expression matches the name of a module."""
    if name == pattern or name.endswith("." + pattern):
        return True
    if fnmatch.fnmatchcase(name, pattern):
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:
        return False
