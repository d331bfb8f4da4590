"""The page of a compression."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from eckart.report.compression import CURVATURE, KEPT_OF, list_quality
from eckart.report.page.bars import Bar, draw_bars
from eckart.report.page.blocks import Block, Details, Facts, Key, Page, Picture, Section, Table, Tile, Tiles, Words
from eckart.report.page.common import (
    MOST,
    ORIGINAL,
    ROUNDED,
    Rival,
    compare_rivals,
    judge_rounding,
    list_notes,
    list_options,
    list_sizes,
    list_steps,
    measure_of,
    show_loading,
    show_name,
    show_score,
    show_value,
    tile_of,
)
from eckart.report.page.heat import draw_ranks, layer_of
from eckart.report.page.spectra import Spectrum, show_spectra
from eckart.report.page.svg import sample
from eckart.report.speed import describe_latency
from eckart.report.words import format_count, format_share, name_rank

NOT_TIMED = (
    "No time was taken. `eckart bench DIR --against MODEL` times both models in turn; `eckart compress` does with "
    "`--latency`."
)
NOT_ROUNDED = (
    "The original rounded to int8 and int4 is not beside it: a compression measures that where it publishes the folder "
    "itself (`eckart compress`, or `output_dir=` in Python), and `eckart eval DIR --against MODEL` does at any time."
)
WEIGHTED_RANK = (
    "weighted effective rank: exp of the entropy of the squared singular values of the weight as the method weighs its "
    "errors, by inputs and gradients: about how many directions the data needs. That of the weight by itself, which "
    "`eckart inspect` shows, is another number, and mostly a much larger one."
)
NEURONS = (
    "rank or neurons: a weight of form sliced belongs to a feed-forward layer that loses neurons; for it stands how "
    "many are left of how many, which may be more than its own width."
)


def describe_compression(
    report: Mapping[str, Any],
    name: str,
    *,
    loading: str | None = None,
    again: str | None = None,
    scores: Sequence[Section] = (),
    spectra: Sequence[Spectrum] = (),
) -> Page:
    """What a compression was asked for, did and measured.

    Args:
        report: as it stands in report.json.
        name: of the published folder, or of the model.
        loading: the lines of Python that load it.
        again: the command that makes it again.
        scores: of `eckart eval`, as sections.
        spectra: of weights that were asked for.
    """
    rivals = list_rivals(report)
    return Page(
        title=name,
        kind="compression report",
        summary=_summary(report),
        tiles=_tiles(report),
        sections=[
            Section("quality", "Quality before and after", _quality(report, rivals)),
            *scores,
            Section("asked", "What was asked", _asked(report)),
            Section("sizes", "Sizes", _sizes(report)),
            Section("budget", "Where the budget went", _budget(report)),
            Section("errors", _name_errors(report), _errors(report)),
            Section("spectra", "Spectra", show_spectra(spectra)),
            Section("speed", "Speed", list_latency(report.get("latency")) or [Words(NOT_TIMED)]),
            Section("stages", "What each stage brought", [*_rounding(report), *list_steps(report)]),
            Section("notes", "Warnings and fallbacks", list_notes(report)),
            show_loading(loading, again),
        ],
    )


def list_rivals(report: Mapping[str, Any]) -> list[Rival]:
    """The original, what was made of it, and the original in few bits."""
    model, quality = report["sizes"]["model"], list_quality(report)
    times = (report.get("latency") or {}).get("seconds") or {}
    seconds = {name: value["median"] for name, value in times.items()}
    perfect = {name: 1.0 if name == "same most likely" else 0.0 for name in quality}
    rounding = report.get("quantization")
    own = f"this model, {rounding['kind']}" if rounding else "this model"
    rivals = [
        Rival("original", model["before"], perfect, seconds.get("original"), ORIGINAL),
        Rival(own, model["after"], quality, seconds.get("eckart"), 0),
    ]
    if rounding:
        before = rounding["before"]
        rivals.append(Rival("before rounding", before["size"], list_quality({"quality": before["quality"]}), None, 2))
    return rivals + list_rounded(report.get("baselines") or ())


def list_rounded(rows: Sequence[Mapping[str, Any]]) -> list[Rival]:
    """The original in few bits, as :func:`eckart.compression.baselines.measure_baselines` gives it."""
    return [
        Rival(row["name"], row, row["quality"], None, ROUNDED, row["name"].removeprefix("original "))
        for row in rows
    ]  # fmt: skip


def list_latency(latency: Mapping[str, Any] | None) -> list[Block]:
    """Seconds of a forward pass of each model, as a picture and a table."""
    if not latency:
        return []
    times = latency["seconds"]
    bars = [
        Bar(name, value["median"] * 1e3, series=ORIGINAL if name == "original" else 0) for name, value in times.items()
    ]
    caption = f"Milliseconds of {describe_latency(latency)}"
    drawn = draw_bars("Latency", caption, bars, lambda value: f"{value:.3g} ms", above=True)
    rows = [
        [
            name,
            f"{value['median'] * 1e3:.3g}",
            f"{value['lower'] * 1e3:.3g} to {value['upper'] * 1e3:.3g}",
            f"{latency['speedup'][name]:.2f}×",
        ]
        for name, value in times.items()
    ]
    table = Table(
        "Milliseconds: median, middle half of all runs, speed-up", ["model", "ms", "half of runs", "speed-up"], rows
    )
    return [Picture(caption, drawn, numbers=table, flush=True)]


def _summary(report: Mapping[str, Any]) -> str:
    model = report["sizes"]["model"]
    before, after = model["before"], model["after"]
    words = [
        f"{format_count(after['elements'])} of {format_count(before['elements'])} parameters are left "
        f"({format_share(after['elements'], before['elements'])})"
    ]
    words += [f"{name} {show_score(value)}" for name, value in list_quality(report).items()]
    speedup = ((report.get("latency") or {}).get("speedup") or {}).get("eckart")
    if speedup is not None:
        words.append(f"{speedup:.2f} times as fast")
    model_name = report["recipe"].get("model")
    origin = f"{show_name(model_name)}, " if model_name else ""
    return f"{origin}{report['model']}, by {report['method']}: {'; '.join(words)}."


def _tiles(report: Mapping[str, Any]) -> Tiles:
    model = report["sizes"]["model"]
    tiles = [tile_of(key, model["before"][key], model["after"][key]) for key in ("elements", "bytes", "multiply_adds")]
    for name, value in list_quality(report).items():
        part = value if name == "same most likely" else None
        tiles.append(Tile(name, f"{value:.1%}" if part is not None else show_score(value), "held-out text", part))
    latency = report.get("latency")
    if latency:
        seconds, speedup = latency["seconds"], latency["speedup"]["eckart"]
        note = f"{seconds['original']['median'] * 1e3:.3g} ms → {seconds['eckart']['median'] * 1e3:.3g} ms"
        tiles.append(Tile("speed-up", f"{speedup:.2f}×", note))
    return Tiles(tiles)


def _quality(report: Mapping[str, Any], rivals: Sequence[Rival]) -> list[Block]:
    quality = report["quality"]
    if quality is None:
        return [Words("Not measured: there was no held-out text. Measure it with `eckart eval DIR --against MODEL`.")]
    lines: list[Block] = [
        Words(
            f"Measured on {quality['examples']} held-out examples ({quality['tokens']:,} tokens) that were not "
            f"calibrated on.{_spread(quality)}"
        )
    ]
    verdict = judge_rounding(rivals, rivals[1], rounded="quantization" in report)
    lines += [Words(verdict, strong=True)] if verdict else []
    if measure_of(rivals) is not None:
        lines += compare_rivals(rivals, "Quality of this model beside its original and plain rounding of it")
    if any(rival.series == ROUNDED for rival in rivals):
        lines.append(
            Words("int8, int4: the original's weights rounded to the nearest of few levels, without calibration.")
        )
    else:
        lines.append(Words(NOT_ROUNDED))
    if (report["data"] or {}).get("kind") == "causal" and "agreement" in quality:
        lines.append(Words(_perplexity(quality["agreement"]["kl"])))
    return lines


def _spread(quality: Mapping[str, Any]) -> str:
    """How far the distance may be off by the choice of the examples."""
    values = quality.get("agreement") or quality.get("embedding") or {}
    error, name = values.get("standard_error"), next(iter(list_quality({"quality": quality})), "")
    if not isinstance(error, int | float):
        return ""
    return f" Standard error of {name} over these examples: {show_score(float(error))}."


def _perplexity(divergence: float) -> str:
    """What a KL says of perplexity, and how to measure that."""
    factor = f" = {math.exp(divergence):.3g}" if 0 <= _finite(divergence) < 20 and _finite(divergence) else ""
    return (
        f"KL is in nats a token: on text that the original itself would write, perplexity is exp(KL){factor} times the "
        "original's. On text of your own: `eckart eval DIR --against MODEL --data FILE`."
    )


def _asked(report: Mapping[str, Any]) -> list[Block]:
    recipe, data, kept = report["recipe"], report["data"], report["kept"]
    budget = f"keep {recipe['keep']:g} of the numbers in {KEPT_OF[recipe['keep_of']]}"
    if report["allocation"] == "plan":
        budget = f"the plan {show_name(recipe['plan'])}"
    elif report["allocation"] == "paper":
        budget = "the sizes that its paper states"
    pairs = [
        ("model", f"{show_name(recipe['model'])} ({report['model']})" if recipe.get("model") else report["model"]),
        ("method", report["method"]),
        ("optimal for", report["exact_for"]),
        ("budget", budget),
        ("form", report["form"]),
        ("ranks", {"loss": "by predicted loss", "uniform": "the same part everywhere"}.get(report["allocation"],
                                                                                         report["allocation"])),
        ("kept of the sites", f"{kept['of_sites']:.2%}"),
        ("kept of the model", f"{kept['of_model']:.2%}"),
    ]  # fmt: skip
    if data is not None:
        tokens = f", {data['calibration_tokens']:,} tokens" if "calibration_tokens" in data else ""
        pairs.append(("calibrated on", f"{show_name(data.get('source', 'the data given'))}{tokens}"))
    if report["curvature"] != "none":
        pairs.append(("gradients from", CURVATURE[report["curvature"]]))
    if (report.get("ranks") or {}).get("multiple", 1) > 1:
        pairs.append(("ranks are multiples of", f"{report['ranks']['multiple']}, for {report['ranks']['target']}"))
    for goal, found in (report.get("found") or {}).items():
        pairs.append((f"asked for {goal.replace('_', ' ')}", show_value(found)))
    for row in report.get("embeddings") or ():
        size = f"factor {row['factor']}" if "factor" in row else f"rank {row['rank']}"
        pairs.append(
            (f"embedding {row['table']}", f"{row['form']}, {size}: {format_share(row['after'], row['before'])}")
        )
    paper = [Words(f"Paper: {report['paper']}")] if report.get("paper") else []
    return [Facts(pairs), *paper, list_options(recipe)]


def _sizes(report: Mapping[str, Any]) -> list[Block]:
    sites, model = report["sizes"]["sites"], report["sizes"]["model"]
    rows = {"whole model, before": (model["before"], model["before"])}
    rounding = report.get("quantization")
    if rounding:
        rows["whole model, before rounding"] = (model["before"], rounding["before"]["size"])
    rows["whole model, afterwards"] = (model["before"], model["after"])
    rows["sites, before"] = (sites["before"], sites["before"])
    rows["sites, afterwards"] = (sites["before"], sites["after"])
    return [list_sizes(rows)]


def _budget(report: Mapping[str, Any]) -> list[Block]:
    sites = report["sites"]
    if not sites:
        return []
    ranks = name_rank(sites)
    header = ["weight", "out × in", "form", ranks, "of", "kept", "weighted effective rank", "predicted loss"]
    rows = [
        [
            site["site"],
            " × ".join(map(str, site["shape"])),
            site["form"],
            str(site["rank"]),
            str(site.get("full_rank", min(site["shape"]))),
            format_share(site["after"]["elements"], site["before"]["elements"]),
            show_score(site.get("effective_rank")),
            show_score(site.get("predicted_loss")),
        ]
        for site in sites[:MOST]
    ]
    more = f" (the first {MOST}; all are in report.json)" if len(sites) > MOST else ""
    table = Table(f"Every site{more}", header, rows, words=(2,))
    reasons = [[site["site"], site["reason"]] for site in sites[:MOST] if site.get("reason")]
    why = [Details("Why each is stored so", [Table("Measured seconds were weighed", ["weight", "reason"], reasons,
                                                   words=(1,))])] if reasons else []  # fmt: skip
    explained = [Words(NEURONS)] if ranks != "rank" else []
    explained += [Words(WEIGHTED_RANK)] if any("effective_rank" in site for site in sites) else []
    return [draw_ranks(sites), Details(f"All {len(sites)} sites", [table, *explained]), *why]


def _name_errors(report: Mapping[str, Any]) -> str:
    return f"Predicted {'and measured ' if report.get('curves') else ''}error by layer"


def _errors(report: Mapping[str, Any]) -> list[Block]:
    """By layer, in parts of the whole: the prediction is a loss, what is measured another distance."""
    curves = report.get("curves") or ()
    predicted: dict[int | None, float] = {}
    measured: dict[int | None, float] = {}
    for unit in curves:
        layer = layer_of(unit["sites"][0])
        predicted[layer] = predicted.get(layer, 0.0) + max(_finite(unit["predicted"]), 0.0)
        measured[layer] = measured.get(layer, 0.0) + max(_finite(unit["measured"]), 0.0)
    if not curves:
        for site in report["sites"]:
            if "predicted_loss" in site:
                layer = layer_of(site["site"])
                predicted[layer] = predicted.get(layer, 0.0) + max(_finite(site["predicted_loss"]), 0.0)
    if not sum(predicted.values()) > 0:
        return []
    whole, found = sum(predicted.values()), sum(measured.values())
    layers = sorted(predicted, key=lambda layer: (layer is None, layer or 0))
    names = {layer: "other" if layer is None else f"layer {layer}" for layer in layers}
    bars = [
        Bar(
            names[layer],
            (measured[layer] / found if found else 0.0) if curves else predicted[layer] / whole,
            predicted[layer] / whole if curves else None,
            words=f"{measured[layer] / found if found else 0.0:.0%}, predicted {predicted[layer] / whole:.0%}"
            if curves
            else "",
        )
        for layer in layers
    ]
    if curves:
        caption = "Each layer's part of the error of all cuts, each made alone: measured at the output, and predicted"
        legend = [Key(sample(0), "measured"), Key(sample(3), "predicted")]
        rows = [
            [", ".join(unit["sites"]), show_score(_finite(unit["predicted"])), show_score(_finite(unit["measured"]))]
            for unit in curves[:MOST]
        ]
        numbers = Table("Weights that were cut together, predicted loss and measured distance of the output",
                        ["weights", "predicted", "measured"], rows)  # fmt: skip
    else:
        caption = "Each layer's part of the predicted loss of the chosen ranks"
        legend = []
        numbers = Table("Predicted loss by layer", ["layer", "predicted loss"],
                        [[names[layer], show_score(predicted[layer])] for layer in layers])  # fmt: skip
    top = max(bars, key=lambda bar: bar.value)
    drawn = draw_bars("Error by layer", f"{len(bars)} layers; most is lost in {top.name}", bars, lambda v: f"{v:.0%}")
    return [Picture(caption, drawn, legend, numbers)]


def _rounding(report: Mapping[str, Any]) -> list[Block]:
    rounding = report.get("quantization")
    if not rounding:
        return []
    was = list_quality({"quality": rounding["before"]["quality"]})
    now = list_quality(report)
    rows = [[name, show_score(value), show_score(now.get(name))] for name, value in was.items()]
    size = report["sizes"]["model"]["after"]["bytes"]
    rows.append(["bytes", format_count(rounding["before"]["size"]["bytes"]), format_count(size)])
    return [Table(f"Rounding to {rounding['kind']}, {rounding['layers']} layers", ["measure", "before", "after"], rows)]


def _finite(value: Any) -> float:
    """A number of a report; 0 for one that is not finite, which a report holds as a word."""
    return float(value) if isinstance(value, int | float) and abs(value) < 1e300 else 0.0
