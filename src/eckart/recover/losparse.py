"""LoSparse (Li et al. 2023, arXiv 2306.11222): a dense model becomes low-rank + sparse while it learns a task.

Every chosen weight is split, `W = U V + S`, U V its best rank-k approximation and S what is left. All of it trains; on
the way whole rows of S are pruned, those whose numbers matter least by `|p grad|`, until the budget is met. In the end
the pruned rows are removed, not masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from eckart.errors import UsageError
from eckart.forms import LowRank, LowRankSparse, MaskedLowRankSparse
from eckart.linalg import averaged_importance, checked_svd, cubic_fraction, rows_above
from eckart.model import Site, dense_module, dense_weight, find_sites, replace


@dataclass
class LoSparse:
    """Splits, trains and prunes; the published setting of MNLI is keep .2, low_rank .05.

    What is stored in the end, indices included, is at most `keep` of the numbers of the chosen matrices. A row of S
    goes by one threshold over all matrices, and does not come back.

    Attributes:
        keep: fraction of the chosen matrices' numbers that is stored in the end.
        low_rank: the part of that fraction that the factors U, V take; None: a quarter of `keep`, as published.
        targets: which sites, as in `find_sites`.
        ignore: which not.
        warmup: fraction of the steps before pruning starts.
        final: fraction of the steps at the end without pruning.
        every: DeltaT, the steps over which an importance is averaged before it is used.
        beta: of the exponential average of importances.
        distil: weight of the distillation from the teacher's logits; 0: no teacher.
        temperature: of that distillation.
        layers: weight of the mean squared difference to the teacher's hidden states, beside the logits.
    """

    keep: float
    low_rank: float | None = None
    targets: Sequence[str] | None = None
    ignore: Sequence[str] | None = None
    warmup: float = 0.1
    final: float = 0.3
    every: int = 10
    beta: float = 0.85
    distil: float = 0.0
    temperature: float = 2.0
    layers: float = 15.0

    name: ClassVar[str] = "losparse"
    notes: list[str] = field(default_factory=list, init=False)
    _split: dict[str, MaskedLowRankSparse] = field(default_factory=dict, init=False)
    _total_steps: int = field(default=0, init=False)
    _budget: int = field(default=0, init=False)
    _terms: dict[str, Tensor] = field(default_factory=dict, init=False)
    _counted: int = field(default=0, init=False)
    _importance: dict[str, Tensor] = field(default_factory=dict, init=False)
    _report: dict[str, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        share = self.low_rank if self.low_rank is not None else self.keep / 4
        if not 0 < self.keep < 1 or not 0 < share <= self.keep or self.every < 1:
            raise UsageError(
                f"losparse: keep {self.keep:g} must be inside 0..1, its low-rank part {share:g} above 0 and at most "
                f"keep, and importances averaged over 1 step or more, not {self.every}."
            )
        cubic_fraction(0, 1, self.warmup, self.final, 0.0)  # refuses phases that cannot be

    @property
    def needs_teacher(self) -> bool:
        """Whether the original model is asked too."""
        return self.distil > 0

    @property
    def wants(self) -> frozenset[str]:
        """What the models have to put out beside logits."""
        return frozenset({"hidden_states"}) if self.distil > 0 and self.layers > 0 else frozenset()

    def prepare(self, model: PreTrainedModel, context: Any) -> None:
        """Split every chosen weight.

        Raises:
            UsageError: if `keep` cannot hold even rank 1 everywhere.
            ModelError: if the model has no site left, or is factored already.
        """
        sites = find_sites(model, self.targets, self.ignore).chosen
        share = self.low_rank if self.low_rank is not None else self.keep / 4
        ranks = {site.name: _rank(site, share) for site in sites}
        total = sum(site.elements for site in sites)
        factors = sum(_factors(site, ranks[site.name]) for site in sites)
        self._budget = int(self.keep * total) - factors
        if self._budget < 0:
            raise UsageError(
                f"losparse: keep {self.keep:g} is {int(self.keep * total):,} numbers, and the factors alone take "
                f"{factors:,}; the smallest keep is {sum(_factors(site, 1) for site in sites) / total:.4g}, with a "
                "low-rank part as small."
            )
        self._total_steps = int(context.total_steps)
        self._report = {"sites": len(sites), "dense_elements": total, "factor_elements": factors, "ranks": ranks}
        for site in sites:
            module, notes = _split(model.get_submodule(site.name), site, ranks[site.name])
            self.notes += notes
            replace(model, site.name, module)
            self._split[site.name] = module

    def loss(self, outputs: Any, teacher_outputs: Any, batch: Any, task_loss: Tensor) -> Tensor:
        """The task's loss; with distillation `+ d (T^2 KL(teacher || student) + l mean squared difference of layers)`.

        Raises:
            UsageError: if distillation is asked for and there is no teacher.
        """
        if not self.needs_teacher:
            return task_loss
        if teacher_outputs is None:
            raise UsageError("losparse: distillation needs a teacher; give one, or set distil to 0.")
        heat = self.temperature
        student = functional.log_softmax(outputs.logits.float() / heat, -1)
        teacher = functional.log_softmax(teacher_outputs.logits.detach().float() / heat, -1)
        gap = heat**2 * functional.kl_div(student, teacher, log_target=True, reduction="none").sum(-1).mean()
        if self.layers > 0:
            pairs = zip(outputs.hidden_states, teacher_outputs.hidden_states, strict=True)
            layers = [_squared(mine, its.detach(), batch) for mine, its in pairs]
            gap = gap + self.layers * torch.stack(layers).mean()
        return task_loss + self.distil * gap

    def after_backward(self, model: nn.Module, step: int) -> None:
        """Add up `|p grad|`, the mean over each row of S."""
        for name, module in self._split.items():
            weight = module.sparse.weight
            if weight.grad is not None:
                term = (weight.detach() * weight.grad).abs().float().mean(1)
                self._terms[name] = self._terms[name] + term if name in self._terms else term
        self._counted += 1

    def after_step(self, model: nn.Module, step: int) -> None:
        """Prune to the schedule where an importance is new; keep what is pruned at zero.

        Args:
            model: in training.
            step: steps done so far.
        """
        for module in self._split.values():
            module.clear()
        if self._counted >= self.every:
            self._update_importance()
            self._prune(step)

    def finish(self, model: PreTrainedModel) -> PreTrainedModel:
        """Prune to the budget, and put in place what is stored: rows that are pruned are not there any more."""
        if self._counted:
            self._update_importance()
        self._prune(self._total_steps)
        forms: dict[str, str] = {}
        stored = 0
        for name, module in self._split.items():
            small = module.compact()
            rows = small.rows if isinstance(small, LowRankSparse) else 0
            form = LowRankSparse if rows else LowRank
            shape = (module.out_features, module.in_features, module.rank)
            size = form.size(*shape, rows) if rows else form.size(*shape)
            dense = module.out_features * module.in_features
            if size.parameters >= dense:  # nearly all rows stayed: the matrix itself is smaller
                replace(model, name, dense_module(small))
                forms[name], stored = "dense", stored + dense
            else:
                replace(model, name, small)
                forms[name], stored = small.form, stored + size.parameters
        self._report |= {
            "stored_elements": stored,
            "keep": stored / self._report["dense_elements"],
            "rows": {name: int(module.alive.sum()) for name, module in self._split.items()},
            "forms": forms,
        }
        self._split = {}
        return model

    def report(self) -> dict[str, Any]:
        """What was asked for, what is stored, and what was done otherwise than asked."""
        asked = {key: getattr(self, key) for key in ("low_rank", "warmup", "final", "every", "beta", "distil")}
        return {"room": self.name, "asked_keep": self.keep} | asked | self._report | {"notes": list(self.notes)}

    # -- inside ----------------------------------------------------------------------------------------

    def _update_importance(self) -> None:
        for name, term in self._terms.items():
            mean = term / self._counted
            self._importance[name] = averaged_importance(self._importance.get(name), mean, self.beta)
        self._terms, self._counted = {}, 0

    def _prune(self, step: int) -> None:
        """Keep as many rows as the schedule allows after `step` steps."""
        costs = {name: module.in_features + 1 for name, module in self._split.items()}  # the numbers and the index
        everything = sum(module.out_features * costs[name] for name, module in self._split.items())
        target = min(1.0, self._budget / everything)
        fraction = cubic_fraction(step, max(1, self._total_steps), self.warmup, self.final, target)
        budget = self._budget if fraction <= target else int(fraction * everything)
        if budget >= everything:
            return
        scores = []
        for name, module in self._split.items():
            if name not in self._importance:
                self.notes.append(f"{name}: no gradient was seen, its rows are scored by mean |p|")
                self._importance[name] = module.sparse.weight.detach().abs().float().mean(1)
            scores.append(self._importance[name])
        modules = list(self._split.values())
        masks = rows_above(scores, [module.alive for module in modules], list(costs.values()), budget)
        for module, mask in zip(modules, masks, strict=True):
            module.prune(mask)


def _rank(site: Site, share: float) -> int:
    """The largest rank whose factors take at most that share of the matrix, and 1 at least."""
    return min(max(1, int(share * site.elements / (site.out_features + site.in_features))), *site.shape)


def _factors(site: Site, rank: int) -> int:
    return rank * (site.out_features + site.in_features)


def _split(old: Any, site: Site, rank: int) -> tuple[MaskedLowRankSparse, list[str]]:
    """`W = U V + S`, the root of each singular value on either side."""
    weight = dense_weight(old)
    left, values, right, notes = checked_svd(weight, site.name)
    root = values[:rank].sqrt()
    left, right = left[:, :rank] * root, root[:, None] * right[:rank]
    with torch.device("meta"):
        empty = MaskedLowRankSparse(site.in_features, site.out_features, rank, site.has_bias, site.source)
    module = empty.to(weight.dtype).to_empty(device=weight.device)
    module.alive.fill_(True)
    # S is what the factors leave of W as they are stored.
    rest = weight.double() - left.to(weight.dtype).double() @ right.to(weight.dtype).double()
    module.store_sparse(left, right, rest, torch.arange(site.out_features), old.bias if site.has_bias else None)
    return module, list(notes)


def _squared(mine: Tensor, its: Tensor, batch: Any) -> Tensor:
    """Mean squared difference over the tokens that are no padding, where the batch says which."""
    difference = (mine.float() - its.float()).square().mean(-1)
    mask = batch.get("attention_mask") if hasattr(batch, "get") else None
    if mask is None or mask.shape != difference.shape:
        return difference.mean()
    return (difference * mask).sum() / mask.sum().clamp_min(1)
