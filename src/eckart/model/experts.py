"""Experts of a mixture that a model stores as 3-D parameters: separate them into Linear modules, and fuse them again.

Many models store all experts of a layer as `gate_up_proj (E, 2f, h)` and `down_proj (E, h, f)`, some transposed or with
biases. A separate expert is a weight like any other: it has a name, sees the tokens that are routed to it, and is
factored at a form and rank of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eckart.forms import FactoredLinear
from eckart.forms.quantized import QuantizedLinear
from eckart.forms.transformers_internals import apply_gate
from eckart.model.clone import shared_clone
from eckart.model.replace import replace_module
from eckart.model.slicing import sliced_features

FORM = "experts"
"""Takes the place of a form's name for experts that are separate."""

FLAGS = ("is_transposed", "has_bias", "has_gate", "is_concatenated")
"""Attributes of transformers' modules with fused experts; modules without them are left alone."""


class SeparateExperts(nn.Module):
    """`sum over the experts e of a token: weight_e down_e(gate(up_e(x)))`, with Linear modules for up and down.

    The names of the children differ from those in checkpoints of fused experts, so that transformers does not convert
    them on loading or saving.

    Args:
        fused: the module with the 3-D parameters; its storage is shared, not copied.
    """

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        rule = copy.copy(fused)
        rule._parameters = {}
        # The model's own module knows gates and activations; in a tuple, it is not registered as a child.
        self._rule: tuple[Any] = (rule,)
        self.each = nn.ModuleList(_expert(fused, i) for i in range(_count(fused)))
        # As for factored modules: transformers without eckart must fail, not initialize fused experts at random.
        self.register_state_dict_post_hook(_write_guards)
        self.register_load_state_dict_pre_hook(_drop_guards)
        self.train(fused.training)

    def forward(self, hidden_states: Tensor, *routing: Tensor, **named: Tensor) -> Tensor:
        """Apply to x (tokens, h); `routing` is the experts and weights of each token, (tokens, k) both."""
        index, weights = (*routing, *named.values())
        (rule,) = self._rule
        result = torch.zeros_like(hidden_states)
        for number in torch.unique(index).tolist():
            if number >= len(self.each):  # marks a place without an expert
                continue
            token, place = torch.where(index == number)
            expert: Any = self.each[number]
            inner = expert.up(hidden_states[token])
            inner = apply_gate(rule, inner) if rule.has_gate else rule.act_fn(inner)
            result.index_add_(0, token, (expert.down(inner) * weights[token, place, None]).to(result.dtype))
        return result

    @property
    def guards(self) -> tuple[str, ...]:
        """Names of the fused parameters, under which a checkpoint holds empty tensors."""
        (rule,) = self._rule
        names = (_up(rule), "down_proj")
        return (*names, *(f"{name}_bias" for name in names)) if rule.has_bias else names

    def spec(self) -> dict[str, Any]:
        """JSON for a checkpoint's config."""
        return {"form": FORM}

    def multiply_adds(self) -> int:
        """Per token: those of as many experts of average size as a token is routed to."""
        (rule,) = self._rule
        total = sum(_multiply_adds(part) for expert in self.each for part in expert.children())
        chosen = next(
            (n for key in ("num_experts_per_tok", "top_k", "moe_topk") if (n := getattr(rule.config, key, None))), 1
        )
        return round(total * min(int(chosen), len(self.each)) / len(self.each))

    def fused(self) -> nn.Module:
        """The module with 3-D parameters, from the numbers that the Linear modules have now."""
        (rule,) = self._rule
        module = copy.copy(rule)
        module._parameters = {}
        for part, name in (("up", _up(rule)), ("down", "down_proj")):
            parts: list[Any] = [getattr(expert, part) for expert in self.each]
            weights = [p.weight.detach().mT if rule.is_transposed else p.weight.detach() for p in parts]
            module._parameters[name] = nn.Parameter(torch.stack(weights))
            if rule.has_bias:
                module._parameters[f"{name}_bias"] = nn.Parameter(torch.stack([p.bias.detach() for p in parts]))
        return module.train(self.training)


def _write_guards(module: Any, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    leaf = next(module.parameters())
    # A shape that transformers' conversions can split: by experts, then into gate and up.
    state |= {prefix + name: torch.empty(len(module.each), 2, 0, dtype=leaf.dtype) for name in module.guards}


def _drop_guards(module: Any, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for name in module.guards:
        state.pop(prefix + name, None)


def with_separate_experts(model: PreTrainedModel) -> PreTrainedModel:
    """The model, or, if it has fused experts, a shared clone with separate ones.

    Experts whose outputs on a few random tokens would change stay fused.
    """
    if not any(_is_fused(module) for module in model.modules()):
        return model
    separate = shared_clone(model)
    for name, module in list(fused_experts(separate)):
        experts = SeparateExperts(module)
        if _compute_the_same(module, experts):
            replace_module(separate, name, experts)
    return separate


def fused_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of all experts stored as 3-D parameters in a layout that is known here."""
    return ((name, module) for name, module in model.named_modules() if _is_fused(module))


def separate_experts(model: nn.Module) -> dict[str, SeparateExperts]:
    """Name -> module of all separate experts."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SeparateExperts)}


def fuse_experts(model: nn.Module) -> None:
    """Fuse separate experts again, in place, unless one of them is factored, sliced or quantized."""
    for name, experts in separate_experts(model).items():
        changed = any(isinstance(part, FactoredLinear | QuantizedLinear) for part in experts.modules())
        if not sliced_features(experts) and not changed:
            replace_module(model, name, experts.fused())


def _is_fused(module: nn.Module) -> bool:
    if not all(hasattr(module, flag) for flag in FLAGS) or getattr(module, "has_post_expert_norm", False):
        return False
    down, up = module._parameters.get("down_proj"), module._parameters.get(_up(module))
    names = {_up(module), "down_proj", *((f"{_up(module)}_bias", "down_proj_bias") if module.has_bias else ())}
    own = {name for name, parameter in module._parameters.items() if parameter is not None}
    return down is not None and up is not None and down.dim() == up.dim() == 3 and own == names


def _up(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def _count(fused: nn.Module) -> int:
    down = fused._parameters["down_proj"]
    assert down is not None
    return len(down)


def _expert(fused: Any, number: int) -> nn.Module:
    """One expert as two Linear modules whose weights are views of the 3-D parameters."""
    expert = nn.Module()
    for part, name in (("up", _up(fused)), ("down", "down_proj")):
        parameter = fused._parameters[name]
        weight = parameter.data[number]
        weight = weight.mT if fused.is_transposed else weight
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=fused.has_bias, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=parameter.requires_grad)
        if fused.has_bias:
            linear.bias = nn.Parameter(
                fused._parameters[f"{name}_bias"].data[number], requires_grad=parameter.requires_grad
            )
        setattr(expert, part, linear)
    return expert


def _compute_the_same(fused: Any, experts: SeparateExperts) -> bool:
    """Whether both compute the same; taken for granted on the meta device."""
    down: Any = experts.each[0].down
    up: Any = experts.each[0].up
    if down.weight.is_meta:
        return True
    stream = torch.Generator().manual_seed(0)
    x = torch.randn(4, up.weight.shape[1], generator=stream).to(up.weight)
    index = torch.randint(len(experts.each), (4, 1), generator=stream).to(up.weight.device)
    weights = torch.rand(4, 1, generator=stream).to(up.weight)
    try:
        with torch.no_grad():
            wanted, found = fused(x, index, weights), experts(x, index, weights)
    except Exception:  # any failure means: another interface
        return False
    return bool(torch.allclose(wanted, found, rtol=1e-2, atol=1e-3 * float(wanted.abs().amax())))


def _multiply_adds(part: Any) -> int:
    return int(part.multiply_adds()) if isinstance(part, FactoredLinear) else int(part.weight.numel())
