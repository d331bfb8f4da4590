"""Pages of the site that are made of the registry, the command line and examples; mkdocs.yml names this file as a hook.

A method, form, statistic or recovery has a page because the registry holds it: its equation, paper, settings and advice
are those of its own source. `make_pages` gives all of them as text, without mkdocs.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from eckart.registry import EMBEDDINGS, EXPORTS, FORMS, METHODS, OTHER_FORMS, RECOVERIES, STATISTICS

ROOT = Path(__file__).parents[1]
EXAMPLE = 4096
"""Rows and columns of the weight that statistics are counted for."""

STAND_INS = "<!-- here: MODEL = causal, texts.txt = lines -->"
"""What tools/run_docs.py puts in place of the names on these pages."""

GOOGLE = re.compile(r"^(Args|Arguments|Attributes|Class attributes|Returns|Raises|Yields):$", re.MULTILINE)
ROLE = re.compile(r":\w+:`~?([^`]+)`")


def make_pages() -> dict[str, str]:
    """Path below docs/ -> text, of every page that is made."""
    pages = {"methods/index.md": list_all()}
    pages |= {f"methods/{name}.md": method_page(name) for name in METHODS}
    pages |= {f"forms/{name}.md": form_page(name) for name in FORMS}
    pages |= {f"forms/{name}-embedding.md": form_page(name, EMBEDDINGS) for name in EMBEDDINGS}
    pages |= {f"forms/{name}.md": form_page(name, OTHER_FORMS) for name in OTHER_FORMS}
    pages |= {f"statistics/{name}.md": statistic_page(name) for name in STATISTICS}
    pages |= {f"recoveries/{name}.md": recovery_page(name) for name in RECOVERIES}
    pages["guides/chat-vllm.md"] = (ROOT / "examples" / "chat_vllm.md").read_text(encoding="utf-8")
    pages["reference/command-line.md"] = command_line_page()
    return pages


# -- pages ---------------------------------------------------------------------------------------------


def method_page(name: str) -> str:
    """A method: its problem, what its factors are exact for, what it costs, when to take it."""
    method = METHODS[name]
    shown, rest = split_doc(method.metric)
    needs = sorted(method.needs)
    passes = "forward and backward passes" if method.needs_gradients else "forward passes alone"
    ranks = {
        "loss": "by the predicted loss, from one budget for the whole model",
        "uniform": "the same fraction of every weight",
        "paper": "the sizes of the paper",
    }[method.allocation]
    form = f"[`{method.form}`](../forms/{method.form}.md)"
    if method.smallest_form:
        form += f", or [`{method.smallest_form}`](../forms/{method.smallest_form}.md) with `--optimise size`"
    if method.slices:
        form += "; feed-forward layers may lose neurons ([`sliced`](../forms/sliced.md))"
    refit = "each weight again, on the inputs that the compressed model gives it"
    cost = [
        f"Data: {f'calibration text, {passes}' if method.needs_data else 'none'}.",
        *(
            f"[`{name}`](../statistics/{name}.md): {memory_of(name)} for each weight of 4,096 x 4,096."
            for name in needs
        ),
        f"Form: {form}.",
        f"Sizes: {ranks}.",
        f"Refit: {refit if method.refit else 'none; `--refit` asks for one where the form has it'}.",
        *(["Then blocks are trained one after another (`--refine`)."] if method.refined else []),
        *(["Curves of predicted loss are scaled by what is measured."] if method.calibrated_curves else []),
        *(["Means of the inputs are folded into the bias, where there is one."] if method.centered else []),
    ]
    keep = "" if method.allocation == "paper" else " --keep 0.7"
    data = " --data texts.txt" if method.needs_data else ""
    return join(
        STAND_INS,
        f"# {name}",
        f"*{method.title}*" if method.title.lower() != name else "",
        section("When to take it", method.use),
        section("What it minimizes", equation(shown), rest),
        section("Exact for", sentence(method.exact_for)),
        section(
            "What it costs", bullets(cost), "Measured times: [what compressing costs](../results/compression_speed.md)."
        ),
        section(
            "How to call it", code(f"eckart compress MODEL --method {name}{keep}{data} --output-dir small", "bash")
        ),
        section("Paper", sentence(method.paper)),
    )


def form_page(name: str, registry: Mapping[str, Any] = FORMS) -> str:
    """A form: what is stored and computed, and how it is asked for."""
    form = registry[name]
    shown, rest = split_doc(form)
    size, _ = split_doc(form.size) if registry is not OTHER_FORMS and form.size.__doc__ else ("", "")
    facts = [f"Stored: {sentence(size)}" if size else ""]
    if registry is FORMS:
        facts += [
            "Under the metric of a method: "
            + (
                "solved exactly."
                if form.weighted_exactly
                else "solved approximately; exactly where nothing is weighted."
            ),
            "Refit: " + ("yes, in closed form." if form.refits else "none."),
            f"Shared by: {form.shared_by}." if form.shared_parameter or name == "sliced" else "",
            f"Rounded to few bits it becomes [`{form.rounded_as}`]({form.rounded_as}.md) first."
            if form.rounded_as
            else "",
        ]
    elif registry is EMBEDDINGS:
        facts += [f"Needs: {form.needs}.", f"Exact for: {sentence(form.exact_for)}"]
    of_method = {"kronecker": "kronecker", "shared-basis": "basis-sharing"}.get(name)
    options = f"--method {of_method}" if of_method else f"--method drone --form {name}"
    if registry is EMBEDDINGS:
        options = f"--embeddings {name} --embeddings-keep 0.5"
    asked = f"eckart compress MODEL {options} --data texts.txt --output-dir small"
    return join(
        STAND_INS,
        f"# {name}" + (" (embeddings)" if registry is EMBEDDINGS else ""),
        section("When to take it", form.use),
        section("What is stored and computed", equation(shown), rest),
        section("What it costs, and what it is exact for", bullets(filter(None, facts))),
        section("How to call it", code(asked, "bash")) if registry is not OTHER_FORMS else "",
        section("Paper", sentence(form.paper)) if form.paper else "",
    )


def statistic_page(name: str) -> str:
    """A statistic: what is summed, what it takes, and which methods read it."""
    statistic = STATISTICS[name]
    shown, rest = split_doc(statistic)
    readers = [method for method in METHODS if name in METHODS[method].needs]
    return join(
        f"# {name}",
        section("What is summed", equation(shown), rest),
        section(
            "What it costs",
            bullets(
                [
                    f"Memory: {memory_of(name)} for a weight of 4,096 x 4,096.",
                    "Passes: " + ("forward and backward." if statistic.needs_backward else "forward alone."),
                    "It is a sum, so that batches, processes and interrupted runs can be added up.",
                ]
            ),
        ),
        section(
            "Who reads it",
            bullets(f"[`{method}`](../methods/{method}.md)" for method in readers)
            or "Every method: it counts the tokens, and a refitted bias needs the means.",
        ),
    )


def recovery_page(name: str) -> str:
    """A recovery: what it trains or solves, its settings with their defaults, when to take it."""
    recovery = RECOVERIES[name]
    shown, rest = split_doc(recovery)
    teacher = "Labels or text of the task; no teacher."
    if recovery.needs_teacher:
        teacher = f"A teacher (`--teacher`){'; by default the model as it is' if recovery.own_teacher else ''}."
    needs = [
        "The model may be dense or factored."
        if not recovery.needs_dense_model
        else "A dense model: it makes the smaller one itself.",
        teacher,
    ]
    if recovery.students != "any":
        answers = ", with one answer a text" if recovery.students == "classifier" else ""
        needs.insert(0, f"An encoder: every token sees all others{answers}.")
    trains = "learning_rate" not in recovery.unused_options
    if trains:
        needs.append(
            f"Training: `--epochs` or `--max-steps`; learning rate {recovery.learning_rate:g} unless you give one."
        )
    else:
        needs.append(f"No options of the training loop, such as `--learning-rate`: it {recovery.why_unused}.")
    meanings = attributes_of(recovery)
    rows = [
        f"| `{field.name}` | `{field.default!r}` | {meanings.get(field.name, '')} |"
        for field in dataclasses.fields(recovery)
        if field.init and not field.name.startswith("_")
    ]
    table = "\n".join(["| setting | default | meaning |", "|:--|:--|:--|", *rows]) if rows else ""
    own = recovery.students != "any"
    model = recovery.students.upper() if own else "MODEL" if recovery.needs_dense_model else "small"
    teacher = " --teacher MODEL" if recovery.needs_teacher and not own else ""
    command = f"eckart tune {model} --recovery {name}{teacher} --data texts.txt --output-dir tuned"
    kind = "sentence encoder" if recovery.students == "encoder" else recovery.students
    placed = f"{model} = {kind}" if own else "small = factored"
    return join(
        STAND_INS.replace(" -->", f", {placed} -->"),
        f"# {name}",
        sentence(recovery.title),
        section("When to take it", recovery.use),
        section("What it does", equation(shown), rest, module_doc(name)),
        section("What it needs", bullets(needs)),
        section("Settings", "`--recovery-option NAME=VALUE`, or a field of the class in Python.", table)
        if table
        else "",
        section("How to call it", code(command, "bash")),
        section("Paper", sentence(recovery.paper)) if recovery.paper else "",
    )


def list_all() -> str:
    """One table a registry, with a link to every page."""

    def table(title: str, registry: Iterable[str], folder: str, words: Any, suffix: str = "") -> str:
        rows = [f"| [`{name}`](../{folder}/{name}{suffix}.md) | {words(name)} |" for name in registry]
        return join(f"## {title}", "\n".join(["| name | |", "|:--|:--|", *rows]))

    return join(
        "# All methods, forms, statistics and recoveries",
        "What can be chosen by name. `eckart methods` shows the same list in a terminal.",
        table(
            "Methods (`--method`)",
            METHODS,
            "methods",
            lambda name: f"{METHODS[name].title}; exact for {METHODS[name].exact_for}",
        ),
        table("Forms of a weight (`--form`)", FORMS, "forms", lambda name: first_line(FORMS[name])),
        table(
            "Forms of token embeddings (`--embeddings`)",
            EMBEDDINGS,
            "forms",
            lambda name: first_line(EMBEDDINGS[name]),
            "-embedding",
        ),
        table("Forms that recoveries leave behind", OTHER_FORMS, "forms", lambda name: first_line(OTHER_FORMS[name])),
        table("Statistics", STATISTICS, "statistics", lambda name: first_line(STATISTICS[name])),
        table("Recoveries (`eckart tune --recovery`)", RECOVERIES, "recoveries", lambda name: RECOVERIES[name].title),
    )


def command_line_page() -> str:
    """Every command with its options, as the parser has them."""
    from typer.main import get_command

    from eckart.cli.app import app

    parts = ["# Command line", "Every option of every command; `eckart COMMAND --help` shows the same."]
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        parts += [f"## eckart {name}", as_markdown(inspect.cleandoc(command.help or "").split("\f")[0])]
        rows = [option_row(parameter) for parameter in command.params if not getattr(parameter, "hidden", False)]
        if rows:
            parts.append("\n".join(["| option | meaning |", "|:--|:--|", *rows]))
    formats = ", ".join(f"`{name}`" for name in EXPORTS)
    return join(*parts, f"Formats of `eckart export`: {formats}; see [Other engines](../exports.md).")


def option_row(parameter: Any) -> str:
    """One option of a command."""
    names = [*parameter.opts, *parameter.secondary_opts]
    shown = ", ".join(f"`{name if name.startswith('-') else name.upper()}`" for name in names)
    return f"| {shown} | {cell(getattr(parameter, 'help', None) or '')} |"


# -- text ----------------------------------------------------------------------------------------------


def split_doc(thing: Any) -> tuple[str, str]:
    """First line of a docstring, and its prose up to the first list of arguments."""
    text = as_markdown(GOOGLE.split(inspect.cleandoc(thing.__doc__ or ""))[0].strip())
    first, _, rest = text.partition("\n\n")
    return first.replace("\n", " "), rest.strip()


def module_doc(recovery: str) -> str:
    """What the file of a recovery says below its title, on the page of the first recovery of that file."""
    modules = {name: inspect.getmodule(RECOVERIES[name]) for name in RECOVERIES}
    if next(name for name in modules if modules[name] is modules[recovery]) != recovery:
        return ""
    _, _, rest = inspect.cleandoc(modules[recovery].__doc__ or "").partition("\n\n")
    return as_markdown(rest.strip())


def first_line(thing: Any) -> str:
    """First line of a docstring, in a cell of a table."""
    return cell(split_doc(thing)[0])


def attributes_of(kind: type) -> dict[str, str]:
    """What docstrings say of the fields of a class and of its parents."""
    found: dict[str, str] = {}
    for parent in reversed(kind.__mro__):
        _, _, listed = inspect.cleandoc(vars(parent).get("__doc__") or "").partition("\nAttributes:\n")
        listed = textwrap.dedent(GOOGLE.split(listed)[0])
        for entry in re.split(r"\n(?=\S)", listed.strip()):
            name, _, meaning = entry.partition(":")
            found[name.strip()] = cell(as_markdown(" ".join(meaning.split())))
    return found


def memory_of(statistic: str) -> str:
    """What the sums of a weight of EXAMPLE x EXAMPLE take."""
    size = STATISTICS[statistic].nbytes(EXAMPLE, EXAMPLE)
    return f"{size / 1e6:,.0f} MB" if size >= 1e6 else f"{size / 1e3:,.0f} kB"


def equation(text: str) -> str:
    """A first line that opens with formulas shows them in a block of their own."""
    found = re.match(r"(`[^`]+`(?:, `[^`]+`)*)(?:[,;:.]\s*|$)(.*)", text, re.DOTALL)
    if not found:
        return sentence(text)
    formulas, words = found.groups()
    return join(code("\n".join(re.findall(r"`([^`]+)`", formulas)), "text"), sentence(words))


def as_markdown(text: str) -> str:
    """A docstring without roles of Sphinx."""
    return ROLE.sub(r"`\1`", text)


def cell(text: str) -> str:
    """Text in a cell of a table: bars would end it."""
    return " ".join(text.split()).replace("|", "\\|")


def sentence(text: str) -> str:
    """Text with a capital letter, unless it opens with a symbol, and a full stop."""
    text = text.strip()
    if re.match(r"[a-z]{2}", text):
        text = text[0].upper() + text[1:]
    return text if not text or text.endswith((".", ":", "!", "?")) else f"{text}."


def section(title: str, *parts: str) -> str:
    return join(f"## {title}", *parts)


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def code(text: str, language: str) -> str:
    return f"```{language}\n{text}\n```"


def join(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)


# -- mkdocs --------------------------------------------------------------------------------------------


def on_config(config: Any) -> Any:
    """Put the pages under their headings of the navigation."""
    sections = {
        "Methods": [f"methods/{name}.md" for name in METHODS],
        "Forms": [
            *(f"forms/{name}.md" for name in FORMS),
            *(f"forms/{name}-embedding.md" for name in EMBEDDINGS),
            *(f"forms/{name}.md" for name in OTHER_FORMS),
        ],
        "Statistics": [f"statistics/{name}.md" for name in STATISTICS],
        "Recoveries": [f"recoveries/{name}.md" for name in RECOVERIES],
    }
    _add_below(config.nav, "By name", [{title: pages} for title, pages in sections.items()])
    return config


def _add_below(nav: list[Any], heading: str, entries: list[Any]) -> None:
    """Add entries to the list below a heading, wherever in the navigation it stands."""
    for entry in nav:
        for title, below in entry.items() if isinstance(entry, dict) else ():
            if title == heading:
                below += entries
            elif isinstance(below, list):
                _add_below(below, heading, entries)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages."""
    from mkdocs.structure.files import File

    for path, text in make_pages().items():
        files.append(File.generated(config, path, content=text + "\n"))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links to files of the repository that are not on the site become names of files."""
    return re.sub(r"\[([^\]]+)\]\((?:\.\./)+(?:src|benchmarks|tests|examples|tools)/[^)]*\)", r"`\1`", markdown)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Names in docstrings stand without the roles of Sphinx."""
    return re.sub(r":\w+:<code>~?", "<code>", html)
