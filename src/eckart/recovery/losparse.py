"""LoSparse (Li et al. 2023, arXiv 2306.11222): a dense model becomes low-rank + sparse while it learns a task.

Every chosen weight is split, `W = U V + S`, U V its best rank-k approximation and S what is left. All of it is trained;
meanwhile whole rows of S are pruned, the least important by `|p grad|` first, until the budget is met. At the end the
pruned rows are removed, not masked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from eckart.errors import UsageError
from eckart.forms import LowRank, LowRankSparse, MaskedLowRankSparse
from eckart.linalg import averaged_importance, checked_svd, cubic_fraction, rows_above
from eckart.model import Site, dense_module, dense_weight, find_sites, replace_module
from eckart.recovery.base import Recovery, RecoveryContext
from eckart.recovery.settings import split_patterns


@dataclass
class LoSparse(Recovery):
    """Splits, trains and prunes; the defaults of `keep` and `low_rank` are the published ones of MNLI.

    What is stored at the end, indices included, is at most `keep` of the parameters of the chosen matrices. Rows of S
    are pruned by one threshold over all matrices, and stay pruned.

    Attributes:
        keep: fraction of the chosen matrices' numbers that is stored in the end.
        low_rank: the part of that fraction that the factors U, V take; 0: a quarter of `keep`, as published.
        targets: which sites, as in `find_sites`, separated by commas; "" for all.
        ignore: which not.
        warmup: fraction of the steps before pruning starts.
        final: fraction of the steps at the end without pruning.
        every: DeltaT, the steps over which an importance is averaged before it is used.
        beta: of the exponential average of importances.
    """

    name: ClassVar[str] = "losparse"
    title: ClassVar[str] = "a dense model becomes low-rank + sparse, whole rows pruned while it learns the task"
    paper: ClassVar[str] = "Li et al. 2023, arXiv 2306.11222"
    use: ClassVar[str] = (
        "You have labels of a task and a dense model, and can train for epochs: the size is reached while the "
        "task is learned."
    )
    needs_dense_model: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 9e-5

    keep: float = 0.2
    low_rank: float = 0.0
    targets: str = ""
    ignore: str = ""
    warmup: float = 0.1
    final: float = 0.3
    every: int = 10
    beta: float = 0.85

    def __post_init__(self) -> None:
        self.check_range("(0, 1)", "keep")
        self.check_range(f"[0, {self.keep:g}]", "low_rank")
        self.check_range("[1, inf)", "every")
        self.check_range("[0, 1)", "beta")
        cubic_fraction(0, 1, self.warmup, self.final, 0.0)  # refuses phases that cannot be
        self._split: dict[str, MaskedLowRankSparse] = {}
        self._latest: dict[str, Tensor] = {}
        self._terms: dict[str, Tensor] = {}
        self._counted = 0
        self._importance: dict[str, Tensor] = {}
        self._report: dict[str, Any] = {}

    @property
    def shrinks(self) -> bool:
        """Always."""
        return True

    @property
    def _low_rank_fraction(self) -> float:
        return self.low_rank or self.keep / 4

    def prepare(self, model: PreTrainedModel, context: RecoveryContext) -> None:
        """Split every chosen weight.

        Raises:
            UsageError: if `keep` cannot hold even rank 1 everywhere.
            ModelError: if the model has no site left, or is factored already.
        """
        sites = find_sites(model, split_patterns(self.targets), split_patterns(self.ignore)).chosen
        ranks = {site.name: _rank(site, self._low_rank_fraction) for site in sites}
        total = sum(site.elements for site in sites)
        factors = sum(_factors(site, ranks[site.name]) for site in sites)
        self._budget = int(self.keep * total) - factors
        if self._budget < 0:
            least = sum(_factors(site, 1) for site in sites)
            raise UsageError(
                f"recovery {self.name}: keep {self.keep:g} is {int(self.keep * total):,} numbers, and the factors "
                f"alone take {factors:,}; the smallest keep is {least / total:.4g}, with a "
                "low-rank part as small."
            )
        self._report = {"sites": len(sites), "dense_elements": total, "factor_elements": factors, "ranks": ranks}
        for site in sites:
            module, notes = _split(model.get_submodule(site.name), site, ranks[site.name])
            context.notes += notes
            replace_module(model, site.name, module)
            self._split[site.name] = module
        super().prepare(model, context)

    def after_backward(self, model: nn.Module, step: int) -> None:
        """Note `|p grad|`, the mean over each row of S; of a step in parts, what has added up with the last one."""
        for name, module in self._split.items():
            weight = module.sparse.weight
            if weight.grad is not None:
                self._latest[name] = (weight.detach() * weight.grad).abs().float().mean(1)

    def after_step(self, model: nn.Module, step: int) -> None:
        """Prune to the schedule where an importance is new; keep what is pruned at zero.

        Args:
            model: in training.
            step: the step that was made, from 0.
        """
        for module in self._split.values():
            module.clear()
        for name, term in self._latest.items():
            self._terms[name] = self._terms[name] + term if name in self._terms else term
        self._latest = {}
        self._counted += 1
        if self._counted >= self.every:
            self._update_importance()
            self._prune(step + 1)

    def finish(self, model: PreTrainedModel) -> PreTrainedModel:
        """Prune to the budget, and put in place what is stored: rows that are pruned are not there any more."""
        if self._counted:
            self._update_importance()
        self._prune(max(1, self.context.total_steps))
        forms: dict[str, str] = {}
        stored = 0
        for name, module in self._split.items():
            small = module.compact()
            rows = small.rows if isinstance(small, LowRankSparse) else 0
            shape = (module.out_features, module.in_features, module.rank)
            size = LowRankSparse.size(*shape, rows=rows) if rows else LowRank.size(*shape)
            dense = module.out_features * module.in_features
            if size.parameters >= dense:  # nearly all rows stayed: the matrix itself is smaller
                replace_module(model, name, dense_module(small))
                forms[name], stored = "dense", stored + dense
            else:
                replace_module(model, name, small)
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
        """What was asked for, and what is stored."""
        asked = {key: getattr(self, key) for key in ("warmup", "final", "every", "beta")}
        return super().report() | {"asked_keep": self.keep, "low_rank": self._low_rank_fraction} | asked | self._report

    def state(self) -> dict[str, Tensor]:
        """Rows that are left, importances, and what adds up to the next ones."""
        tables = {"importance": self._importance, "terms": self._terms}
        state = {f"{table}/{name}": value for table, found in tables.items() for name, value in found.items()}
        state |= {f"alive/{name}": module.alive for name, module in self._split.items()}
        return state | {"counted": torch.tensor(self._counted)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state` gave."""
        self._counted = int(state["counted"])
        for name, module in self._split.items():
            module.alive.copy_(state[f"alive/{name}"])
            for table, found in (("importance", self._importance), ("terms", self._terms)):
                if f"{table}/{name}" in state:
                    found[name] = state[f"{table}/{name}"].to(module.alive.device, copy=True)

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
        fraction = cubic_fraction(step, max(1, self.context.total_steps), self.warmup, self.final, target)
        budget = self._budget if fraction <= target else int(fraction * everything)
        if budget >= everything:
            return
        scores = []
        for name, module in self._split.items():
            if name not in self._importance:
                self.context.notes.append(f"{name}: no gradient was seen, its rows are scored by mean |p|")
                self._importance[name] = module.sparse.weight.detach().abs().float().mean(1)
            scores.append(self._importance[name])
        modules = list(self._split.values())
        masks = rows_above(scores, [module.alive for module in modules], list(costs.values()), budget)
        for module, mask in zip(modules, masks, strict=True):
            module.prune(mask)


@dataclass
class LoSparseDistilled(LoSparse):
    """The same with the paper's distillation: `task + d (T^2 KL(teacher || student) + l MSE of all layers)`.

    Attributes:
        distil: d.
        temperature: T.
        layers: l, the weight of the mean squared difference of hidden states.
    """

    name: ClassVar[str] = "losparse-distil"
    title: ClassVar[str] = "losparse, with the teacher's logits and hidden states"
    use: ClassVar[str] = "As losparse, where the fine-tuned dense model is there to learn from."
    needs_teacher: ClassVar[bool] = True

    distil: float = 1.0
    temperature: float = 2.0
    layers: float = 15.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range("(0, inf)", "temperature")
        self.check_range("[0, inf)", "distil", "layers")

    @property
    def needed_outputs(self) -> frozenset[str]:
        """Hidden states, where they have a weight."""
        return frozenset({"hidden_states"} if self.layers else ())

    def loss(self, outputs: Any, teacher_outputs: Any, batch: Mapping[str, Tensor], task_loss: Tensor) -> Tensor:
        """The weighted sum."""
        heat = self.temperature
        student = functional.log_softmax(outputs.logits.float() / heat, -1)
        teacher = functional.log_softmax(teacher_outputs.logits.detach().float() / heat, -1)
        divergence = functional.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
        gap = heat**2 * _mean(divergence, batch)
        if self.layers:
            pairs = zip(outputs.hidden_states, teacher_outputs.hidden_states, strict=True)
            layers = [_mean((mine.float() - its.detach().float()).square().mean(-1), batch) for mine, its in pairs]
            gap = gap + self.layers * torch.stack(layers).mean()
        return task_loss + self.distil * gap


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


def _mean(values: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean over the tokens that are no padding, where the batch says which."""
    mask = batch.get("attention_mask")
    if mask is None or mask.shape != values.shape:
        return values.mean()
    return (values * mask).sum() / mask.sum().clamp_min(1)
