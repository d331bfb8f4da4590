"""Refit in closed form: every site is solved again on the inputs that the compressed model gives it.

After earlier sites are compressed a site sees x~ where it saw x. Its target becomes the weight whose output on
x~ is nearest to the original output on x (:class:`~eckart.recover.moved.MovedInputs`), and the metric of its
inputs that of x~. Sites are visited in the order of the forward pass, so each sees all that came before it.
A site that the plan leaves dense is moved too: its target is stored as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace as with_changes
from functools import partial
from typing import Any

from torch import nn

from eckart.allocate import DENSE, Choice
from eckart.data import Batch
from eckart.data.inference import device_of, evaluating, forward, progress
from eckart.linalg import factorise
from eckart.methods import Method
from eckart.model import Site, dense_weight, replace, set_dense, store
from eckart.moments import Moments, real_rows
from eckart.recover.moved import MovedInputs
from eckart.recover.walk import Walker, block_of, chains


def refit(
    original: nn.Module,
    compressed: nn.Module,
    sites: Sequence[Site],
    choices: Mapping[str, Choice],
    groups: Mapping[str, Sequence[str]],
    moments: Mapping[str, Moments],
    method: Method,
    batches: Sequence[Batch],
    leave: Collection[str] = (),
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
        leave: sites whose input is not one tensor a pass; they stay as they are.

    Returns:
        Notes of what could not be refitted, and fallbacks.
    """
    groups = {leader: members for leader, members in groups.items() if not set(members) & set(leave)}
    notes = [f"{name}: not refitted, it reads more than one input" for name in leave]
    by_name = {site.name: site for site in sites}
    runs = {model: [partial(forward, model, batch.inputs) for batch in batches] for model in (original, compressed)}
    walked: set[str] = set()
    with evaluating(original, compressed):
        for blocks in chains(list(groups), original):
            mine = {leader: members for leader, members in groups.items() if block_of(leader, original) in blocks}
            walked |= set(mine)
            before = Walker.start(original, blocks, runs[original])
            now = Walker.start(compressed, blocks, runs[compressed]) if before is not None else None
            if before is None or now is None:
                notes.append(f"{blocks[0].rpartition('.')[0]}: its blocks do not form one chain; not refitted")
                continue
            for index, block in enumerate(progress(blocks, what="refitting", total=len(blocks))):
                for leader, members in mine.items():
                    if block_of(leader, original) != block:
                        continue
                    moved = MovedInputs.empty(by_name[leader].in_features, device_of(compressed))
                    for batch, x, y in zip(
                        batches, before.inputs(index, leader), now.inputs(index, leader), strict=True
                    ):
                        moved.update(
                            real_rows(x, batch), real_rows(y, batch), f"input of {leader} in the compressed model"
                        )
                    for name in members:
                        if name in moments:
                            site, choice = by_name[name], choices[name]
                            notes += _solve(original, compressed, site, choice, moments[name], method, moved)
                before.advance(index)
                now.advance(index)
    outside = [leader for leader in groups if leader not in walked and leader in moments]
    if outside:
        notes.append(f"not refitted, outside the blocks: {', '.join(outside[:5])}")
    return notes


def _solve(
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
