"""The plan of a run: within a size, or the one that reaches the speed or the quality that was asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from eckart.allocation import DENSE, Choice, OverBudgetError, Plan, parse_plan, smallest_keep
from eckart.calibration.layerwise import LayerwiseError
from eckart.compression.budget import Budget
from eckart.compression.context import CompressionContext
from eckart.compression.factor_store import FactorStore
from eckart.compression.goals import loss_of, parse_loss
from eckart.compression.machine_profile import find_profile, forward_of
from eckart.compression.measured_curves import UnitError, measure_units, ratios_of, scale_curves
from eckart.compression.options import dtype_of
from eckart.compression.plan_builder import Solved, make_plan
from eckart.compression.pricing import Pricing, count_seconds, price_elements_and_seconds, price_seconds
from eckart.compression.recipe import Recipe
from eckart.compression.settings import Settings
from eckart.compression.trials import trial_model
from eckart.errors import UsageError
from eckart.speed.clock import measure_in_turn, steady_stopwatch
from eckart.speed.profile import Profile

STAGE = "plan"
"""The stage of a run under which a plan that was searched for is stored."""

CURVES = "measured"
"""The stage of a run under which it is stored what cuts do to the model's output."""

TRIALS = 4
"""Models that are made to reach a speed, at most."""

NEAR = 1.03
"""A speed of up to so many times what was asked for is taken at once; a faster model is given more."""

FINENESS = 0.02
"""How near the smallest size that keeps to a loss is found, as a share of the dense numbers."""


class PlanChoice:
    """Chooses the plan of a run.

    Args:
        context: the model and its data.
        settings: method, form, allocation.
        recipe: what is asked for.
        solved: what is known of the factors.
        factors: the factors, of which models are made on trial.
    """

    def __init__(
        self, context: CompressionContext, settings: Settings, recipe: Recipe, solved: Solved, factors: FactorStore
    ) -> None:
        self.context = context
        self.settings = settings
        self.recipe = recipe
        self.solved = solved
        self.factors = factors
        self.shapes = {site.name: site.shape for site in context.sites.chosen}
        self.found: dict[str, Any] = {}
        """What the search reports."""
        self.notes: list[str] = []
        """What was not done as it was asked for."""
        self.curves: list[dict[str, Any]] = []
        """Sites that were cut together -> predicted loss, and measured distance of the model's output."""

    @property
    def measures(self) -> bool:
        """Whether seconds or models are measured for it, which takes a while."""
        return self.recipe.weighs_seconds or self.recipe.max_loss is not None

    def choose(self) -> Plan:
        """The plan; one that an interrupted run has searched for is read again."""
        self._scale_curves()
        if self.recipe.speedup is None and self.recipe.max_loss is None:
            return self._within_size(self.recipe)
        stored = self.context.workspace.remember(STAGE, self._search)
        self.found = stored["found"]
        return parse_plan(stored["plan"], "the plan of this run", self.shapes)

    def _search(self) -> dict[str, Any]:
        plan = self._reach_speed() if self.recipe.speedup is not None else self._reach_quality()
        return {"plan": plan.to_json(), "found": self.found}

    def _scale_curves(self) -> None:
        """Scale the curves by what the cuts of a first plan do to the model's output, one at a time."""
        if not self.settings.measures_curves:
            return
        with self.context.timer.step("curves"):
            plan = self._within_size(self.recipe)
            if not plan.predicted:
                return
            errors = self._measure_units(plan)
            self.solved = scale_curves(self.solved, ratios_of(errors))
            self.curves = [error.to_json() for error in errors]

    def _measure_units(self, plan: Plan) -> list[UnitError]:
        """What the cuts of a plan do; what an interrupted run has measured is read again."""

        def measure() -> dict[str, Any]:
            return {"errors": [error.to_json() for error in measure_units(self.context, plan, self.factors)]}

        try:
            found = self.context.workspace.remember(CURVES, measure)
        except LayerwiseError as error:
            self.notes.append(
                f"the curves were not measured: {type(self.context.model).__name__} is worked on block by block, and "
                f"cannot be run so ({error}). Pass --stream off where it fits into memory"
            )
            return []
        return [UnitError.from_json(entry) for entry in found["errors"]]

    def _make(self, recipe: Recipe, pricing: Pricing | None) -> Plan:
        context = self.context
        budget = Budget.of_recipe(context.model, context.sites, recipe)
        plan = make_plan(
            context.sites, self.settings, recipe, self.solved, budget, context.fingerprint, context.multiples(recipe),
            pricing,
        )  # fmt: skip
        if pricing is None or pricing.seconds is None:
            return plan
        return replace(plan, reasons=explain(plan, pricing))

    def _pricing(self, recipe: Recipe) -> Pricing | None:
        """Seconds and elements where latency is the objective; None for elements alone."""
        if recipe.objective == "size":
            return None
        budget = Budget.of_recipe(self.context.model, self.context.sites, recipe)
        left = [shape for name, shape in self.shapes.items() if name not in self.solved.sites]
        budget = budget.leaving_out(sum(rows * columns for rows, columns in left))
        return price_elements_and_seconds(self.shapes, budget, self._profile())

    def _within_size(self, recipe: Recipe) -> Plan:
        """The plan of a size.

        Raises:
            UsageError: it cannot be met, with the smallest that can; its cause is an OverBudgetError.
        """
        try:
            return self._make(recipe, self._pricing(recipe))
        except OverBudgetError as error:  # of elements and seconds
            dense = sum(rows * columns for rows, columns in self.shapes.values())
            raise UsageError(
                f"--keep {recipe.keep:g} --objective latency: at the smallest sizes the sites still take more than "
                f"that share of their seconds. The smallest keep that can be reached is "
                f"{smallest_keep(error.needed, dense):.4f}: raise --keep, measure on more tokens with "
                "--latency-batch-size, or ask for stored numbers with --objective size."
            ) from error

    def _profile(self) -> Profile:
        forms = (self.settings.form, *self.settings.site_forms)
        profiles = self.context.profiles
        if forms not in profiles:
            profiles[forms] = find_profile(self.context, self.settings, self.recipe, self.solved)
        return profiles[forms]

    # -- a speed -----------------------------------------------------------------------------------------

    def _reach_speed(self) -> Plan:
        """Spend the seconds that the speed leaves to the sites; measure what comes out, and correct the budget.

        Raises:
            UsageError: the speed cannot be reached, with the highest that can.
        """
        wanted, profile = self.recipe.speedup, self._profile()
        assert wanted is not None
        whole = profile.model_seconds
        assert whole is not None
        seconds = count_seconds(self.shapes, profile)
        dense = sum(seconds({name: Choice(DENSE)}) for name in self.shapes)
        budget = whole / wanted - max(0.0, whole - dense)
        best: tuple[bool, float, Plan, float] | None = None
        for _ in range(TRIALS):
            try:
                plan = self._make(self.recipe, price_seconds(self.shapes, budget, profile))
            except OverBudgetError as error:
                if best is not None:
                    break
                fastest = whole / (whole - dense + error.needed)
                raise UsageError(
                    f"--speedup {wanted:g}: the sites would have to run in {max(budget, 0) * 1e3:.3g} ms of the "
                    f"{dense * 1e3:.3g} ms that they take now, and their smallest factors take "
                    f"{error.needed * 1e3:.3g} ms; the highest speed-up to ask for is about {fastest:.2f}."
                ) from None
            before, after = self._measure(plan)
            reached = before / after
            trial = (reached >= wanted, -abs(reached - wanted), plan, reached)
            best = trial if best is None or trial[:2] > best[:2] else best
            if wanted <= reached <= wanted * NEAR:
                break
            # What the model takes too long, or has left, measured now, in seconds of the profile.
            budget += (before / (wanted * NEAR**0.5) - after) * whole / before
        assert best is not None
        self.found = {"speedup": {"wanted": wanted, "reached": round(best[3], 3)}}
        return best[2]

    def _measure(self, plan: Plan) -> tuple[float, float]:
        """Seconds of one pass of the original and of the model of a plan, taken in turn."""
        processes = self.context.workspace.processes
        with self._trial(plan) as model, torch.no_grad():
            runs = {
                "dense": forward_of(self.context.model, self.context, self.recipe),
                "compressed": forward_of(model, self.context, self.recipe),
            }
            device = self.context.weights.device
            clock = steady_stopwatch(device)
            timings = measure_in_turn(runs, min_seconds=0.5, device=device, stopwatch=clock) if processes.main else {}
        found = processes.broadcast(({}, {name: timing.median for name, timing in timings.items()}))[1]
        return found["dense"], found["compressed"]

    # -- a quality -----------------------------------------------------------------------------------------

    def _reach_quality(self) -> Plan:
        """The smallest size at which held-out data shows no more loss than was asked for, before any refit.

        Raises:
            UsageError: even the largest size loses more, with what it loses.
        """
        assert self.recipe.max_loss is not None
        allowed = parse_loss(self.recipe.max_loss)
        if self.context.held_out is None:
            raise UsageError(
                f"--max-loss {self.recipe.max_loss}: there is too little data to hold some out and measure by; give "
                "more --num-samples."
            )
        lost, plan = self._try_keep(largest := 1 - FINENESS)
        if lost > allowed:
            raise UsageError(
                f"--max-loss {self.recipe.max_loss}: at keep {largest:g} held-out data shows a loss of {lost:.2%}. "
                "Allow more, or name fewer --targets."
            )
        found = (largest, lost, plan)
        low, high = 0.0, largest
        while high - low > FINENESS:
            middle = (low + high) / 2
            try:
                lost, plan = self._try_keep(middle)
            except OverBudgetError:
                low = middle
                continue
            if lost <= allowed:
                high, found = middle, (middle, lost, plan)
            else:
                low = middle
        self.found = {"max_loss": {"allowed": allowed, "lost": found[1], "keep": round(found[0], 4)}}
        return found[2]

    def _try_keep(self, keep: float) -> tuple[float, Plan]:
        recipe = self.recipe.model_copy(update={"keep": keep})
        try:
            plan = self._within_size(recipe)
        except UsageError as error:
            if isinstance(error.__cause__, OverBudgetError):
                raise error.__cause__ from None
            raise
        with self._trial(plan) as model:
            return loss_of(self.context, model), plan

    # -- models on trial -----------------------------------------------------------------------------------

    @contextmanager
    def _trial(self, plan: Plan) -> Iterator[PreTrainedModel]:
        """The model of a plan, made in memory."""
        if self.context.workspace.streaming:
            raise UsageError(
                "--speedup and --max-loss make models on trial, which have to fit into memory as a whole: pass "
                "--stream off on a machine where they do, or ask for --keep with --objective latency."
            )
        with trial_model(self.context, plan, self.factors, dtype_of(self.recipe)) as model:
            yield model


def explain(plan: Plan, pricing: Pricing) -> dict[str, str]:
    """For each site why it is stored as it is, in measured milliseconds; a group's reason stands at its first site."""
    assert pricing.seconds is not None
    reasons: dict[str, str] = {}
    for name, choice in plan.choices.items():
        if choice.basis is not None:
            reasons[name] = f"{choice.form} with {choice.basis}, see there"
            continue
        members = [name, *(other for other, c in plan.choices.items() if c.basis == name)]
        dense = sum(pricing.seconds({member: Choice(DENSE)}) for member in members)
        now = pricing.seconds({member: plan.choices[member] for member in members})
        if choice.form == DENSE:
            reasons[name] = f"dense, {_milliseconds(dense)}: no factors are worth their loss, or none are faster"
        else:
            reasons[name] = (
                f"{choice.form} at rank {choice.rank}, {_milliseconds(now)} in place of {_milliseconds(dense)}"
            )
    return reasons


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < math.inf else "not measured"
