"""A profile: how long linear layers of some shapes take on one device, in every form, at a grid of ranks."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from eckart.errors import UsageError
from eckart.storage.report_file import write_report

FORMAT_VERSION = 1
DENSE, JOINT, SLICED = "dense", "joint", "sliced"

Key = tuple[str, int, tuple[int, ...]]
"""(form, in_features, heights)."""


@dataclass(frozen=True)
class LayerRequest:
    """Layers to be measured.

    Attributes:
        form: "dense"; the name of a form of one weight, such as "lowrank" or "pivoted"; "joint": several weights whose
            one input factor is computed once; "sliced": a feed-forward layer of fewer neurons.
        in_features: n, the width of the input.
        heights: outputs of each weight that reads this input. Weights that are not joint are layers of their own:
            their times add up. Of "sliced", the neurons of each projection up, then the outputs of the projection
            down: (h, h, n) for a gated layer, (h, n) for a plain one.
        ranks: the grid; of "sliced", numbers of neurons that stay; empty for "dense".
    """

    form: str
    in_features: int
    heights: tuple[int, ...]
    ranks: tuple[int, ...] = ()

    @property
    def keys(self) -> list[Key]:
        """What is measured: a joint group or a sliced layer as one, every other weight by itself."""
        return split_key(self.form, self.in_features, self.heights)


def split_key(form: str, in_features: int, heights: tuple[int, ...]) -> list[Key]:
    """The measured curves that the time of these weights is the sum of."""
    if form in (JOINT, SLICED):
        return [(form, in_features, tuple(heights))]
    return [(form, in_features, (height,)) for height in heights]


def grid_of_ranks(largest: int, multiple: int = 1, points: int = 6) -> tuple[int, ...]:
    """Evenly spaced multiples from the first one to the largest that is at most `largest`; empty if there is none."""
    count = largest // multiple
    steps = {round(1 + i * (count - 1) / max(1, points - 1)) for i in range(points)} if count else set()
    return tuple(sorted(multiple * step for step in steps))


@dataclass(frozen=True)
class Curve:
    """Measured seconds of some weights, by rank.

    Attributes:
        ranks: ascending; (0,) for dense weights.
        seconds: of each.
    """

    ranks: tuple[int, ...]
    seconds: tuple[float, ...]

    @property
    def multiple(self) -> int:
        """What every measured rank is a multiple of: kernels treat other ranks in another way."""
        return math.gcd(*self.ranks)

    def covers(self, rank: int) -> bool:
        """Whether a rank lies on the grid or between two points of it."""
        return self.ranks[0] <= rank <= self.ranks[-1] and (rank == self.ranks[0] or rank % self.multiple == 0)

    def at(self, rank: int) -> float:
        """Seconds at a rank that it covers, linear between two points."""
        right = bisect_left(self.ranks, rank)
        if self.ranks[right] == rank:
            return self.seconds[right]
        left = right - 1
        share = (rank - self.ranks[left]) / (self.ranks[right] - self.ranks[left])
        return self.seconds[left] + share * (self.seconds[right] - self.seconds[left])


@dataclass(frozen=True)
class Profile:
    """Seconds of linear layers on one device, for one dtype and one number of tokens at a time.

    Attributes:
        device: kind of device, "cpu" or "cuda".
        device_name: the processor or GPU.
        threads: of the CPU.
        dtype: "float32", "bfloat16", ...
        tokens: rows of the input, batch x length.
        bias: whether the layers had a bias.
        torch_version: of torch.
        curves: (form, in_features, heights) -> seconds by rank.
        model_seconds: one forward of the whole dense model on as many tokens; None where it was not measured.
    """

    device: str
    device_name: str
    threads: int
    dtype: str
    tokens: int
    bias: bool = False
    torch_version: str = str(torch.__version__)
    curves: Mapping[Key, Curve] = field(default_factory=dict)
    model_seconds: float | None = None

    def covers(self, form: str, in_features: int, heights: Iterable[int], rank: int = 0) -> bool:
        """Whether :meth:`seconds` has an answer."""
        curves = [self.curves.get(key) for key in split_key(form, in_features, tuple(heights))]
        return all(curve is not None and curve.covers(0 if form == DENSE else rank) for curve in curves)

    def seconds(self, form: str, in_features: int, heights: Iterable[int], rank: int = 0) -> float:
        """Seconds of weights that read one input, linear between two measured ranks.

        Args:
            form: as in :class:`LayerRequest`; so are the next two.
            in_features: n.
            heights: outputs of each weight.
            rank: between the smallest and the largest that was measured, and a multiple of what those are multiples
                of; passed over for dense weights.

        Raises:
            UsageError: nothing near was measured; the message says what was.
        """
        rank = 0 if form == DENSE else rank
        total = 0.0
        for key in split_key(form, in_features, tuple(heights)):
            curve = self.curves.get(key)
            if curve is None or not curve.covers(rank):
                raise UsageError(_not_measured(key, rank, curve))
            total += curve.at(rank)
        return total

    # -- files -------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        layers = [
            {
                "form": form,
                "in_features": width,
                "heights": list(heights),
                "ranks": list(curve.ranks),
                "seconds": list(curve.seconds),
            }
            for (form, width, heights), curve in sorted(self.curves.items())
        ]
        return {"profile_version": FORMAT_VERSION, **{name: getattr(self, name) for name in _FIELDS}, "layers": layers}

    @classmethod
    def from_json(cls, content: Any, where: str = "profile") -> Self:
        """The profile that :meth:`to_json` gave.

        Args:
            content: parsed JSON.
            where: the file, for messages.

        Raises:
            UsageError: it is not a profile, or one of another version.
        """
        if not isinstance(content, Mapping) or "profile_version" not in content:
            raise UsageError(f"{where}: not a profile; give the file that a run with --profile wrote.")
        if content["profile_version"] != FORMAT_VERSION:
            raise UsageError(
                f"{where}: profile_version is {content['profile_version']!r}, this eckart reads {FORMAT_VERSION}; "
                "measure the profile again or update eckart."
            )
        try:
            values = {name: _checked(content, name, kinds) for name, kinds in _FIELDS.items()}
            curves = dict(_read_curve(layer) for layer in _checked(content, "layers", (list,)))
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"{where}: damaged profile ({type(error).__name__}: {error}); delete the file and measure it again."
            ) from None
        return cls(**values, curves=curves)

    def write(self, path: str | Path) -> None:
        """Write the file; it replaces reports and profiles of eckart and nothing else.

        Raises:
            UsageError: the file is something else, or cannot be written.
        """
        write_report(path, self.to_json())

    @classmethod
    def read(
        cls, path: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Self:
        """Read a file, which may come from another machine.

        Args:
            path: the file.
            dtype: the one that the model will compute in; None for any.
            device: where the model will compute: its kind must be that of the profile; None for any.

        Raises:
            UsageError: it cannot be read, is not a profile, or is for another dtype or kind of device.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"profile {path}: cannot be read ({error}); give the path of a profile file.") from None
        except ValueError as error:
            raise UsageError(f"profile {path}: not JSON ({error}); delete the file and measure it again.") from None
        profile = cls.from_json(content, f"profile {path}")
        wanted = {
            "dtype": name_of_dtype(dtype) if dtype is not None else None,
            "device": torch.device(device).type if device is not None else None,
        }
        for name, value in wanted.items():
            if value not in (None, getattr(profile, name)):
                raise UsageError(
                    f"profile {path}: was measured with {name} {getattr(profile, name)}, this run asks for {value}; "
                    f"name another file, which is then measured, or run with {name} {getattr(profile, name)}."
                )
        return profile


def name_of_dtype(dtype: torch.dtype) -> str:
    """The word that profiles and tables say: bfloat16, without `torch.`."""
    return str(dtype).removeprefix("torch.")


_FIELDS: dict[str, tuple[type, ...]] = {
    "device": (str,),
    "device_name": (str,),
    "threads": (int,),
    "dtype": (str,),
    "tokens": (int,),
    "bias": (bool,),
    "torch_version": (str,),
    "model_seconds": (float, int, type(None)),
}


def _checked(content: Mapping[str, Any], name: str, kinds: tuple[type, ...]) -> Any:
    value = content[name]
    if type(value) not in kinds:
        raise TypeError(f"{name} is {value!r}")
    return value


def _read_curve(layer: Mapping[str, Any]) -> tuple[Key, Curve]:
    key = (
        _checked(layer, "form", (str,)),
        _checked(layer, "in_features", (int,)),
        tuple(map(int, _checked(layer, "heights", (list,)))),
    )
    ranks, seconds = (tuple(_checked(layer, name, (list,))) for name in ("ranks", "seconds"))
    if not ranks or len(ranks) != len(seconds) or list(ranks) != sorted({int(rank) for rank in ranks}):
        raise ValueError(f"ranks {list(ranks)} of {key}")
    if not all(isinstance(value, float) and 0 < value < math.inf for value in seconds):
        raise ValueError(f"seconds {list(seconds)} of {key}")
    return key, Curve(ranks, seconds)


def _not_measured(key: Key, rank: int, curve: Curve | None) -> str:
    form, width, heights = key
    what = f"profile: {form} of {width} inputs and {' + '.join(map(str, heights))} outputs"
    if curve is None:
        return f"{what} was not measured; measure the profile again for this model, with another file."
    return (
        f"{what} was not measured at rank {rank}, but at {curve.ranks[0]} to {curve.ranks[-1]} in multiples of "
        f"{curve.multiple}; choose a rank among those, or measure the profile again with another grid."
    )
