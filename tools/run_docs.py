"""Every command and every Python block of README.md and of the site: check them, and run them.

    python tools/run_docs.py                    # run all pages, offline; `make docs-run`
    python tools/run_docs.py docs/start.md ...  # run these
    python tools/run_docs.py --quick            # the same, but published folders are not read back in fresh processes
    python tools/run_docs.py --check            # parse all; a test of `make test` does the same

A page runs from top to bottom in a folder of its own, with the names that its comment `<!-- here: NAME = KIND, ... -->`
puts there (tools/stand_ins.py). A block below `<!-- not run: WHY -->` is checked alone: commands against the real
parser, scripts and their flags, targets of make, extras of pip; Python is compiled, and its names are looked up.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import importlib.util
import inspect
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

HERE = re.compile(r"^<!-- here: (.*?) -->$", re.M)
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<why>[^>]*?) -->\s*)?^```(?P<language>bash|python)\n(?P<code>.*?)^```$", re.M | re.S
)
OTHERS = ("cd", "cp", "curl", "git", "head", "ls", "vllm")
"""Commands of others: they are not looked into."""


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        language: "bash" or "python".
        code: its text.
        line: of its first line of code.
        not_run: why it is checked alone, or "".
    """

    language: str
    code: str
    line: int
    not_run: str = ""


@dataclass
class Page:
    """A page and what its code needs.

    Attributes:
        name: path below the repository.
        stand_ins: name -> kind.
        blocks: of code, in order.
    """

    name: str
    stand_ins: dict[str, str] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=list)


def read_page(name: str, text: str) -> Page:
    """The blocks of a page."""
    page = Page(name)
    for listed in HERE.findall(text):
        page.stand_ins |= {
            known.strip(): kind.strip() for known, _, kind in (e.partition("=") for e in listed.split(","))
        }
    for found in BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("code")) + 1
        page.blocks.append(Block(found["language"], found["code"], line, found["why"] or ""))
    return page


def read_pages() -> dict[str, str]:
    """Path below the repository -> text: README.md, all of docs/, and the pages that are made."""
    from site_pages import make_pages

    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in files} | {
        f"docs/{path}": text for path, text in make_pages().items()
    }


# -- checks --------------------------------------------------------------------------------------------


def check_page(page: Page) -> list[str]:
    """What is wrong with the code of a page, without running it."""
    from stand_ins import STAND_INS

    problems = [f"{page.name}: no stand-in {kind!r}" for kind in page.stand_ins.values() if kind not in STAND_INS]
    for block in page.blocks:
        check = check_bash if block.language == "bash" else check_python
        problems += [f"{page.name}, line {block.line}: {problem}" for problem in check(block.code)]
    return problems


def check_bash(code: str) -> Iterator[str]:
    """What is wrong with commands."""
    for words in split_commands(code):
        problem = check_command(words)
        if problem:
            yield f"{problem}: {shlex.join(words)}"


def split_commands(code: str) -> Iterator[list[str]]:
    """The words of each command, without comments, variables that are set before it, and redirections."""
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word in (";", "&&", "|", "||", "&"):
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words.pop(0)
                if words:
                    yield words
                words = []
            else:
                words.append(word)


def check_command(words: Sequence[str]) -> str | None:
    """What is wrong with one command; None for nothing."""
    name, rest = words[0].rpartition("/")[2], list(words[1:])
    if name == "torchrun":
        rest = rest[next((i for i, word in enumerate(rest) if word == "-m"), len(rest)) :]
        name = "python"
    if name in ("python", "python3"):
        if rest[:2] == ["-m", "eckart"]:
            name, rest = "eckart", rest[2:]
        elif rest[:2] == ["-m", "venv"]:
            return None
        else:
            return check_script(rest)
    if name == "eckart":
        return check_eckart(rest)
    if name == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        unknown = [word for word in rest if "=" not in word and word not in targets]
        return f"make has no target {unknown[0]}" if unknown else None
    if name == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        asked = {one for word in rest for listed in re.findall(r"^eckart\[(.*)\]", word) for one in listed.split(",")}
        return f"eckart has no extra {sorted(asked - set(extras))[0]}" if asked - set(extras) else None
    return None if name in OTHERS else f"nobody knows the command {name}"


def check_script(words: Sequence[str]) -> str | None:
    """What is wrong with the call of a script of this repository."""
    script = ROOT / words[0] if words else ROOT
    if not script.is_file():
        return f"there is no script {words[0] if words else ''}"
    text = script.read_text(encoding="utf-8") + (ROOT / "benchmarks" / "common.py").read_text(encoding="utf-8")
    missing = [word for word in words if word.startswith("--") and f'"{word.partition("=")[0]}"' not in text]
    return f"{words[0]} has no option {missing[0]}" if missing else None


def check_eckart(words: Sequence[str]) -> str | None:
    """What the parser of a command says of its options, and the recipe of their values."""
    import click

    from eckart.errors import UsageError

    group = _command_line()
    words = [word for word in words if word not in ("--verbose", "-v")]
    if not words or words == ["--help"] or words == ["--version"]:
        return None
    command = group.commands.get(words[0])  # type: ignore[attr-defined]
    if command is None:
        return f"eckart has no command {words[0]}"
    if words[0] == "lm-eval" or "--help" in words:
        return None
    try:
        settings = {"token_normalize_func": group.context_settings["token_normalize_func"]}
        given = command.make_context(words[0], list(words[1:]), **settings).params
    except (click.exceptions.ClickException, click.exceptions.Exit) as error:
        return error.format_message() if isinstance(error, click.exceptions.ClickException) else str(error)
    except Exception as error:  # typer brings its own copy of click's exceptions
        return str(getattr(error, "message", error))
    try:
        check_values(words[0], given)
    except UsageError as error:
        return str(error)
    return None


@functools.cache
def _command_line() -> Any:
    """All commands, as the parser has them."""
    from typer.main import get_command

    from eckart.cli.app import app

    return get_command(app)


def check_values(command: str, given: dict[str, Any]) -> None:
    """Let the recipe of a command check the values of its options.

    Raises:
        UsageError: naming the option at fault.
    """
    from eckart.compression.recipe import Recipe
    from eckart.config import check_recipe
    from eckart.evaluation.recipe import EvaluationRecipe
    from eckart.recovery.recipe import TuneRecipe
    from eckart.registry import METHODS

    kind: Any = {"compress": Recipe, "compare": Recipe, "eval": EvaluationRecipe, "tune": TuneRecipe}.get(command)
    if kind is None:
        return
    values = {name: value for name, value in given.items() if name in kind.model_fields and value not in (None, [], ())}
    values.pop("device", None)  # whether there is such a one is asked of this machine
    if command == "compare":
        values.pop("keep", None)
        for name in (given.get("methods") or "").split(","):
            METHODS.check(name.strip())
    check_recipe(kind, values, "command line")


def check_python(code: str) -> Iterator[str]:
    """What is wrong with Python: syntax, imports, names of eckart, keyword arguments of its functions."""
    try:
        tree = ast.parse(code)
    except SyntaxError as error:
        yield f"{error.msg}, line {error.lineno} of the block"
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"there is no module {a.name}" for a in node.names if not _has_module(a.name))
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            if not _has_module(node.module):
                yield f"there is no module {node.module}"
            elif node.module.partition(".")[0] in ("eckart", "transformers"):  # others are slow to import
                known = dir(importlib.import_module(node.module))
                yield from (f"{node.module} has no {a.name}" for a in node.names if a.name not in known)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "eckart":
            import eckart

            if not hasattr(eckart, node.attr):
                yield f"eckart has no {node.attr}"
        elif isinstance(node, ast.Call):
            yield from _check_call(node)


def _has_module(name: str) -> bool:
    return importlib.util.find_spec(name.partition(".")[0]) is not None


def _check_call(node: ast.Call) -> Iterator[str]:
    """Keyword arguments that a function of eckart does not take."""
    import eckart

    called = node.func
    if not (isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id == "eckart"):
        return
    function = getattr(eckart, called.attr, None)
    recipes = {"compress": "Recipe", "compare": "Recipe", "evaluate": "EvaluationRecipe", "tune": "TuneRecipe",
               "bench": "BenchRecipe", "inspect": "InspectionRecipe", "Recipe": "Recipe"}  # fmt: skip
    if called.attr not in recipes or function is None:
        return
    taken = set(inspect.signature(function).parameters) | set(getattr(eckart, recipes[called.attr]).model_fields)
    for keyword in node.keywords:
        if keyword.arg is not None and keyword.arg not in taken:
            yield f"eckart.{called.attr} takes no {keyword.arg}"


# -- running -------------------------------------------------------------------------------------------


def run_page(page: Page, quick: bool = False) -> None:
    """Run the blocks of a page in the working directory, the Python ones in one namespace.

    Raises:
        SystemExit: naming the block that failed.
    """
    from stand_ins import place

    for name, kind in page.stand_ins.items():
        place(name, kind)
    names: dict[str, Any] = {"__name__": "page"}
    for block in page.blocks:
        if block.not_run:
            continue
        print(f"--- {page.name}, line {block.line}", flush=True)
        start = time.perf_counter()
        if block.language == "python":
            exec(compile(block.code, f"{page.name}, line {block.line}", "exec"), names)
        elif run_bash(block.code, quick):
            sys.exit(f"{page.name}, line {block.line}: the block failed:\n{block.code}")
        print(f"--- {time.perf_counter() - start:.0f} s", flush=True)


def run_bash(code: str, quick: bool = False) -> int:
    """Run commands up to the first that fails, and return its exit code.

    Commands of eckart alone run in forks of this process, which has imported everything already.
    """
    commands = list(split_commands(code))
    if hasattr(os, "fork") and not re.search(r"[|&;<>$]", code) and all(words[0] == "eckart" for words in commands):
        return next((failed for failed in (_run_eckart(words, quick) for words in commands) if failed), 0)
    return subprocess.run(["bash", "-euo", "pipefail", "-c", code], env=_environment()).returncode


def _run_eckart(words: Sequence[str], quick: bool) -> int:
    from eckart.cli.app import app

    print("$", shlex.join(words), flush=True)
    more = ["--no-verify"] if quick and words[1] in ("compress", "tune") else []
    return _forked(lambda: app([*words[1:], *more]))


def _forked(run: Callable[[], Any]) -> int:
    """Run something in a fork of this process; its exit code."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        run()
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _environment() -> dict[str, str]:
    """Of commands: `eckart`, `python` and `torchrun` are those of this process, and scripts are found."""
    shims = Path(tempfile.gettempdir()) / f"eckart-docs-{os.getpid()}"
    shims.mkdir(exist_ok=True)
    for name, words in {"eckart": "-m eckart", "python": "", "torchrun": "-m torch.distributed.run"}.items():
        shim = shims / name
        shim.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {words} "$@"\n')
        shim.chmod(0o755)
    return {**os.environ, "PATH": f"{shims}{os.pathsep}{os.environ['PATH']}"}


def run_all(pages: Sequence[Page], quick: bool) -> int:
    """Run pages, each in a fork and a folder of its own; the number of those that failed."""
    import torch  # noqa: F401  imported once, for all forks
    import transformers  # noqa: F401

    import eckart.cli.app  # noqa: F401

    failed = 0
    for page in pages:
        with tempfile.TemporaryDirectory(prefix="eckart-docs-") as folder:
            for name in ("examples", "benchmarks"):
                (Path(folder) / name).symlink_to(ROOT / name)

            def run(page: Page = page, folder: str = folder) -> None:
                os.chdir(folder)
                run_page(page, quick)

            code = _forked(run)
        failed += code != 0
        print(f"{'FAILED' if code else 'ok'}: {page.name}", flush=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", help="paths of pages; all by default")
    parser.add_argument("--check", action="store_true", help="check the code, and run nothing")
    parser.add_argument("--quick", action="store_true", help="do not read published folders back in fresh processes")
    given = parser.parse_args()

    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    pages = {name: read_page(name, text) for name, text in read_pages().items()}
    unknown = [name for name in given.pages if name not in pages]
    if unknown:
        sys.exit(f"There is no page {unknown[0]}. Pages: {', '.join(pages)}")
    chosen = given.pages or [name for name, page in pages.items() if any(not block.not_run for block in page.blocks)]
    problems = [problem for name in given.pages or pages for problem in check_page(pages[name])]
    print(*problems, sep="\n")
    failed = 0 if given.check or problems else run_all([pages[name] for name in chosen], given.quick)
    for page in pages.values():
        for block in page.blocks:
            if block.not_run:
                print(f"checked, not run: {page.name}, line {block.line}: {block.not_run}")
    sys.exit(bool(problems or failed))


if __name__ == "__main__":
    main()
