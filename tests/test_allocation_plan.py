"""Plan files: written, edited, read, and refused by file, site and field."""

import json
import re
from pathlib import Path

import pytest

from eckart.allocation import (
    DENSE,
    Choice,
    Plan,
    parse_plan,
    read_plan,
    stored_elements,
)
from eckart.errors import UsageError

SHAPES = {"a": (64, 48), "b": (48, 64), "c": (40, 40), "d": (96, 24)}
PLAN = Plan(
    {"a": Choice("pivoted", 12), "b": Choice("lowrank", 8), "c": Choice(DENSE), "d": Choice("lowrank", 3)},
    model="abc123",
    predicted={"a": 0.25},
)


def written(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "plan.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_plan_is_read_as_it_was_written(tmp_path):
    content = PLAN.to_json()
    assert content["sites"]["a"] == {"form": "pivoted", "rank": 12, "predicted_loss": 0.25}
    assert content["sites"]["c"] == {"form": "dense"}
    again = read_plan(written(tmp_path, content), SHAPES)
    assert (again.choices, again.model) == (PLAN.choices, PLAN.model)


def test_edited_plan_is_read_and_missing_sites_stay_dense(tmp_path):
    content = PLAN.to_json()
    content["sites"]["a"] = {"form": "lowrank", "rank": 5}
    content["sites"]["b"] = {"form": "dense"}
    del content["sites"]["d"], content["model"]
    again = read_plan(written(tmp_path, content), SHAPES)
    assert again.choices == {"a": Choice("lowrank", 5), **{name: Choice(DENSE) for name in "bcd"}}
    assert again.model == ""


def plan_with(**site: object) -> dict:
    content = PLAN.to_json()
    content["sites"]["a"] = site
    return content


BAD_PLANS = {
    "not JSON": ('{"sites": \n oops}', "not JSON at line 2"),
    "not an object": ([1, 2], "it needs an object 'sites'"),
    "no sites": ({"format_version": 1}, "it needs an object 'sites'"),
    "sites are a list": ({"format_version": 1, "sites": []}, "it needs an object 'sites'"),
    "newer version": ({**PLAN.to_json(), "format_version": 2}, "format_version is 2, this eckart reads 1"),
    "no version": ({"sites": {}}, "format_version is None"),
    "unknown site": (
        {"format_version": 1, "sites": {"h.9.q": {"form": "dense"}}},
        r"site 'h\.9\.q' is not one of this model's 4 sites",
    ),
    "site is a number": ({"format_version": 1, "sites": {"a": 7}}, "site a: needs an object with 'form' and 'rank'"),
    "no form": (plan_with(rank=3), "site a: needs an object with 'form'"),
    "unknown form": (plan_with(form="lowrnk", rank=3), "site a: form 'lowrnk' is not known"),
    "form is a list": (plan_with(form=["lowrank"], rank=3), r"site a: form \['lowrank'\] is not known"),
    "no rank": (plan_with(form="lowrank"), r"site a: rank None must be a whole number in 1\.\.48"),
    "rank too large": (plan_with(form="lowrank", rank=49), r"site a: rank 49 .* for a weight of 64 x 48"),
    "rank zero": (plan_with(form="lowrank", rank=0), "site a: rank 0"),
    "rank negative": (plan_with(form="lowrank", rank=-3), "site a: rank -3"),
    "rank is true": (plan_with(form="lowrank", rank=True), "site a: rank True"),
    "rank is a fraction": (plan_with(form="lowrank", rank=3.0), r"site a: rank 3\.0"),
    "all sites dense": ({"format_version": 1, "sites": {}}, "every site stays dense, so nothing would be factored"),
    "unknown key": ({**PLAN.to_json(), "sitez": {}}, "'sitez' is not read from a plan; did you mean 'sites'"),
    "unknown key of a site": (plan_with(form="lowrank", rnak=3), "site a: 'rnak' is not read .* did you mean 'rank'"),
    "site twice": (
        '{"format_version": 1, "sites": {"a": {"form": "dense"}, "a": {"form": "dense"}}}',
        "'a' stands twice",
    ),
    "key twice": (
        '{"format_version": 1, "sites": {"a": {"form": "lowrank", "rank": 1, "rank": 2}}}',
        "'rank' stands twice",
    ),
    "no number": ('{"format_version": 1, "sites": {"a": {"form": "lowrank", "rank": NaN}}}', "it holds NaN"),
    "nested too deeply": ("[" * 99_999 + "]" * 99_999, "it is nested too deeply"),
    "thousands of digits": ('{"format_version": ' + "9" * 5000 + "}", "Mend it, or have the plan made again"),
    "rank is text": (plan_with(form="lowrank", rank="3"), "site a: rank '3'"),
}


@pytest.mark.parametrize(("content", "named"), BAD_PLANS.values(), ids=BAD_PLANS)
def test_bad_plan_is_refused_by_file_site_and_field(content, named, tmp_path):
    path = written(tmp_path, content)
    with pytest.raises(UsageError, match=re.escape(str(path)) + "[^§]*" + named):
        read_plan(path, SHAPES)


def test_plan_that_cannot_be_read_names_the_file(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere\.json: cannot be read"):
        read_plan(tmp_path / "nowhere.json", SHAPES)
    with pytest.raises(UsageError, match="cannot be read"):
        read_plan(tmp_path, SHAPES)
    with pytest.raises(UsageError, match="it is a pipe or a device, not a file"):
        read_plan(Path("/dev/zero"), SHAPES)
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot be read"):
        read_plan(tmp_path / "plan.json", SHAPES)


def test_stored_elements_counts_every_site():
    dense = sum(rows * columns for rows, columns in SHAPES.values())
    assert stored_elements({name: Choice(DENSE) for name in SHAPES}, SHAPES) == dense
    assert stored_elements({"a": Choice("lowrank", 2), "c": Choice(DENSE)}, SHAPES) == 2 * (64 + 48) + 1600
    assert stored_elements({"a": Choice("pivoted", 2)}, SHAPES) == 2 * (64 + 48 - 2) + 64


BLOCK_PLAN = Plan({"a": Choice("kronecker", 3, (4, 6)), "b": Choice("lowrank", 8), "c": Choice(DENSE)})
BLOCK_SHAPES = {"a": (24, 18), "b": (48, 64), "c": (40, 40)}


def test_plan_with_blocks_is_read_as_it_was_written():
    content = json.loads(json.dumps(BLOCK_PLAN.to_json()))
    assert content["sites"]["a"] == {"form": "kronecker", "rank": 3, "block": [4, 6]}
    assert content["sites"]["b"] == {"form": "lowrank", "rank": 8}
    assert parse_plan(content, "plan.json", BLOCK_SHAPES).choices == BLOCK_PLAN.choices


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"block": None}, r"block None must be two whole numbers \[rows, columns\]"),
        ({"block": [4]}, r"block \[4\] must be"),
        ({"block": [4, True]}, "block .* must be"),
        ({"block": "4x6"}, "block '4x6' must be"),
        ({"block": [5, 6]}, r"block \[5, 6\] must be .* that divide a weight of 24 x 18"),
        ({"block": [0, 6]}, r"block \[0, 6\] must be"),
        ({"rank": 19}, r"rank 19 must be a whole number in 1\.\.18"),
        ({"form": "lowrank"}, r"block \[4, 6\] means nothing to this form"),
    ],
)
def test_bad_blocks_of_a_plan_are_refused(change, named):
    content = BLOCK_PLAN.to_json()
    content["sites"]["a"] |= change
    with pytest.raises(UsageError, match=r"plan\.json: site a: " + named):
        parse_plan(content, "plan.json", BLOCK_SHAPES)


GROUPED = {"0.q": (24, 16), "1.q": (24, 16), "0.k": (4, 32), "1.k": (4, 32), "o": (16, 24)}
GROUPED_PLAN = Plan(
    {"0.q": Choice("shared-basis", 7), "1.q": Choice("shared-basis", 7, basis="0.q"), "o": Choice("lowrank", 3)}
)


def test_plan_with_shared_bases_round_trip_and_refusals():
    content = json.loads(json.dumps(GROUPED_PLAN.to_json()))
    assert content["sites"]["1.q"] == {"form": "shared-basis", "rank": 7, "basis": "0.q"}
    again = parse_plan(content, "plan.json", GROUPED)
    assert again.bases == GROUPED_PLAN.bases == [("0.q", "1.q")]
    for change, named in (
        ({"basis": "1.q"}, "is not a site of form shared-basis with a basis of its own"),
        ({"basis": "o"}, "basis 'o' is not a site of form shared-basis"),
        ({"basis": "nowhere"}, "basis 'nowhere' is not a site"),
        ({"basis": 3}, "basis 3 means nothing"),
        ({"form": "lowrank"}, "basis '0.q' means nothing to this form"),
        ({"rank": 6}, "rank 6 for 16 inputs, but its basis in 0.q has rank 7 for 16; give both the same"),
        ({"rank": 17}, r"rank 17 must be a whole number in 1..16"),
    ):
        changed = json.loads(json.dumps(GROUPED_PLAN.to_json()))
        changed["sites"]["1.q"] |= change
        with pytest.raises(UsageError, match=named):
            parse_plan(changed, "plan.json", GROUPED)
    small = {"a": (3, 16), "b": (3, 16)}
    wide = Plan({"a": Choice("shared-basis", 7), "b": Choice("shared-basis", 7, basis="a")})
    with pytest.raises(UsageError, match=r"rank 7 of a shared basis must be in 1\.\.6"):
        parse_plan(wide.to_json(), "plan.json", small)
