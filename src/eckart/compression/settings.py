"""The settings of a run: what the recipe says, and the settings of the method where the recipe says nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace as with_changes

from eckart.compression.effort import with_effort
from eckart.compression.recipe import Recipe
from eckart.errors import UsageError
from eckart.forms import FORMS, FactoredLinear, form_named
from eckart.methods import METHODS, Method, MetricFunction
from eckart.methods.kfac import metric as kfac_metric
from eckart.methods.kfac import robust_metric
from eckart.moments import statistics_named

TIMED_FORMS = ("lowrank", "pivoted")
"""Forms of one weight that are weighed against each other where no form is named and seconds are paid."""

JOINT = "joint"
"""The form of weights that have one input factor."""

SLICED = "sliced"
"""The form of feed-forward layers with fewer neurons."""

GRADIENTS, ROBUST = "gradients", "robust-gradients"
"""Statistics of the gradients: of all tokens alike, and clipped."""


@dataclass(frozen=True)
class Settings:
    """The choices of a recipe, completed with those of the method.

    Attributes:
        method: with the metric that is used.
        form: name of the stored form, or of the one that sites of a group may share in.
        allocation: "uniform", "loss", or "paper": the sizes that the method states.
        refit: whether sites are solved again on the compressed model's own inputs.
        notes: what was asked for and is not done.
        other_forms: further forms that a site may take by itself, made of the same factors.
        rest: of form sliced, the form of weights that are in no layer of neurons; "" for the form itself.
        slices: whether feed-forward layers may lose neurons.
        stock: whether they keep one number, and all other weights stay dense.
        measures_curves: whether predicted losses are scaled by what cuts do to the whole model's output.
        robust: whether gradients are clipped.
        refines: whether the blocks of the smaller model are trained one after another.
        distils: whether all blocks are trained together.
        trains_once: whether to refine only where the model cannot be distilled.
    """

    method: Method
    form: str
    allocation: str
    refit: bool
    notes: tuple[str, ...] = ()
    other_forms: tuple[str, ...] = ()
    rest: str = ""
    slices: bool = False
    stock: bool = False
    measures_curves: bool = False
    robust: bool = False
    refines: bool = False
    distils: bool = False
    trains_once: bool = False

    @property
    def trains(self) -> bool:
        """Whether a stage trains the smaller model, on more text than the statistics read."""
        return self.refines or self.distils

    @property
    def loss_metric(self) -> MetricFunction:
        """The metric whose squared error is twice the predicted loss per token."""
        return robust_metric if self.robust else kfac_metric

    @property
    def joins(self) -> bool:
        """Whether sites that read one input may have one input factor."""
        kind = form_named(self.factored_form)
        return kind.shared_parameter is not None and kind.shared_by == "input"

    @property
    def site_forms(self) -> tuple[str, ...]:
        """The forms that a site may take by itself; all of them are made of the same factors."""
        kind = form_named(self.factored_form)
        return (self.factored_form if kind.shared_parameter is None else kind.unshared_form, *self.other_forms)

    @property
    def candidates(self) -> tuple[str, ...]:
        """All forms that a weight may take, alone or with others."""
        if self.stock:
            return (SLICED,)
        return tuple(dict.fromkeys((self.factored_form, *self.site_forms, *((SLICED,) if self.slices else ()))))

    @property
    def factored_form(self) -> str:
        """The form of weights that are factored."""
        return self.rest or self.form

    @classmethod
    def of(cls, method: Method, recipe: Recipe) -> Settings:
        """Complete a recipe with the settings of a method.

        Raises:
            UsageError: if a refit is asked of a metric that knows no input Gram or of a form that has none, another
                form of a method that is its form or states sizes of its own, or a size of a method that states them.
        """
        if recipe.metric is not None:
            other = METHODS[recipe.metric]
            method = with_changes(
                method, metric=other.metric, needs=other.needs, exact_for=other.exact_for, centered=other.centered
            )
        method = with_effort(method, recipe.effort)
        refit = method.refit if recipe.refit is None else recipe.refit
        if refit and _of_inputs(method) != {"gram"}:
            if recipe.refit:
                raise UsageError(
                    f"--refit: the metric of {recipe.metric or method.name} does not read the Gram of the "
                    "inputs alone, which is all that a refit measures anew; use --metric drone or kfac, or leave "
                    "--refit out."
                )
            refit = False
        form, allocation = recipe.form or _default_form(method, recipe), recipe.allocation or method.allocation
        method, robust = _with_gradients(method, recipe, allocation)
        rest = ""
        if form == SLICED or recipe.stock or (method.by_leverage and recipe.form is None):
            form, rest = SLICED, _form_beside_slices(method, recipe)
        notes: tuple[str, ...] = ()
        if method.fixed_form and form != method.form:
            raise UsageError(
                f"--form {form}: {method.name} is its form, {method.form}, and in another one nothing of it is left. "
                f"Leave --form out, or use a method that any form can store: --method svd --form {form}"
            )
        if allocation == "paper" and form != method.form:
            raise UsageError(
                f"--form {form}: {method.name} states sizes of form {method.form} only; "
                "pass --allocation uniform or loss as well."
            )
        if allocation == "paper" and recipe.plan is None:
            if given := [key for key in ("keep", "keep_of") if key in recipe.model_fields_set]:
                flag = f"--{given[0].replace('_', '-')}"
                raise UsageError(
                    f"{flag} {getattr(recipe, given[0])}: {method.name} states its own sizes. Leave {flag} out, or "
                    "have ranks chosen for it: --allocation uniform or loss"
                )
            notes = (f"{method.name} states its own sizes; --allocation uniform or loss has them follow --keep",)
        if refit and not form_named(form).refits:
            if recipe.refit:
                raise UsageError(
                    f"--refit: form {form} cannot be fitted again; leave --refit out, or use --form "
                    f"{_forms(lambda kind: kind.refits)}."
                )
            refit, notes = False, (*notes, f"the refit was left out: form {form} cannot be fitted again")
        kind = form_named(form)
        if _shared_by_layers(kind):
            _check_sharing(method, form, allocation, recipe)
        elif recipe.layers_per_basis is not None and recipe.plan is None:
            raise UsageError(
                f"--layers-per-basis {recipe.layers_per_basis}: layers share nothing in form {form}; use "
                f"--form {_forms(_shared_by_layers)}, or --method basis-sharing."
            )
        if method.needs and not form_named(form).weighted_exactly:
            method = with_changes(method, exact_for=f"nothing; form {form} is approximate for {method.exact_for}")
        others: tuple[str, ...] = ()
        # The default method takes whatever is predicted to lose least, where no form is named.
        slices = form == SLICED or (recipe.form is None and method.slices and allocation == "loss")
        if recipe.weighs_seconds:
            _check_seconds(allocation, recipe)
            if recipe.form is None and form != SLICED and not method.fixed_form:  # whatever is fastest
                others, slices = tuple({*TIMED_FORMS} - {form, kind.unshared_form}), True
        return cls(
            method, form, allocation, refit, notes, others, rest=rest, slices=slices, stock=recipe.stock,
            measures_curves=_measures_curves(method, allocation, recipe), robust=robust,
            refines=method.refined if recipe.refine is None else recipe.refine,
            distils=method.distilled if recipe.distil is None else recipe.distil,
            trains_once=method.distilled and not recipe.refine,
        )  # fmt: skip

    @property
    def joint_form(self) -> str:
        """The form of sites with one input factor; where a plan file has groups of them, the one of this library."""
        return self.factored_form if self.joins else JOINT

    def without_gradients(self) -> Settings:
        """Of the default, the drone metric and uniform ranks; of other methods, what they are."""
        default, drone = METHODS["eckart"], METHODS["drone"]
        if self.method.name != default.name or self.method.metric not in (kfac_metric, robust_metric):
            return self
        method = with_changes(self.method, metric=drone.metric, needs=drone.needs, exact_for=drone.exact_for)
        return with_changes(self, method=method, allocation="uniform", slices=self.form == SLICED)

    def needs(self, *, planned: bool = False) -> frozenset[str]:
        """Names of the statistics to gather. If ranks are `planned`, none are needed for curves of predicted loss."""
        needs = self.method.needs
        if self.allocation == "loss" and not planned:
            needs = needs | {"gram", ROBUST if self.robust else GRADIENTS}
        return needs | (frozenset({"gram"}) if self.refit else frozenset())


def _check_seconds(allocation: str, recipe: Recipe) -> None:
    if allocation != "loss" and recipe.plan is None:
        flag = "--speedup" if recipe.speedup is not None else "--objective latency"
        raise UsageError(
            f"{flag} with --allocation {allocation}: sizes that measured seconds choose are weighed against predicted "
            f"losses. Use --allocation loss, or leave {flag} out."
        )


def _with_gradients(method: Method, recipe: Recipe, allocation: str) -> tuple[Method, bool]:
    """The method on the gradients that the recipe asks for, or else its own; and whether these are the robust ones.

    Raises:
        UsageError: robust gradients are asked for, and none are read.
    """
    reads = method.metric in (kfac_metric, robust_metric)
    robust = ROBUST in method.needs if recipe.robust_gradients is None else recipe.robust_gradients
    if recipe.robust_gradients and not reads and allocation != "loss":
        raise UsageError(
            f"--robust-gradients: {recipe.metric or method.name} with --allocation {allocation} reads no gradients of "
            "tokens. Use --metric kfac or --allocation loss, or leave --robust-gradients out."
        )
    if reads:
        needs = method.needs - {GRADIENTS, ROBUST} | {ROBUST if robust else GRADIENTS}
        method = with_changes(method, metric=robust_metric if robust else kfac_metric, needs=needs)
    return method, robust


def _measures_curves(method: Method, allocation: str, recipe: Recipe) -> bool:
    """Whether curves are to be measured, which makes sense where ranks are chosen by them.

    Raises:
        UsageError: they are not, and it is asked for.
    """
    if recipe.calibrate_curves and (allocation != "loss" or recipe.plan is not None):
        what = "--plan" if recipe.plan is not None else f"--allocation {allocation}"
        raise UsageError(
            f"--calibrate-curves with {what}: no ranks are chosen by curves of predicted loss there. Leave one of the "
            "two out."
        )
    wanted = method.calibrated_curves if recipe.calibrate_curves is None else recipe.calibrate_curves
    return wanted and allocation == "loss" and recipe.plan is None


def _default_form(method: Method, recipe: Recipe) -> str:
    """The form of the method for what the recipe wants to have: speed, or few numbers."""
    return method.form if recipe.optimise == "speed" else method.smallest_form or method.form


def _form_beside_slices(method: Method, recipe: Recipe) -> str:
    """The form of weights that are in no layer of neurons.

    Raises:
        UsageError: what is asked for cannot be a checkpoint that transformers loads alone.
    """
    if recipe.stock and recipe.form not in (None, SLICED):
        raise UsageError(
            f"--stock --form {recipe.form}: transformers alone loads ordinary layers. Leave one of the two out."
        )
    if recipe.stock and recipe.embeddings != "dense":
        raise UsageError(
            f"--stock --embeddings {recipe.embeddings}: transformers alone loads no factored embeddings. Leave one of "
            "the two out."
        )
    form = _default_form(method, recipe)
    return form_named(form).unshared_form if _shared_by_layers(form_named(form)) else form


def _of_inputs(method: Method) -> set[str]:
    """The statistics of the inputs that its metric reads; means are always there."""
    return {name for name, kind in statistics_named(method.needs).items() if not kind.needs_backward} - {"mean"}


def _shared_by_layers(kind: type[FactoredLinear]) -> bool:
    return kind.shared_parameter is not None and kind.shared_by == "layers"


def _forms(wanted: Callable[[type[FactoredLinear]], object]) -> str:
    """The names of the forms of which something is true, for messages."""
    return " or ".join(name for name, kind in FORMS.items() if wanted(kind))


def check_metric_shares(method: Method) -> None:
    """Refuse a metric under which layers cannot share a basis.

    Raises:
        UsageError: it weighs each layer's own outputs, or centers each layer's own inputs.
    """
    if method.centered or not all(kind.shares_basis for kind in statistics_named(method.needs).values()):
        raise UsageError(
            f"--method {method.name}: its metric weighs the outputs or the mean of each layer by itself, so that "
            "layers cannot share a basis under it. Use --metric drone, asvd or svd, or --method basis-sharing."
        )


def _check_sharing(method: Method, form: str, allocation: str, recipe: Recipe) -> None:
    if allocation != "uniform" and recipe.plan is None:
        raise UsageError(
            f"--allocation {allocation}: in form {form} the layers of a group have one rank, which no layer's own "
            "curve of losses decides. Use --allocation uniform, or --method basis-sharing."
        )
    check_metric_shares(method)
