"""The table of faults in the documents: every point has tests, and every test that it names is there."""

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
TABLE = HERE.parent / "docs" / "faults.md"
POINTS = 31


def rows() -> dict[int, list[str]]:
    found = {}
    for line in TABLE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4 and cells[0].isdecimal():
            assert all(cells), f"an empty cell: {line}"
            found[int(cells[0])] = re.findall(r"`([^`]*)`", cells[3])
    return found


def test_every_point_has_tests_and_every_test_is_there():
    table = rows()
    assert sorted(table) == list(range(1, POINTS + 1))
    for point, named in table.items():
        assert named, f"point {point} names no test"
        file = ""
        for name in named:
            given, _, function = name.partition("::")
            file = given or file
            tree = ast.parse((HERE / file).read_text())
            defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert function in defined, f"point {point}: {file} has no {function}"
