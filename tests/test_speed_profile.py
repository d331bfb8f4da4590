"""Profiles: which layers are run and how, what lies between two ranks, files."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from eckart.errors import UsageError
from eckart.speed import measure_profile as measuring
from eckart.speed.clock import Timing, take_processor
from eckart.speed.measure_profile import measure_profile
from eckart.speed.profile import Curve, LayerRequest, Profile, grid_of_ranks

CURVES = {
    ("dense", 8, (16,)): Curve((0,), (4.0,)),
    ("dense", 8, (8,)): Curve((0,), (2.0,)),
    ("lowrank", 8, (16,)): Curve((2, 4, 8), (1.0, 2.0, 6.0)),
    ("lowrank", 8, (8,)): Curve((2, 4), (0.5, 1.0)),
    ("joint", 8, (16, 8)): Curve((2, 4), (1.25, 2.5)),
}
PROFILE = Profile("cpu", "some processor", 2, "float32", 64, curves=CURVES, model_seconds=9.0)


def test_seconds_at_and_between_measured_ranks():
    assert PROFILE.seconds("lowrank", 8, (16,), 4) == 2.0
    assert PROFILE.seconds("lowrank", 8, (16,), 6) == 4.0
    assert PROFILE.seconds("joint", 8, (16, 8), 2) == 1.25
    assert PROFILE.seconds("dense", 8, (16,), 5) == 4.0  # a dense weight has no rank


def test_a_point_between_two_ranks_is_nearer_to_the_nearer_one():
    assert Curve((2, 8), (1.0, 7.0)).at(4) == 3.0


def test_weights_that_are_not_joint_add_up():
    assert PROFILE.seconds("dense", 8, (16, 8)) == 6.0
    assert PROFILE.seconds("lowrank", 8, (16, 8), 4) == 3.0


@pytest.mark.parametrize(
    ("form", "heights", "rank", "says"),
    [
        ("lowrank", (16,), 5, "rank 5, but at 2 to 8 in multiples of 2"),
        ("lowrank", (16,), 10, "rank 10, but at 2 to 8"),
        ("lowrank", (16,), 0, "rank 0"),
        ("lowrank", (16, 8), 6, "8 inputs and 8 outputs"),
        ("joint", (8, 16), 2, "8 \\+ 16 outputs was not measured; measure"),
        ("pivoted", (16,), 2, "pivoted of 8 inputs"),
    ],
)
def test_what_was_not_measured_is_refused(form, heights, rank, says):
    assert not PROFILE.covers(form, 8, heights, rank)
    with pytest.raises(UsageError, match=says):
        PROFILE.seconds(form, 8, heights, rank)


def test_covers_what_seconds_answers():
    assert PROFILE.covers("dense", 8, (16, 8))
    assert PROFILE.covers("lowrank", 8, [16, 8], 4)
    assert Curve((3, 4), (1.0, 2.0)).covers(3)
    assert Curve((6,), (1.0,)).covers(6)


@pytest.mark.parametrize(
    ("largest", "multiple", "points", "grid"),
    [
        (192, 64, 6, (64, 128, 192)),
        (200, 64, 6, (64, 128, 192)),
        (60, 64, 6, ()),
        (64, 1, 2, (1, 64)),
        (512, 64, 3, (64, 256, 512)),
        (512, 64, 1, (64,)),
    ],
)
def test_grid(largest, multiple, points, grid):
    assert grid_of_ranks(largest, multiple, points) == grid


# -- measuring ---------------------------------------------------------------------------------------------------


@pytest.fixture
def rounds(monkeypatch):
    """Instead of taking times, each run is called and what it computed is written down: (shape in, shape out)."""
    found: list[dict[str, list]] = []

    def measure(runs, **options):
        calls: dict[str, list] = {}

        def note(module, args, out):
            if type(module) is nn.Linear:
                shown.append(
                    (tuple(args[0].shape), tuple(out.shape), module.weight.data_ptr(), torch.is_grad_enabled())
                )

        hook = nn.modules.module.register_module_forward_hook(note)
        try:
            for name, run in runs.items():
                shown: list = []
                run()
                run()
                calls[name] = shown
        finally:
            hook.remove()
        found.append({"options": options, **calls})
        return {name: Timing(float(len(found) * 100 + i), 0.0, 0.0, 1) for i, name in enumerate(runs, 1)}

    monkeypatch.setattr(measuring, "measure_in_turn", measure)
    return found


def test_every_distinct_layer_is_measured_once(rounds):
    asked = [
        LayerRequest("dense", 8, (16, 16, 4)),
        ("lowrank", 8, (16,), (2,)),
        ("lowrank", 8, (16,), (3, 2)),
        ("dense", 6, (4,)),
        ("joint", 8, (16, 4), (2, 4)),
        ("joint", 8, (4, 4), ()),
    ]
    told = []
    profile = measure_profile(asked, tokens=5, dtype=torch.float32, report_progress=told.append)
    assert len(rounds) == len(told) == 2  # one round for each width of input
    assert dict(profile.curves) == {
        ("dense", 6, (4,)): Curve((0,), (101.0,)),
        ("dense", 8, (16,)): Curve((0,), (201.0,)),
        ("dense", 8, (4,)): Curve((0,), (202.0,)),
        ("lowrank", 8, (16,)): Curve((2, 3), (203.0, 204.0)),
        ("joint", 8, (16, 4)): Curve((2, 4), (205.0, 206.0)),
    }
    assert (profile.device, profile.dtype, profile.tokens, profile.bias) == ("cpu", "float32", 5, False)
    assert profile.threads == torch.get_num_threads()
    assert profile.device_name
    assert profile.model_seconds is None


@pytest.mark.parametrize(("threads", "stopwatch"), [(1, take_processor), (2, None)])
def test_one_thread_is_timed_by_what_the_processor_works(rounds, monkeypatch, threads, stopwatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    measure_profile([("dense", 8, (4,))], tokens=5, dtype=torch.float32, forward=lambda: None)
    assert [found["options"]["stopwatch"] for found in rounds] == [stopwatch] * 2


@pytest.mark.parametrize(
    ("form", "heights", "rank", "shapes"),
    [
        ("dense", (16,), (), [(8, 16)]),
        ("lowrank", (16,), (2,), [(8, 2), (2, 16)]),
        ("joint", (16, 4), (3,), [(8, 3), (3, 16), (3, 4)]),
        ("sliced", (16, 16, 8), (12,), [(8, 12), (8, 12), (12, 8)]),
        ("sliced", (16, 8), (12,), [(8, 12), (12, 8)]),
    ],
)
def test_layers_compute_what_the_form_computes(rounds, form, heights, rank, shapes):
    measure_profile([(form, 8, heights, rank)], tokens=5, dtype=torch.bfloat16, bias=True)
    (calls,) = rounds
    assert [(a[-1], b[-1]) for a, b, _, _ in calls["0"]] == shapes * 2
    assert all(a[0] == b[0] == 5 for a, b, _, _ in calls["0"])
    assert not any(gradients for *_, gradients in calls["0"])
    first, second = calls["0"][: len(shapes)], calls["0"][len(shapes) :]
    assert all(a[2] != b[2] for a, b in zip(first, second, strict=True))  # another copy, whose weights are not in cache


@pytest.mark.parametrize(
    ("own", "together", "device", "count"),
    [(10, 40, "cuda", 7), (10, 40, "cpu", 2), (1, 1, "cpu", 8), (100, 400, "cuda", 1), (10, 64, "cpu", 1)],
)
def test_copies_fill_the_cache_between_two_calls(monkeypatch, own, together, device, count):
    monkeypatch.setattr(measuring, "COLD_BYTES", 64)
    assert measuring._count_copies(own, together, device) == count


def test_weights_larger_than_the_cache_have_no_copies(rounds, monkeypatch):
    monkeypatch.setattr(measuring, "COLD_BYTES", 64)
    measure_profile([("dense", 8, (16,))], tokens=5, dtype=torch.float32)
    (calls,) = rounds
    assert calls["0"][0] == calls["0"][1]


@pytest.mark.parametrize("form", ["lowrank", "pivoted"])
def test_numbers_are_finite_and_orders_are_orders(form):
    stream = torch.Generator().manual_seed(0)
    state = torch.get_rng_state()
    (empty,) = measuring._layers((form, 8, (16,)), 3, True)
    x = torch.randn(5, 8, generator=stream)
    layer = measuring._fill(empty, x, stream)
    with torch.no_grad():
        out = layer(x)
    assert out.shape == (5, 16)
    assert 0.1 < out.std() < 10
    assert all(sorted(b.tolist()) == list(range(b.numel())) for b in layer.buffers() if not b.is_floating_point())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_whole_model_is_measured_where_it_is_given(rounds):
    called = []
    profile = measure_profile(
        [("dense", 8, (4,))], tokens=5, dtype=torch.float32, forward=lambda: called.append(torch.is_grad_enabled())
    )
    assert called == [False, False]
    assert profile.model_seconds == 201.0


def test_a_real_measurement():
    profile = measure_profile(
        [("dense", 16, (16,)), ("pivoted", 16, (16,), (2, 4))], tokens=4, dtype=torch.float32, repeats=1, min_seconds=0
    )
    assert all(second > 0 for curve in profile.curves.values() for second in curve.seconds)


# -- files -------------------------------------------------------------------------------------------------------


def test_a_file_gives_the_profile_back(tmp_path):
    PROFILE.write(tmp_path / "profile.json")
    assert Profile.read(tmp_path / "profile.json", dtype=torch.float32, device="cpu") == PROFILE
    without = replace(PROFILE, model_seconds=None)
    without.write(tmp_path / "profile.json")
    assert Profile.read(tmp_path / "profile.json") == without


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"dtype": torch.bfloat16}, "dtype float32, this run asks for bfloat16; name another file"),
        ({"device": "cuda:1"}, "device cpu, this run asks for cuda"),
    ],
)
def test_a_profile_for_something_else_is_refused(tmp_path, asked, says):
    PROFILE.write(tmp_path / "profile.json")
    with pytest.raises(UsageError, match=says):
        Profile.read(tmp_path / "profile.json", **asked)


def change(**fields):
    return {**json.loads(json.dumps(PROFILE.to_json())), **fields}


def change_curve(**fields):
    curve = {"form": "lowrank", "in_features": 8, "heights": [8], "ranks": [1, 2], "seconds": [1.0, 2.0]}
    return change(layers=[{**curve, **fields}])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([], "not a profile"),
        ({"written_by": "eckart"}, "not a profile"),
        (change(profile_version=2), "profile_version is 2, this eckart reads 1"),
        (change(tokens="many"), "damaged profile .*tokens is 'many'"),
        (change(layers={}), "damaged profile"),
        ({"profile_version": 1}, "damaged profile .*device"),
        (change_curve(ranks=[], seconds=[]), "ranks"),
        (change_curve(ranks=[2, 1]), "ranks"),
        (change_curve(seconds=[1.0]), "ranks"),
        (change_curve(seconds=[1.0, -1.0]), "seconds"),
        (change_curve(seconds=[1.0, "fast"]), "seconds"),
    ],
)
def test_what_is_not_a_profile_is_refused(tmp_path, content, says):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=says):
        Profile.read(path)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        Profile.read(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("seconds: 3")
    with pytest.raises(UsageError, match="not JSON"):
        Profile.read(tmp_path / "text.json")
