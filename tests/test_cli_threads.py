"""Threads wait asleep: what the OpenMP runtime that torch brings has read when a command runs."""

import os
import re
import subprocess
import sys

import pytest

from eckart.cli.threads import PASSIVE, wait_passively

COMMAND = """
import sys
from eckart.cli import app
assert "torch" not in sys.modules
app.app = lambda: __import__("torch")
app.run()
"""


@pytest.mark.parametrize(("own", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "active"}, "ACTIVE")])
def test_the_runtime_reads_it_when_a_command_imports_torch(own, policy):
    environment = {name: value for name, value in os.environ.items() if name not in PASSIVE}
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE", **own}
    done = subprocess.run([sys.executable, "-c", COMMAND], env=environment, capture_output=True, text=True, check=True)
    assert re.search(rf"OMP_WAIT_POLICY ?= ?'{policy}'", done.stderr), done.stderr
    if "GOMP_SPINCOUNT" in done.stderr:
        assert ("GOMP_SPINCOUNT = '0'" in done.stderr) == (policy == "PASSIVE")


@pytest.mark.parametrize("name", PASSIVE)
def test_what_the_user_set_stays_as_it_is(name):
    environment = {name: "7", "HOME": "/"}
    wait_passively(environment)
    assert environment == {name: "7", "HOME": "/"}


def test_all_names_are_set_together():
    environment: dict[str, str] = {}
    wait_passively(environment)
    assert environment == {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
