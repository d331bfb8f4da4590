"""README, site and examples: what they say exists, and the examples run. (`make docs-run` runs every block.)"""

from __future__ import annotations

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest
import yaml
from tiny import llama, place

from eckart.registry import EMBEDDINGS, FORMS, METHODS, OTHER_FORMS, RECOVERIES, STATISTICS

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import draw_results
import run_docs
import site_pages


@pytest.fixture(scope="module")
def pages():
    """Path below the repository -> text."""
    return run_docs.read_pages()


# -- code on pages ---------------------------------------------------------------------------------------


def test_every_command_and_python_block_is_one_that_exists(pages):
    problems = [each for name, text in pages.items() for each in run_docs.check_page(run_docs.read_page(name, text))]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("language", "code", "problem"),
    [
        ("bash", "eckart compress MODEL --kep 0.5", "--kep"),
        ("bash", "eckart compress MODEL --method svdd", "svdd"),
        ("bash", "eckart compress MODEL --keep 2", "keep"),
        ("bash", "eckart tune small --recovery magic", "magic"),
        ("bash", "eckart compare MODEL --methods svd,magic --keep 0.5", "magic"),
        ("bash", "OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 -m eckart squeeze MODEL", "squeeze"),
        ("bash", "make demonstration", "demonstration"),
        ("bash", "pip install 'eckart[magic]'", "magic"),
        ("bash", "python benchmarks/survey.py --wrok FOLDER", "--wrok"),
        ("bash", "python benchmarks/survy.py", "survy"),
        ("bash", "cd folder && sudo eckart demo", "sudo"),
        ("python", "import eckart\neckart.compres(1)", "compres"),
        ("python", "import eckart\neckart.compress(1, kep=2)", "kep"),
        ("python", "from eckart.recovery.lora import Lora", "Lora"),
        ("python", "if True", "block"),
    ],
)
def test_block_that_is_wrong_is_found(language, code, problem):
    (found,) = run_docs.check_page(run_docs.read_page("page.md", f"```{language}\n{code}\n```\n"))
    assert problem in found
    assert found.startswith("page.md, line 2: ")


def test_page_says_what_lies_where_and_what_is_not_run():
    first = "<!-- here: a/b = causal, c.txt = lines -->\n```bash\nls\n```\n"
    page = run_docs.read_page("page.md", first + "<!-- not run: two GPUs -->\n```python\nx = 1\n```\n")
    assert page.stand_ins == {"a/b": "causal", "c.txt": "lines"}
    assert [(block.language, block.line, block.not_run) for block in page.blocks] == [
        ("bash", 3, ""),
        ("python", 7, "two GPUs"),
    ]
    unknown = run_docs.read_page("page.md", "<!-- here: a = elephant -->")
    assert run_docs.check_page(unknown) == ["page.md: no stand-in 'elephant'"]


def test_page_runs_where_its_stand_ins_lie(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    first = "<!-- here: x.txt = lines -->\n```bash\nhead -n 1 x.txt\n```\n"
    run_docs.run_page(run_docs.read_page("page.md", first + "```python\nn = 2\n```\n```python\nprint(n + 1)\n```\n"))
    assert {"The models of 2 tokens are long.", "3"} <= set(capfd.readouterr().out.splitlines())
    with pytest.raises(SystemExit, match=r"page\.md, line 2"):
        run_docs.run_page(run_docs.read_page("page.md", "```bash\nfalse\n```\n"))


# -- pages -----------------------------------------------------------------------------------------------


def test_every_method_form_statistic_and_recovery_has_its_page(pages):
    for folder, registry, suffix in (
        ("methods", METHODS, ""),
        ("forms", FORMS, ""),
        ("forms", EMBEDDINGS, "-embedding"),
        ("forms", OTHER_FORMS, ""),
        ("statistics", STATISTICS, ""),
        ("recoveries", RECOVERIES, ""),
    ):
        for name in registry:
            page = pages[f"docs/{folder}/{name}{suffix}.md"]
            assert f"({folder}/{name}{suffix}.md)" in pages["docs/methods/index.md"].replace("../", "")
            if registry is not STATISTICS:
                assert registry[name].use, f"{name}: say in `use` when to take it"
                assert registry[name].use in page
            if getattr(registry[name], "paper", ""):
                assert registry[name].paper[1:] in page


def test_table_of_the_survey_has_every_method_and_recovery(pages):
    survey = pages["docs/survey.md"]
    listed = {f"methods/{name}.md" for name in METHODS} | {f"recoveries/{name}.md" for name in RECOVERIES}
    presets = {"methods/fwsvd-columns.md", "recoveries/full.md", "recoveries/ilkd.md", "recoveries/losparse-distil.md"}
    assert {path for path in listed if f"({path})" not in survey} == presets
    assert all(path.split("/")[1].removesuffix(".md") in survey for path in presets - {"recoveries/full.md"})


def test_page_of_a_method_has_equation_cost_and_command(pages):
    page = pages["docs/methods/kfac.md"]
    assert "```text\n|| H^(1/2) (W - W') G^(1/2) ||_F^2\n```" in page
    assert "forward and backward passes" in page
    assert "67 MB" in page  # a Gram matrix of 4,096 numbers a side in float32
    assert "eckart compress MODEL --method kfac --keep 0.7 --data texts.txt" in page
    assert "Data: none." in pages["docs/methods/svd.md"]
    assert "--keep" not in pages["docs/methods/kngpt2.md"]


def test_page_of_a_recovery_has_its_settings_with_defaults_and_meanings(pages):
    assert "| `rank` | `8` | r. |" in pages["docs/recoveries/lora.md"]
    assert "of the sentence embeddings" in pages["docs/recoveries/sandwich.md"]  # from its parent


def test_page_of_the_command_line_has_every_option(pages):
    page = pages["docs/reference/command-line.md"]
    assert "| `--stream` |" in page
    assert "`--verify`, `--no-verify`" in page
    assert "--share" not in page  # hidden


def test_every_link_leads_to_a_page_or_a_file(pages):
    broken = []
    for name, text in pages.items():
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)):
            path = (ROOT / name).parent / target
            if not path.exists() and str(path.resolve().relative_to(ROOT)) not in pages:
                broken.append(f"{name}: {target}")
    assert not broken, broken


def test_every_page_is_in_the_navigation(pages):
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    config = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)
    site_pages.on_config(type("Config", (), {"nav": config["nav"]}))
    listed = set(re.findall(r"'([^']+\.md)'", str(config["nav"])))
    assert listed == {name.removeprefix("docs/") for name in pages if name.startswith("docs/")}


def test_messages_of_the_troubleshooting_page_are_those_of_the_code(pages):
    said = "\n".join(" ".join(text.replace("`", "").split()) for text in messages())
    for quoted in re.findall(r"\*\*`(.*?)`(?:\*\*|,)", pages["docs/troubleshooting.md"]):
        for part in quoted.split("..."):
            assert part.strip(" .:") in said, quoted


def messages():
    """Every string in the source, with braces where values go."""
    for file in (ROOT / "src" / "eckart").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_site_builds_without_a_warning(tmp_path, monkeypatch, caplog):
    pytest.importorskip("mkdocstrings", reason="the site is built where mkdocs is: pip install 'eckart[docs]'")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path))
    config.plugins.run_event("startup", command="build", dirty=False)
    build(config)  # strict: it fails after any warning
    assert not [each.getMessage() for each in caplog.records if each.name.startswith("mkdocs") and each.levelno > 20]
    assert "Fisher" in (tmp_path / "methods" / "fwsvd" / "index.html").read_text()
    assert "report_progress" in (tmp_path / "reference" / "python" / "index.html").read_text()


# -- README and what stands beside it ------------------------------------------------------------------------


def test_readme_is_one_screen_and_its_numbers_are_those_of_the_tables():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 120
    survey = (ROOT / "docs/results/survey.md").read_text()
    causal = (ROOT / "docs/results/causal_quality.md").read_text()
    speed = (ROOT / "docs/results/speedup.md").read_text()
    row = re.search(r"\| SST-2, accuracy \|(.*)\|", survey)
    svd, *_, own, dense = (cell.strip() for cell in row.group(1).split("|"))
    assert f"**{own}** accuracy" in text
    assert f"has {dense},\n  and plain SVD {svd} " in text
    variants = causal.partition("What the forms of the default")[2]
    own = re.search(r"^\| \*\*eckart\*\*[^|]*\|[^|]*\| ([\d.]+) \|", variants, re.M).group(1)
    other = re.search(r"^\| svd-llm \|[^|]*\| ([\d.]+) \|", variants, re.M).group(1)
    assert f"**{own}** perplexity" in text
    assert f"SVD-LLM\n  {other} " in text
    fast = re.search(r"^\| sst2-fast \|[^|]*\|[^|]*\| ([\d.]+) \|", speed, re.M).group(1)
    assert f"**{fast}** times as fast" in text


def test_table_of_the_readme_has_every_family_with_a_command_that_exists():
    rows = dict(re.findall(r"^\| ([^|`]+) \|[^|]+\| (`eckart .*) \|$", (ROOT / "README.md").read_text(), re.M))
    families = ("truncated SVD", "Noach & Goldberg", "DRONE", "FWSVD", "KnGPT2", "LoSparse", "DSEE", "SAFE",
                "Basis Sharing", "Sandwich", "pruning", "quantisation", "distillation", "early exit",
                "token skipping")  # fmt: skip
    assert [each for each in families if not any(each in row for row in rows)] == []
    for cell in rows.values():
        for command in re.findall(r"`([^`]+)`", cell):
            assert list(run_docs.check_bash(command)) == []


def test_picture_is_that_of_the_tables():
    text = draw_results.TABLES.read_text()
    drawing = "\n".join(draw_results.draw(*draw_results.read_points(text))) + "\n"
    assert draw_results.DRAWING.read_text() == drawing
    dense, points = draw_results.read_points(text)
    assert set(draw_results.LINES) <= set(points)
    assert all(value > dense - 1 for row in draw_results.LINES for _, value in points[row])
    worse = text.replace("| svd | 0.4 | 0.3992 | 192.4 |", "| svd | 0.4 | 0.3992 | 191.4 |")
    assert "\n".join(draw_results.draw(*draw_results.read_points(worse))) + "\n" != drawing


def test_citation_names_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M).group(1)
    assert (cited["cff-version"], cited["version"], cited["license"]) == ("1.2.0", version, "Apache-2.0")
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


# -- examples ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """In place of the bundled model, which `make docs-run` takes."""
    return place(llama(num_hidden_layers=2), tmp_path_factory.mktemp("model") / "llama")


@pytest.mark.parametrize(
    ("name", "words", "shown"),
    [
        ("compress_and_load", ["--keep", "0.5"], ("by eckart: keep 0.5", "class Reader")),
        (
            "choose_a_size",
            ["--methods", "svd,drone", "--keep", "0.8,0.4", "--allow", "50"],
            ("Take ", " at keep 0.4: "),
        ),
        ("choose_a_size", ["--methods", "svd", "--keep", "0.4", "--allow", "0"], ("None of them is within 0",)),
        ("own_metric", [], ("--- input-scale", "--- drone")),
    ],
)
def test_example_runs_offline(name, words, shown, small_model, capsys):
    main = runpy.run_path(str(ROOT / "examples" / f"{name}.py"))["main"]
    main([*words, "--model", str(small_model), "--windows", "4", "--length", "32"])
    found = capsys.readouterr().out
    assert all(part in found for part in shown), found
