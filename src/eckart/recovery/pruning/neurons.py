"""Hidden neurons of feed-forward layers: found by probing the model, and removed.

A neuron is an output of one linear layer (or of two, where one gates the other) that reaches the model's result only
as the same-numbered input of another linear layer. Whether that is so is tried on a batch, bit by bit, not read off
names: then the neuron's rows and its column can go, and the result is that of a model in which its output is zero.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eckart.model import Site, replace_module, select_features
from eckart.recovery.pruning.probe import Probe, probing


@dataclass(frozen=True)
class NeuronLayer:
    """The neurons of one layer.

    Attributes:
        reader: the linear layer that reads them.
        writers: those that make them.
        width: how many there are.
    """

    reader: str
    writers: tuple[str, ...]
    width: int

    @property
    def count(self) -> int:
        """How many there are, as of heads."""
        return self.width


def find_neurons(
    model: PreTrainedModel, sites: Sequence[Site], inputs: Mapping[str, Tensor]
) -> tuple[list[NeuronLayer], dict[str, str]]:
    """Every layer of hidden neurons, each proven by probes.

    Args:
        model: in any mode; it is left as it was.
        sites: the linear layers that may take part.
        inputs: a small batch without labels.

    Returns:
        The layers in order of the pass, and reader -> why its inputs are left.
    """
    shapes = {site.name: site.shape for site in sites}
    with probing(model):
        plain = Probe().run(model, list(shapes), **inputs)
        found: list[NeuronLayer] = []
        left: dict[str, str] = {}
        for place, reader in enumerate(plain.calls):
            width = shapes[reader][1]
            # Two at most: an up projection and its gate.
            before = [name for name in dict.fromkeys(plain.calls[:place]) if shapes[name][0] == width][-2:]
            if not before:
                continue
            if plain.calls.count(reader) > 1 or reader not in plain.read:
                left[reader] = "it is called more than once a pass, or not with one tensor"
                continue
            proven = [name for name in before if _feeds_only(model, list(shapes), inputs, plain, name, reader, width)]
            if proven:
                found.append(NeuronLayer(reader, tuple(proven), width))
            else:
                left[reader] = f"no trial shows that its inputs are outputs of {' or '.join(before)} one to one"
        return found, left


def _feeds_only(
    model: nn.Module, names: list[str], inputs: Mapping[str, Tensor], plain: Probe, writer: str, reader: str, width: int
) -> bool:
    """Whether the writer's outputs reach the result only as the reader's inputs, one to one and token by token."""
    if plain.calls.count(writer) > 1:
        return False
    stream = torch.Generator().manual_seed(0)
    chosen = torch.randperm(width, generator=stream)[: max(1, width // 2)]
    elsewhere = torch.ones(width, dtype=torch.bool)
    elsewhere[chosen] = False

    def some(output: Tensor) -> Tensor:
        moved = output.clone()
        first = moved[..., 0, :]  # of the first token alone
        noise = torch.randn(first[..., chosen].shape, generator=stream).to(first)
        first[..., chosen] += (1 + 3 * output.std()) * noise
        return moved

    def every(output: Tensor) -> Tensor:
        return output + (1 + 3 * output.std()) * torch.randn(output.shape, generator=stream).to(output)

    expected = plain.read[reader]
    if expected.dim() < 2 or expected.shape[-1] != width:
        return False
    seen = Probe(change={writer: some}).run(model, names, **inputs).read.get(reader)
    if seen is None or seen.shape != expected.shape:
        return False
    mixed = not torch.equal(seen[..., elsewhere], expected[..., elsewhere])
    spread = not torch.equal(seen[..., 1:, :], expected[..., 1:, :])
    if mixed or spread or torch.equal(seen, expected):
        return False
    around = Probe(change={writer: every}, replaced={reader: expected}).run(model, names, **inputs)
    assert around.result is not None
    assert plain.result is not None
    return torch.equal(around.result, plain.result)


def magnitudes(reader: Tensor, writers: Sequence[Tensor]) -> Tensor:
    """A proxy of what each neuron matters, (width,): norm of its column times the norm of its rows.

    It reads weights alone, no activation: cheap, and no substitute for gates that were trained.

    Args:
        reader: (out, width) weight of the layer that reads the neurons.
        writers: (width, in) weights of those that make them.
    """
    rows = torch.stack([weight.float().norm(dim=1) for weight in writers])
    return reader.float().norm(dim=0) * rows.norm(dim=0)


def remove_neurons(model: PreTrainedModel, kept: Mapping[NeuronLayer, Tensor]) -> str | None:
    """Take neurons out of their layers, and say so in the model's configuration, in place.

    The configuration's number is found by trial: the key whose change makes the model's class build just these shapes,
    or all keys of that value.

    Args:
        model: with dense modules at all sites.
        kept: layer -> (width,) bool. As many must stay in every layer of one width.

    Returns:
        None, or why nothing was changed.
    """
    old = {name: model.get_submodule(name) for layer in kept for name in (layer.reader, *layer.writers)}
    widths = {layer.width: int(mask.sum()) for layer, mask in kept.items()}
    for layer, mask in kept.items():
        places = mask.nonzero().flatten()
        for name in layer.writers:
            replace_module(model, name, select_features(old[name], places, rows=True))
        replace_module(model, layer.reader, select_features(model.get_submodule(layer.reader), places, rows=False))
    config = _find_config_keys(model, widths)
    if config is None:
        for name, module in old.items():
            replace_module(model, name, module)
        return "no number of the model's configuration says how wide these layers are, so that it could be loaded again"
    for key, value in config.items():
        setattr(model.config, key, value)
    return None


def _find_config_keys(model: PreTrainedModel, widths: Mapping[int, int]) -> dict[str, int] | None:
    """Keys of the configuration that give the model's shapes when changed; None if there are none."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if len(widths) != 1:
        return None
    (before, after), *_ = widths.items()
    content = vars(model.config)
    same = [key for key, value in content.items() if type(value) is int and value == before]
    open_ = [key for key, value in content.items() if value is None and not key.startswith("_")]
    for keys in [*([key] for key in (*same, *open_)), same]:  # all together: an encoder's and a decoder's
        config = copy.deepcopy(model.config)
        for key in keys:
            setattr(config, key, after)
        try:
            with torch.device("meta"):
                trial = type(model)(config)
        except Exception:  # a number that this class cannot be built with is not the one
            continue
        if {name: tensor.shape for name, tensor in trial.state_dict().items()} == shapes:
            return dict.fromkeys(keys, after)
    return None
