"""Factor all sites, one window of statistics after another; each process factors the sites that it owns.

Sites that share a basis are factored together, by the first process, when the last of their group has its statistics;
until then the statistics of the others are kept in the store.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from eckart.allocation import Bases, Choice
from eckart.calibration import UNREACHED, why_useless
from eckart.calibration.layerwise import StatisticsWindow
from eckart.compression.budget import Budget
from eckart.compression.context import CompressionContext
from eckart.compression.factor_store import JOINT, SLICED, STAGE, FactorStore, Serialized, tensors_of
from eckart.compression.neuron_layers import Layers, names_of
from eckart.compression.recipe import Recipe
from eckart.compression.settings import Settings
from eckart.compression.size_limits import largest_choices, largest_joint_rank
from eckart.compression.solve_joint import solve_joint
from eckart.compression.solve_site import SiteFactors, solve_group, solve_site
from eckart.compression.solve_slicing import solve_slicing
from eckart.data.inference import progress
from eckart.model import Site, dense_weight
from eckart.model.neurons import NeuronLayer
from eckart.moments import Moments, deserialize, serialize

INCOMPLETE = "bases of which not all sites were reached"
"""The entry of groups that lacked some of their sites when all windows were done."""

WAITING = "waiting"
"""What an entry holds of sites whose group is not complete yet."""


def factorize_sites(
    context: CompressionContext,
    settings: Settings,
    recipe: Recipe,
    largest_keep: float,
    factors: FactorStore,
    windows: Sequence[StatisticsWindow] | None = None,
) -> None:
    """Factor every site whose factors are not stored yet.

    Args:
        context: the model, its sites and their statistics.
        settings: method, form, allocation.
        recipe: plan file and budget.
        largest_keep: the largest fraction that factors are made for: those beyond it are not kept.
        factors: where factors are stored.
        windows: statistics that several methods use, and which are left as they are; else they are gathered here, and
            freed on the way.
    """
    budget = Budget.of_recipe(context.model, context.sites, recipe.model_copy(update={"keep": largest_keep}))
    bases = context.bases(settings, recipe)
    limits = largest_choices(context.sites, settings, recipe, largest_keep, budget, context.multiples(recipe), bases)
    layers = context.neuron_layers(settings, recipe)
    if settings.rest and recipe.plan is None:  # their weights are never factored
        limits |= dict.fromkeys(names_of(layers), ())
    if recipe.stock:
        limits = dict.fromkeys(limits, ())
    joint = () if recipe.stock else apart_from(layers if settings.rest else (), context.joint_groups(settings, recipe))
    done = factors.finished_windows()
    factorizer = SiteFactorizer(
        factors, context.model, {site.name: site for site in context.sites.chosen}, settings, limits,
        curve=settings.allocation == "loss" and recipe.plan is None, bases=bases,
        joint=joint, layers=layers, planned=recipe.plan is not None,
    )  # fmt: skip
    gathered = context.calibration.windows(done) if windows is None else iter(windows)
    factorizer.run(context.timer.gathering(gathered), keep_statistics=windows is not None)


@dataclass(frozen=True)
class SiteFactorizer:
    """Factors windows of statistics.

    Attributes:
        factors: where factors are stored.
        model: holds the weights.
        sites: by name.
        settings: method, form, allocation.
        limits: site -> the largest choices that any plan may make.
        curve: whether predicted losses are wanted.
        planned: whether a plan file says the ranks.
        bases: groups of sites of several layers that share a basis.
        joint: groups of sites that may have one input factor; each is in one window, for its sites read one tensor.
        layers: whose neurons may be taken away.
    """

    factors: FactorStore
    model: nn.Module
    sites: Mapping[str, Site]
    settings: Settings
    limits: Mapping[str, Sequence[Choice]]
    curve: bool
    planned: bool = False
    bases: Bases = ()
    joint: Sequence[tuple[str, ...]] = ()
    layers: Layers = ()

    def run(self, windows: Iterator[StatisticsWindow], *, keep_statistics: bool = False) -> None:
        """Factor all windows, and then the groups that are still incomplete.

        Args:
            windows: those whose factors are not stored yet.
            keep_statistics: leave the windows as they are, for another method; else statistics are freed on the way.
        """
        for window in windows:
            self.add_window(window, dict(window.moments) if keep_statistics else window.moments)
        if self.bases and INCOMPLETE not in self.factors.finished_windows():
            self.finish_groups()

    @cached_property
    def group_of(self) -> dict[str, Sequence[str]]:
        """Site -> the group that shares a basis with it."""
        return {name: group for group in self.bases for name in group}

    @cached_property
    def joint_group_of(self) -> dict[str, tuple[str, ...]]:
        """Site -> the group that may have one input factor."""
        return {name: group for group in self.joint for name in group}

    @cached_property
    def layer_of(self) -> dict[str, NeuronLayer]:
        """Site -> the layer whose neurons it reads."""
        return {layer.reader: layer for layer in self.layers}

    def add_window(self, window: StatisticsWindow, moments: dict[str, Moments]) -> None:
        """Factor a window's sites; their statistics are taken out of `moments` on the way."""
        processes = self.factors.processes
        owners = self._reduce(window, moments)
        mine = _nothing()
        grouped: dict[str, Moments | None] = {}
        joined: dict[str, Moments | None] = {}  # useful sites that wait for the others of their group
        left = {group: set(group) for group in self.joint}
        with processes.failing_together():
            names = [name for members in window.groups.values() for name in members]
            for name in progress(names, what="factoring", total=len(names)):
                entry = moments.pop(name, None)
                if owners.get(name, 0) != processes.rank:
                    continue
                if name in self.group_of:
                    grouped[name] = entry
                    continue
                useful = self._solve_one(name, entry, mine)
                if useful and name in self.layer_of:
                    self._solve_slicing(self.layer_of[name], entry, mine)
                group = self.joint_group_of.get(name)
                if group is None:
                    continue
                if useful:
                    joined[name] = entry
                left[group].discard(name)
                if not left[group]:
                    self._solve_joint({n: joined.pop(n) for n in group if n in joined}, mine)
            if grouped:
                self._solve_complete_groups(grouped, window.groups, mine)
        self.factors.add_window(window.name, mine)

    def finish_groups(self) -> None:
        """Factor the groups some of whose sites no window has brought, without those."""
        mine = _nothing()
        with self.factors.processes.failing_together():
            if self.factors.processes.main:
                before = self._waiting()
                done = {
                    name for _, content in self.factors.entries() for name in (*content["sites"], *content["dense"])
                }
                for group in self.bases:
                    left = [name for name in group if name in before and name not in done]
                    self._solve_group({name: self._read_waiting(name, before[name]) for name in left}, mine)
        self.factors.add_window(INCOMPLETE, mine)

    # -- one site, one group ---------------------------------------------------------------------------

    def _solve_one(self, name: str, moments: Moments | None, mine: Serialized) -> bool:
        """Factor a site; returns whether its statistics were useful."""
        if not self._is_useful(name, moments, mine[1]):
            return False
        found = solve_site(
            self.sites[name], self._weight(name), moments, self.settings, self.limits[name], curve=self.curve
        )
        _put(mine, name, found)
        return True

    def _solve_slicing(self, layer: NeuronLayer, moments: Moments | None, mine: Serialized) -> None:
        """Put the neurons of a layer in order."""
        site = self.sites[layer.reader]
        found = solve_slicing(
            layer, site, self._weight(site.name), moments, self.settings, layer.width, curve=self.curve
        )
        tensors, content = found.serialize()
        mine[0].update({f"{SLICED}/{site.name}/{key}": value for key, value in tensors.items()})
        mine[1][SLICED][site.name] = content

    def _solve_joint(self, known: Mapping[str, Moments | None], mine: Serialized) -> None:
        """Factor the sites of a group that data reached on one input factor, if that can save anything."""
        sites = [self.sites[name] for name in known]
        if len(sites) < (1 if self.planned else 2):
            return
        limit = largest_joint_rank([site.shape for site in sites], self.settings.joint_form, planned=self.planned)
        if limit < 1:
            return
        weights = [self._weight(name) for name in known]
        found = solve_joint(sites, weights, list(known.values()), self.settings, limit, curve=self.curve)
        tensors, content = found.serialize()
        holder = found.members[0]
        mine[0].update({f"{JOINT}/{holder}/{key}": value for key, value in tensors.items()})
        mine[1][JOINT][holder] = content

    def _solve_complete_groups(
        self, here: dict[str, Moments | None], inputs: Mapping[str, Sequence[str]], mine: Serialized
    ) -> None:
        """Factor the groups that are complete now; the statistics of the others are stored."""
        before = self._waiting()
        for group in dict.fromkeys(self.group_of[name] for name in here):
            if all(name in here or name in before for name in group):
                known = {
                    name: here.pop(name) if name in here else self._read_waiting(name, before[name]) for name in group
                }
                self._solve_group(known, mine)
        tensors, content = mine
        content[WAITING] = list(here)
        content["inputs"] = {leader: list(members) for leader, members in inputs.items()}
        state = serialize({name: entry for name, entry in here.items() if entry is not None})
        tensors |= {f"{WAITING}/{key}": value for key, value in state.items()}

    def _solve_group(self, known: Mapping[str, Moments | None], mine: Serialized) -> None:
        """Factor the sites of a group that data reached; a single one gets a basis of its own."""
        useful = {name: entry for name, entry in known.items() if self._is_useful(name, entry, mine[1])}
        if not useful:
            return
        weights = [self._weight(name) for name in useful]
        moments = [entry for entry in useful.values() if entry is not None]
        largest = max((choice for name in useful for choice in self.limits[name]), key=lambda choice: choice.rank)
        for name, found in solve_group(list(useful), weights, moments, self.settings, largest).items():
            _put(mine, name, found)

    def _waiting(self) -> dict[str, str]:
        """Site -> the entry that keeps its statistics."""
        return {name: entry for entry, content in self.factors.entries() for name in content.get(WAITING, ())}

    def _read_waiting(self, name: str, entry: str) -> Moments | None:
        tensors, content = self.factors.store.read(STAGE, entry)
        return deserialize(tensors_of(tensors, WAITING), content["inputs"]).get(name)

    def _is_useful(self, name: str, moments: Moments | None, content: dict[str, Any]) -> bool:
        """Whether a site's statistics say something; notes why not, or how many tokens it saw."""
        if self.settings.method.needs or moments is not None:
            reason = UNREACHED if moments is None else why_useless(moments)
            if reason is not None:
                content["dense"][name] = reason
                return False
        if moments is not None:
            content["seen"][name] = [moments.tokens, self.sites[name].in_features]
        return True

    def _weight(self, name: str) -> Tensor:
        return dense_weight(self.model.get_submodule(name)).to(self.factors.device)

    # -- several processes -----------------------------------------------------------------------------

    def _reduce(self, window: StatisticsWindow, moments: dict[str, Moments]) -> dict[str, int]:
        """Sum the statistics of a window over all processes, each group's at the process that owns it.

        Returns:
            Site -> the process that factors it.
        """
        processes = self.factors.processes
        if processes.size == 1:
            return {}
        costs = {leader: sum(_cost(self.sites[name]) for name in m) for leader, m in window.groups.items()}
        owners = processes.assign_owners(costs)
        # Only the first process has a store, in which others of the group may wait.
        owners |= {leader: 0 for leader, m in window.groups.items() if any(n in self.group_of for n in m)}
        for owner in range(processes.size):
            groups = {leader: m for leader, m in window.groups.items() if owners[leader] == owner}
            names = [name for members in groups.values() for name in members]
            # A process whose text never reached a site, such as an expert, has nothing to add.
            sums = serialize({name: moments.pop(name) for name in names if name in moments})
            processes.reduce(sums, owner)
            if owner == processes.rank:
                moments |= deserialize(sums, groups)
        return {name: owners[leader] for leader, members in window.groups.items() for name in members}


def _nothing() -> Serialized:
    """An entry of a store without any site."""
    return {}, {"sites": {}, "dense": {}, "seen": {}, JOINT: {}, SLICED: {}}


def apart_from(layers: Layers, groups: Sequence[tuple[str, ...]]) -> Sequence[tuple[str, ...]]:
    """The groups without sites that are in layers of neurons; what is left alone by that is in no group."""
    inside = set(names_of(layers))
    if not inside:
        return groups
    found = (tuple(name for name in group if name not in inside) for group in groups)
    return [group for group in found if len(group) > 1]


def _put(mine: Serialized, name: str, found: SiteFactors) -> None:
    tensors, content = mine
    serialized, content["sites"][name] = found.serialize()
    tensors |= {f"{name}/{key}": value for key, value in serialized.items()}


def _cost(site: Site) -> float:
    """Cost of factoring: a decomposition of the smaller side, and products with the larger one."""
    small, large = sorted(site.shape)
    return float(small) ** 3 * 10 + float(small) ** 2 * large
