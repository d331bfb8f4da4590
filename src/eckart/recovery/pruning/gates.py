"""Gates: numbers that multiply what a linear layer reads, trained or closed, and folded into its weight."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from eckart.model import dense_weight, set_dense_weight


def gate_input(module: nn.Module, gate: Tensor) -> nn.Parameter:
    """Multiply what a module reads by gates: a parameter `input_gate` of it, which is returned.

    Args:
        module: it reads (..., n).
        gate: (c,), c a divisor of n: each gate is for a stretch of n / c numbers.
    """
    parameter = nn.Parameter(gate.detach().clone(), requires_grad=gate.requires_grad)
    module.register_parameter("input_gate", parameter)
    module.register_forward_pre_hook(_apply_gate)
    return parameter


def _apply_gate(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0] * _expand_gate(module.input_gate, args[0].shape[-1]).to(args[0].dtype), *args[1:])


def _expand_gate(gate: Tensor, width: int) -> Tensor:
    """A gate for each number, (width,)."""
    return gate if len(gate) == width else gate.repeat_interleave(width // len(gate))


def fold_gates(model: nn.Module) -> None:
    """Multiply every gate into the columns of the weight that reads through it, and take it away; after `merge`."""
    for name, module in list(model.named_modules()):
        gate = module._parameters.get("input_gate")
        if gate is None:
            continue
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is _apply_gate:
                del module._forward_pre_hooks[key]
        del module._parameters["input_gate"]
        weight = dense_weight(module)
        set_dense_weight(model, name, weight * _expand_gate(gate.detach(), weight.shape[1]), None)
