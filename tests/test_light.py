"""What `import eckart` and `--help` do without: each is tried in a fresh process."""

import subprocess
import sys

HEAVY = ("torch", "transformers", "datasets", "pandas", "peft", "sklearn", "scipy")


def loaded_after(code: str) -> set[str]:
    """The heavy packages that a fresh process has imported after running some code."""
    code += f"\nimport sys; print('loaded', *(set({HEAVY}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_import_loads_nothing_heavy():
    assert loaded_after("import eckart; eckart.Recipe(keep=0.5, method='drone'); eckart.EckartError") == set()


def test_every_public_name_exists():
    import eckart

    for name in eckart.__all__:
        assert getattr(eckart, name) is not None
    assert set(eckart.__all__) <= set(dir(eckart))


def test_help_of_every_command_comes_without_torch():
    code = """
from typer.main import get_command
from typer.testing import CliRunner
from eckart.cli.app import app
for name in ("", *get_command(app).commands):
    done = CliRunner().invoke(app, [*name.split(), "--help"])
    assert done.exit_code == 0 and "Usage" in done.output, (name, done.output)
"""
    assert loaded_after(code) == set()


def test_list_of_methods_comes_without_torch():
    code = """
from typer.testing import CliRunner
from eckart.cli.app import app
done = CliRunner().invoke(app, ["methods"])
assert done.exit_code == 0 and "svd-llm" in done.output, done.output
"""
    assert loaded_after(code) <= {"transformers"}  # asked to be quiet; its models are not imported
