"""Sums, messages and errors between processes: three processes, started once, run every scenario together."""

import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils.tqdm import are_progress_bars_disabled

from eckart.distributed import OtherProcessError, Processes, is_main, silence_other_processes, start_processes
from eckart.distributed.group import SMALL
from eckart.distributed.wire import PIECE
from eckart.errors import EckartError, NumericalError, UsageError

SIZE = 3
SCENARIOS: dict[str, Callable[[Processes], None]] = {}


def scenario(function: Callable[[Processes], None]) -> Callable[[Processes], None]:
    SCENARIOS[function.__name__] = function
    return function


# -- scenarios: each runs in all three processes -----------------------------------------------------


@scenario
def second_start_returns_the_same_processes(here):
    assert start_processes("cpu") == here
    assert here.main == is_main() == (here.rank == 0)


@scenario
def own_parts_cover_all_items_once(here):
    counts = {"seen": torch.tensor(here.own_part(range(100, 110))).sum()}
    here.all_reduce(counts)
    assert int(counts["seen"]) == sum(range(100, 110))


def sums(here: Processes) -> dict[str, torch.Tensor]:
    """Under "all" every process has something; "rank.r" is seen by process r alone, in an order of its own."""
    mine = {
        f"rank.{here.rank}": torch.full((2, 3), here.rank + 1.0),
        "all.f32": torch.full((4, 4), 0.5 + here.rank),
        "all.f64": torch.full((5,), 2.0**-52 * (here.rank + 1), dtype=torch.float64) + 1,
        "all.count": torch.tensor(2**53 + 1 + here.rank),  # float64 could not hold it
        "all.empty": torch.zeros(0, 3),
    }
    return dict(reversed(mine.items())) if here.rank % 2 else mine


@scenario
def reduce_sums_different_keys_at_the_owner(here):
    for owner in range(here.size):
        tensors = sums(here)
        given = dict(tensors)
        here.reduce(tensors, owner)
        assert all(tensors[key] is given[key] for key in given)
        if here.rank == owner:
            check_sums(here, tensors)


@scenario
def all_reduce_sums_different_keys_everywhere(here):
    tensors = sums(here)
    here.all_reduce(tensors)
    check_sums(here, tensors)


def check_sums(here: Processes, tensors: dict[str, torch.Tensor]) -> None:
    size, ranks = here.size, sum(range(here.size))
    assert set(tensors) == {"all.f32", "all.f64", "all.count", "all.empty", *(f"rank.{r}" for r in range(size))}
    for rank in range(size):
        assert torch.equal(tensors[f"rank.{rank}"], torch.full((2, 3), rank + 1.0))
    assert torch.equal(tensors["all.f32"], torch.full((4, 4), 0.5 * size + ranks))
    exact = size + 2.0**-52 * (ranks + size)
    assert (tensors["all.f64"] - exact).abs().max() <= 2.0**-51  # float32 would lose the second term
    assert tensors["all.count"].dtype == torch.int64
    assert int(tensors["all.count"]) == size * (2**53 + 1) + ranks


@scenario
def large_tensors_are_summed_in_pieces(here):
    length = PIECE // 4 * 2 + 7
    tensors = {} if here.rank == 1 else {"gram": torch.ones(length)}
    if here.rank == 0:
        tensors["gram"][-1] = 5
    here.reduce(tensors, 1)
    if here.rank == 1:
        others = here.size - 1
        assert tensors["gram"].shape == (length,)
        assert bool((tensors["gram"][:-1] == others).all())
        assert float(tensors["gram"][-1]) == 4 + others


@scenario
def tensors_that_are_not_contiguous_are_summed_in_place(here):
    for width in (6, SMALL):  # summed with others, and on its own
        whole = torch.zeros(4, width)
        whole[:, ::2] = here.rank + 1
        here.all_reduce({"part": whole[:, ::2]})
        assert bool((whole[:, ::2] == sum(range(1, here.size + 1))).all())
        assert not whole[:, 1::2].any()


@scenario
def different_shapes_are_refused_by_all(here):
    with pytest.raises(EckartError, match=r"site\.gram: process 1 holds float32 \(2, 2\) on cpu, another .*\(3, 3\)"):
        here.all_reduce({"site.gram": torch.zeros(2, 2) if here.rank == 1 else torch.zeros(3, 3)})


@scenario
def send_hands_a_nested_value_to_one_process(here):
    value = nested_value() if here.rank == 1 else None
    for to in range(here.size):
        got = here.send(value, 1, to)
        if here.rank == to:
            check_nested_value(got)
        else:
            assert got is None


@scenario
def every_process_can_send_to_the_first(here):
    for rank in range(here.size):
        got = here.send({"from": here.rank, "rank": torch.tensor([here.rank])}, rank)
        if here.main:
            assert got["from"] == int(got["rank"]) == rank


@scenario
def broadcast_hands_a_nested_value_to_all(here):
    source = here.size - 1
    check_nested_value(here.broadcast(nested_value() if here.rank == source else None, source))
    assert here.broadcast("word" if here.main else None) == "word"


def nested_value() -> dict:
    big = torch.arange(PIECE // 4 + 3, dtype=torch.int32)
    tensors = [torch.ones(2, 3, dtype=torch.bfloat16), torch.tensor([True, False]), torch.tensor(7), torch.zeros(0, 4)]
    return {
        "factors": (torch.arange(6.0).view(2, 3).mT, None),
        "many": tensors,
        "big": big,
        "notes": ["ä", 1, 2.5, True, float("inf")],
        "none": {},
    }


def check_nested_value(got: dict) -> None:
    wanted = nested_value()
    assert list(got) == list(wanted)
    assert isinstance(got["factors"], tuple)
    assert torch.equal(got["factors"][0], wanted["factors"][0])
    assert got["factors"][1] is None
    for one, other in zip(got["many"], wanted["many"], strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert torch.equal(got["big"], wanted["big"])
    assert got["notes"] == wanted["notes"]
    assert got["none"] == {}


@scenario
def nothing_is_raised_if_none_failed(here):
    here.raise_if_any_failed(None)
    with here.failing_together():
        pass
    here.barrier()


@scenario
def error_of_one_process_is_raised_in_all(here):
    failed = NumericalError("layer 3: eigh failed. Use --method svd.") if here.rank == 1 else None
    with pytest.raises(EckartError) as caught:
        here.raise_if_any_failed(failed)
    if here.rank == 1:
        assert caught.value is failed
    else:
        assert isinstance(caught.value, OtherProcessError)
        assert str(caught.value) == f"process 1 of {here.size} failed: layer 3: eigh failed. Use --method svd."


@scenario
def work_that_fails_in_one_process_stops_all(here):
    with pytest.raises(ZeroDivisionError if here.main else OtherProcessError, match="by zero"), here.failing_together():
        assert 1 / here.rank


@scenario
def error_stops_processes_at_their_next_exchange(here):
    for go_on in (lambda: here.reduce({"a": torch.zeros(2)}, 0), lambda: here.broadcast(1), here.barrier):
        if here.rank == 1:
            with pytest.raises(MemoryError):
                here.raise_if_any_failed(MemoryError())
        else:
            with pytest.raises(OtherProcessError, match=r"process 1 of \d failed: MemoryError$"):
                go_on()


@scenario
def different_operations_are_refused(here):
    with pytest.raises(EckartError, match="out of step"):
        here.barrier() if here.main else here.all_reduce({})
    with pytest.raises(EckartError, match=r"out of step .*sum at 0; sum at 1"):
        here.reduce({"a": torch.zeros(2)}, min(here.rank, 1))


@scenario
def only_the_main_process_shows_progress(here):
    if here.rank == 1:  # one is enough: it imports transformers
        silence_other_processes(here)
        assert logging.getLogger("eckart").level == logging.ERROR
        assert are_progress_bars_disabled()
        assert os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] == "1"
        assert "datasets" not in sys.modules


@scenario
def process_that_ends_early_is_reported(here):
    """The last one: the connection is lost."""
    if here.rank == 1:
        return
    with pytest.raises(OtherProcessError, match="ended early"):
        here.barrier()


# -- running them ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outcomes(server, tmp_path_factory) -> list[dict[str, str]]:
    """For each process: scenario -> "passed", or where it failed."""
    folder = tmp_path_factory.mktemp("processes")
    started = [
        server.start_code(
            f"import runpy; runpy.run_path({__file__!r}, run_name='__main__')",
            folder,
            bare=True,
            **{"RANK": str(rank), "WORLD_SIZE": str(SIZE), "LOCAL_RANK": str(rank)},
        )
        for rank in range(SIZE)
    ]
    logs = [server.wait(one, bare=True).said for one in started]
    found = []
    for rank in range(SIZE):
        passed = folder / f"{rank}.jsonl"
        lines = passed.read_text().splitlines() if passed.exists() else []
        found.append({"log": logs[rank], **dict(map(json.loads, lines))})
    return found


def run(folder: Path) -> None:
    here = start_processes("cpu", rendezvous=f"file://{folder}/rendezvous")
    with (folder / f"{here.rank}.jsonl").open("w", buffering=1) as stream:
        for name, function in SCENARIOS.items():
            try:
                function(here)
                outcome = "passed"
            except Exception:
                outcome = traceback.format_exc()
            print(json.dumps([name, outcome]), file=stream)


@pytest.mark.parametrize("name", SCENARIOS)
def test_three_processes(name, outcomes):
    for rank, found in enumerate(outcomes):
        assert found.get(name, f"hung\n{found['log']}") == "passed", f"process {rank} of {SIZE}"


# -- one process, and what needs no other ------------------------------------------------------------


@pytest.fixture
def place(monkeypatch):
    def put(**variables: str) -> None:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    put()
    return put


@pytest.mark.parametrize("variables", [{}, {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, {"WORLD_SIZE": ""}])
def test_single_process_communicates_with_none(variables, place):
    place(**variables)
    here = start_processes()
    assert here == Processes()
    assert here.main
    assert is_main()
    assert here.own_part([1, 2, 3]) == [1, 2, 3]
    tensors = {"a": torch.ones(2)}
    here.reduce(tensors, 0)
    here.all_reduce(tensors)
    assert torch.equal(tensors["a"], torch.ones(2))
    value = object()
    assert here.send(value, 0) is here.broadcast(value) is value
    here.barrier()
    here.raise_if_any_failed(None)
    with pytest.raises(KeyError), here.failing_together():
        raise KeyError("x")
    silence_other_processes(here)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    "variables",
    [
        {"WORLD_SIZE": "4"},
        {"WORLD_SIZE": "4", "RANK": "1"},
        {"WORLD_SIZE": "4", "RANK": "4", "LOCAL_RANK": "0"},
        {"WORLD_SIZE": "many", "RANK": "1", "LOCAL_RANK": "1"},
        {"WORLD_SIZE": "0", "RANK": "0", "LOCAL_RANK": "0"},
    ],
)
def test_incomplete_launcher_variables_are_refused(variables, place):
    place(**variables)
    assert is_main()  # so that the refusal is read
    with pytest.raises(UsageError, match=r"WORLD_SIZE=.*torchrun"):
        start_processes()


@pytest.mark.parametrize(
    ("device", "why"),
    [("cuda:1", "a GPU of its own"), ("mps", "cpu or cuda"), ("cuda", "finds no GPU of its own among 2")],
)
def test_device_that_not_every_process_can_have_is_refused(device, why, place, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    place(WORLD_SIZE="3", RANK="2", LOCAL_RANK="2")
    with pytest.raises(UsageError, match=f"--device {device}: .*{why}"):
        start_processes(device)
    assert not torch.distributed.is_initialized()


def test_owners_get_equal_work():
    costs = {"b": 3.0, "a": 3.0, "dear": 6.0, "c": 1.0, "d": 1.0, "e": 4.0}
    owners = [Processes(rank, 3).assign_owners(costs) for rank in range(3)]
    assert owners[0] == owners[1] == owners[2]
    assert list(owners[0]) == list(costs)
    assert owners[0] == Processes(0, 3).assign_owners(dict(reversed(costs.items())))
    loads = [sum(cost for site, cost in costs.items() if owners[0][site] == rank) for rank in range(3)]
    assert sorted(loads) == [6.0, 6.0, 6.0]
    assert Processes().assign_owners(costs) == dict.fromkeys(costs, 0)
    assert Processes(0, 4).assign_owners({}) == {}


@pytest.mark.parametrize("value", [{1: 2}, {"a": [object()]}, {"a": {1, 2}}])
def test_value_that_cannot_be_sent_is_refused(value):
    with pytest.raises(TypeError, match=r"strings|cannot be sent"):
        Processes(0, 2).send(value, 0, 1)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
