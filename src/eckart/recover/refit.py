"""Refit in closed form: every site is solved again on the inputs that the compressed model gives it.

After earlier sites are compressed a site sees x~ where it saw x. Its target becomes the weight whose output on
x~ is nearest to the original output on x (:class:`~eckart.recover.moved.MovedInputs`), and the metric of its
inputs that of x~. Sites are visited in the order of the forward pass, so each sees all that came before it.
A site that the plan leaves dense is moved too: its target is stored as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace as with_changes
from typing import Any

from torch import Tensor, nn

from eckart.allocate import DENSE, Choice
from eckart.data import Batch
from eckart.data.inference import evaluating, forward, progress
from eckart.linalg import factorise
from eckart.methods import Method
from eckart.model import Site, dense_weight, replace, set_dense, store
from eckart.moments import Moments, real_rows
from eckart.recover.moved import MovedInputs
from eckart.recover.walk import Call, advance, block_of, chains, input_of, record

logger = logging.getLogger(__name__)


def refit(
    original: nn.Module,
    compressed: nn.Module,
    sites: Sequence[Site],
    choices: Mapping[str, Choice],
    groups: Mapping[str, Sequence[str]],
    moments: Mapping[str, Moments],
    method: Method,
    batches: Sequence[Batch],
) -> list[str]:
    """Solve every site again, in place in `compressed`.

    Args:
        original: the model as it was.
        compressed: the model with forms in place.
        sites: all sites.
        choices: site -> form and rank; ranks stay.
        groups: leader -> members, in order of the forward pass.
        moments: site -> statistics of the original model; the gradient side is used again.
        method: its metric is used on the moved inputs.
        batches: calibration data.

    Returns:
        Notes of what could not be refitted, and fallbacks.
    """
    notes: list[str] = []
    by_name = {site.name: site for site in sites}

    def solve(leader: str, members: Sequence[str], pairs: Any) -> None:
        width = by_name[leader].in_features
        moved = MovedInputs.empty(width, next(compressed.parameters()).device)
        for before, now in pairs:
            moved.update(before, now)
        for name in members:
            if name in moments:
                notes.extend(_resolve(original, compressed, by_name[name], choices[name], moments[name], method, moved))

    with evaluating(original, compressed):
        done: set[str] = set()
        for blocks in chains(list(groups), original):
            inside = {leader: members for leader, members in groups.items() if block_of(leader, original) in blocks}
            if _walk(original, compressed, blocks, inside, batches, solve):
                done |= set(inside)
            else:
                notes.append(f"{blocks[0].rsplit('.', 1)[0]}: its blocks are not one chain; not refitted")
                done |= set(inside)
        outside = [leader for leader in groups if leader not in done]
        if outside:
            notes.append(f"not refitted, outside the blocks: {', '.join(outside[:5])}")
    return notes


def _walk(
    original: nn.Module,
    compressed: nn.Module,
    blocks: Sequence[str],
    groups: Mapping[str, Sequence[str]],
    batches: Sequence[Batch],
    solve: Callable[[str, Sequence[str], Any], None],
) -> bool:
    """Visit the blocks of one chain; False if they are none, before anything is changed."""
    calls: dict[str, list[list[Call]]] = {"before": [], "now": []}
    streams: dict[str, list[Tensor]] = {"before": [], "now": []}
    for side, model in (("before", original), ("now", compressed)):
        for batch in batches:
            recorded = record(model, blocks, lambda model=model, batch=batch: forward(model, batch.inputs))  # type: ignore[misc]
            if recorded is None:
                return False
            calls[side].append(recorded[0])
            streams[side].append(recorded[1])
    for index, name in enumerate(progress(blocks, what="refitting")):
        mine = {leader: members for leader, members in groups.items() if leader.startswith(name + ".")}
        here = {"before": original.get_submodule(name), "now": compressed.get_submodule(name)}
        for leader, members in mine.items():
            inner = leader.removeprefix(name + ".")

            def pairs(index: int = index, here: dict[str, nn.Module] = here, inner: str = inner) -> Any:
                for i, batch in enumerate(batches):
                    yield tuple(
                        real_rows(
                            input_of(
                                here[side].get_submodule(inner),
                                lambda side=side, i=i: calls[side][i][index].run(here[side], streams[side][i]),  # type: ignore[misc]
                            ),
                            batch,
                        )
                        for side in ("before", "now")
                    )

            solve(leader, members, pairs())
        for side in ("before", "now"):
            advance([per_batch[index] for per_batch in calls[side]], here[side], streams[side])
    return True


def _resolve(
    original: nn.Module,
    compressed: nn.Module,
    site: Site,
    choice: Choice,
    moments: Moments,
    method: Method,
    moved: MovedInputs,
) -> list[str]:
    """Solve one site on its moved inputs and store it; returns notes."""
    old: Any = original.get_submodule(site.name)
    current: Any = compressed.get_submodule(site.name)
    weight = dense_weight(old).float()
    centred = moments.centred
    target = moved.target(weight, centred=centred)
    bias = old.bias.detach() if site.has_bias else None
    notes: list[str] = []
    if choice.form == DENSE:
        stored = target
    else:
        now = with_changes(moments, inputs=moved.second_moment())
        solved = factorise(method.metric(target, now), site.name)
        notes.extend(solved.notes)
        left, right = solved.truncated(choice.rank)
        stored = left @ right
    if bias is not None and centred:
        mean, shifted = moved.means()
        bias = bias.double() + weight.double() @ mean - stored.double() @ shifted
    if choice.form == DENSE:
        set_dense(compressed, site.name, stored, bias)
        return notes
    dtype = next(current.parameters()).dtype
    module, fallback = store(site, choice.form, choice.rank, left, right, bias, dtype)
    replace(compressed, site.name, module)
    return [*notes, fallback] if fallback is not None else notes
