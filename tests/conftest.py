"""One thread, no network: both are read when the libraries are first imported, so they are set before."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch

torch.set_num_threads(1)

import pytest

from eckart import registry
from eckart.lookup.registry import Registry

if TYPE_CHECKING:
    from tiny import Server


@pytest.fixture(autouse=True, scope="module")
def _registries_are_left_as_they_were():
    """What the tests of a file register under a name of their own is not known to those of the next file."""
    tables = [table for table in vars(registry).values() if isinstance(table, Registry)]
    before = [dict(table._added) for table in tables]
    yield
    for table, added in zip(tables, before, strict=True):
        table._added = added


@pytest.fixture(autouse=True)
def _nothing_is_read_back_in_a_fresh_process(request, monkeypatch):
    """Seconds of imports for each command that publishes; the tests that are about it ask for it."""
    if "reads_back" not in request.fixturenames:
        monkeypatch.setattr("eckart.checkpoint.read_back.run_fresh", lambda *_: {"problems": [], "compared": 0})


@pytest.fixture(autouse=True)
def _no_baselines_are_measured(request, monkeypatch):
    """Two more measurements for each command that publishes; the tests that are about them ask for them."""
    if "measures_baselines" not in request.fixturenames:
        monkeypatch.setattr("eckart.compression.baselines.BITS", ())


@pytest.fixture
def measures_baselines():
    """The original is rounded to int8 and int4 and measured, as users have it."""


@pytest.fixture
def reads_back():
    """What is published is read back in a fresh process, as users have it."""


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[Server]:
    """Forks for each command; it takes five seconds to start."""
    from tiny import Server

    with Server(tmp_path_factory.mktemp("server")) as server:
        yield server
