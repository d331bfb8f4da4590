"""An effort picks the stages; options of single stages come first."""

from __future__ import annotations

from dataclasses import replace

import pytest
from architectures import BY_NAME

import eckart
from eckart.compression.effort import with_effort
from eckart.compression.recipe import Recipe
from eckart.compression.settings import Settings
from eckart.errors import UsageError
from eckart.registry import METHODS


def stages(method="eckart", **options):
    settings = Settings.of(METHODS[method], Recipe(method=method, **options))
    return settings.refit, settings.measures_curves, settings.refines, settings.distils


def test_fast_leaves_all_stages_out_and_best_fits_what_there_is():
    assert stages(effort="fast") == (False, False, False, False)
    assert stages(effort="best") == (True, False, True, True)
    assert stages("lems", effort="best") == (True, True, True, True), "the method's own stages stay"
    assert stages() == stages(effort="default")
    assert stages("lems", effort="fast") == (False, False, False, False)
    assert stages("aa-svd") == (True, False, True, False)


def test_fast_takes_no_stage_of_any_method():
    everything = replace(METHODS["drone"], refit=True, calibrated_curves=True, refined=True, distilled=True)
    fast = with_effort(everything, "fast")
    assert (fast.refit, fast.calibrated_curves, fast.refined, fast.distilled) == (False, False, False, False)
    assert with_effort(everything, "default") == everything


def test_best_takes_what_a_method_allows():
    assert stages("drone", effort="best") == (True, False, True, True)
    assert stages("svd", effort="best") == (False, False, True, True), "its metric reads no inputs"
    assert stages(effort="best", plan=None, allocation="uniform") == (True, False, True, True)


def test_options_of_single_stages_come_first():
    assert stages(effort="fast", refit=True) == (True, False, False, False)
    assert stages(effort="best", refine=False, calibrate_curves=True) == (True, True, False, True)
    assert stages(effort="best", distil=False) == (True, False, True, False)
    assert stages(effort="fast", distil=True) == (False, False, False, True)
    assert stages(effort="fast", calibrate_curves=True, refine=True) == (False, True, True, False)


def test_a_refinement_that_cannot_be_is_refused_where_it_was_asked_for_and_else_noted():
    found = BY_NAME["llama"]
    model, batches = found.model(), found.batches(rows=1, count=1)
    options = {"data": batches, "keep": 0.5, "method": "drone", "target": "none"}
    result = eckart.compress(model, effort="best", **options)
    assert any("refinement was left out" in note and "too little text" in note for note in result.report["notes"])
    with pytest.raises(UsageError, match="--refine: there is too little text"):
        eckart.compress(model, refine=True, **options)
