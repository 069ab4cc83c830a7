"""What was found: a table, JSON, CSV and a plot, all of the same rows."""

from __future__ import annotations

import csv
import importlib.util
import io
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from hpcft.bench import predict
from hpcft.bench.campaign import Results
from hpcft.bench.plan import SAVING, Mode
from hpcft.bench.predict import Advice, Baseline, Costs, Figures
from hpcft.units import counted, human_duration, human_size

NO_PLOT = "no plot: matplotlib is not installed; pip install 'hpcft[plot]'"

_NAMES = {Mode.NONE: "none", Mode.SYNC: "synchronous", Mode.ASYNC: "asynchronous", Mode.MEMORY: "memory only"}


@dataclass(frozen=True, slots=True)
class Row:
    """Of the table: one way of saving. Seconds and bytes; None: it was not measured."""

    mode: str
    every: int | None
    """In units."""
    every_steps: int | None
    training_seconds: float | None
    """For the steps of a trial, saves included."""
    overhead: float | None
    """As a share of the training time without checkpoints."""
    blocked_median: float | None
    blocked_p99: float | None
    saves: int
    """So many the three figures beside it are of."""
    left_out: int
    durable_lag_median: float | None
    bytes_per_second: float | None
    raw_share: float | None
    recovery_seconds: float | None
    steps_lost: int | None
    note: str = ""


def rows(results: Results) -> list[Row]:
    """In the order of the table. The trials without checkpoints are one row."""
    if not results.trials:
        return []
    base = predict.baseline(results.trials)
    unsaved = [each for each in results.trials if each.mode is Mode.NONE]
    found = [_of_none(results, unsaved, base)]
    for mode in SAVING:
        mine = [each for each in results.trials if each.mode is mode]
        found += [_row(results, each, base) for each in mine]
        if mine:
            found += [_empty(mode, every, "a trial is shorter; --steps N") for every in results.not_reached]
    return found


def _of_none(results: Results, trials: list[Figures], base: Baseline) -> Row:
    recoveries = [each.recovery for each in trials if each.recovery is not None]
    lost = [each.steps_lost for each in trials if each.steps_lost is not None]
    return Row(
        _NAMES[Mode.NONE], None, None, base.step * (results.steps or trials[0].steps), 0.0, None, None, 0, 0, None,
        None, None, median(recoveries) if recoveries else None, round(median(lost)) if lost else None,
        f"median of {base.trials}",
    )  # fmt: skip


def _row(results: Results, trial: Figures, base: Baseline) -> Row:
    raw, rate = results.raw_rate, trial.rate
    return Row(
        mode=_NAMES[trial.mode],
        every=results.unit_of(trial),
        every_steps=trial.every,
        training_seconds=trial.step_seconds * (results.steps or trial.steps),
        overhead=predict.overhead(trial, base),
        blocked_median=median(trial.blocked) if trial.blocked else None,
        blocked_p99=predict.percentile(trial.blocked, 0.99) if trial.blocked else None,
        saves=trial.saves,
        left_out=trial.left_out,
        durable_lag_median=median(trial.lags) if trial.lags else None,
        bytes_per_second=rate,
        raw_share=rate / raw if rate is not None and raw else None,
        recovery_seconds=trial.recovery,
        steps_lost=trial.steps_lost,
        note=f"{counted(trial.failed, 'save')} failed" if trial.failed else "",
    )


def _empty(mode: Mode, every: int | None, note: str) -> Row:
    return Row(_NAMES[mode], every, None, None, None, None, None, 0, 0, None, None, None, None, None, note)


@dataclass(frozen=True, slots=True)
class Recommendation:
    costs: Costs
    advice: Advice


def recommendations(results: Results) -> list[Recommendation]:
    """For each mode that has saved something, the one with the best goodput first; copies in memory last."""
    if not results.trials:
        return []
    base = predict.baseline(results.trials)
    costs = (predict.costs(mode, results.trials, base) for mode in SAVING)
    found = [Recommendation(each, predict.advice(each, results.question.mtbf, base.step)) for each in costs if each]
    return sorted(found, key=lambda each: (each.costs.mode is Mode.MEMORY, -each.advice.goodput))


def as_dict(results: Results) -> dict[str, Any]:
    question = results.question
    base = predict.baseline(results.trials) if results.trials else None
    return {
        "schema": 1,
        "complete": results.complete,
        "model": question.model,
        "site": results.site,
        "machine": results.machine,
        "load": list(results.load),
        "began": results.began,
        "unit": "epoch" if question.epochs else "step",
        "epoch_steps": results.epoch_steps,
        "steps": results.steps,
        "step_seconds": None if base is None else base.step,
        "spread": None if base is None else base.spread,
        "noisy": None if base is None else base.noisy,
        "startup_seconds": results.startup,
        "checkpoint_bytes": results.size,
        "ranks": results.ranks,
        "raw_bytes_per_second": list(results.raw),
        "notes": list(results.notes),
        "mtbf_seconds": question.mtbf,
        "mtbf_source": question.mtbf_source,
        "rows": [asdict(each) for each in rows(results)],
        "trials": [asdict(each) for each in results.trials],
        "recommendations": [
            {**asdict(each.advice), "cost": each.costs.cost, **_without_mode(each.costs)}
            for each in recommendations(results)
        ],
    }


def _without_mode(costs: Costs) -> dict[str, Any]:
    return {f"save_{key}": value for key, value in asdict(costs).items() if key != "mode"}


def as_csv(results: Results) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(Row.__slots__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(each) for each in rows(results))
    return text.getvalue()


# --- for people ---


def show(results: Results, console: Console) -> None:
    """The table, and what follows from it."""
    if not results.trials:
        console.print("nothing was measured", highlight=False)
        return
    for line in _head(results):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(_table(results))
    for line in (*_foot(results), "", *_recommended(results)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _head(results: Results) -> Iterator[str]:
    state = "" if results.complete else " (interrupted: this is what there is)"
    yield f"{results.question.model}, {results.site}{state}"
    low, high = min(results.load), max(results.load)
    yield f"{results.machine}; load {low:.1f} to {high:.1f}"
    if results.size is not None and results.raw:
        rates = " and ".join(f"{human_size(each)}/s" for each in results.raw)
        yield f"a checkpoint has {human_size(results.size)}; plain write and fsync in this directory: {rates}"


def _table(results: Results) -> Table:
    unit = "epochs" if results.question.epochs else "steps"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("checkpoints")
    table.add_column(f"every\n{unit}", justify="right")
    for name in (
        f"training\n{results.steps or '-'} steps",
        "over-\nhead",
        "blocked\nmedian",
        "blocked\np99",
        "saves\n(left out)",
        "durable\nafter",
        "written\nper s",
        "of raw\nlimit",
        "recovery\n",
        "steps\nlost",
    ):
        table.add_column(name, justify="right")
    table.add_column("")
    for row in rows(results):
        table.add_row(
            row.mode,
            _text(row.every, str),
            _text(row.training_seconds, human_duration),
            _text(row.overhead, "{:+.1%}".format) if row.mode != _NAMES[Mode.NONE] else "",
            _text(row.blocked_median, human_duration),
            _text(row.blocked_p99, human_duration),
            (f"{row.saves}" + (f" ({row.left_out})" if row.left_out else "")) if row.saves or row.left_out else "-",
            _text(row.durable_lag_median, human_duration),
            _text(row.bytes_per_second, human_size),
            _text(row.raw_share, "{:.0%}".format),
            _text(row.recovery_seconds, human_duration),
            _text(row.steps_lost, str),
            row.note,
        )
    return table


def _text(value: Any, form: Any) -> str:
    return "-" if value is None else form(value)


def _foot(results: Results) -> Iterator[str]:
    base = predict.baseline(results.trials)
    yield (
        f"{counted(base.trials, 'run')} without checkpoints: {human_duration(base.step)} a step, {base.spread:.1%} "
        "between the slowest and the fastest; smaller differences say nothing"
    )
    yield from results.notes
    counts = [len(each.blocked) for each in results.trials if each.blocked]
    if counts and min(counts) < 100:
        yield f"p99 is the longest of the saves where there are fewer than 100 of them (here {min(counts)} at least)"


def _recommended(results: Results) -> Iterator[str]:
    question = results.question
    found = recommendations(results)
    if not found:
        yield "no recommendation: nothing was saved"
        return
    yield f"one failure in {human_duration(question.mtbf)} ({question.mtbf_source}):"
    for each in found:
        yield f"  {_sentence(each)}"
    durable = [each for each in found if each.costs.mode is not Mode.MEMORY]
    base = predict.baseline(results.trials)
    if base.noisy:
        yield (
            f"no recommendation: runs without checkpoints differ by {base.spread:.0%}, so these figures are chance; "
            "measure again on a quiet machine, or for longer (--steps N)"
        )
    elif durable:
        best = durable[0].advice
        yield f'recommended: checkpoint.mode = "{best.mode}", checkpoint.every = "{counted(best.steps, "step")}"'


def _sentence(found: Recommendation) -> str:
    costs, advice = found.costs, found.advice
    what = f"{_NAMES[costs.mode]}: every {human_duration(advice.interval)} ({counted(advice.steps, 'step')})"
    why = ", for it takes so long until a save is durable" if advice.bound_by_lag else ""
    losses = f"{advice.saving:.2%} saving, {advice.repeating:.2%} repeating steps, {advice.recovering:.3%} recovering"
    only = "; lost with the node that holds it, so beside checkpoints" if costs.mode is Mode.MEMORY else ""
    return f"{what}{why}: goodput {advice.goodput:.2%} ({losses}); a save costs {human_duration(costs.cost)}{only}"


# --- files ---


def plot(results: Results, path: Path) -> bool:
    """Overhead by cadence, and predicted goodput by interval, as PNG. False: matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    measured, predicted = figure.subplots(1, 2)
    base = predict.baseline(results.trials)
    for mode in SAVING:
        points = [(each.every, 100 * predict.overhead(each, base)) for each in results.trials if each.mode is mode]
        if points:
            measured.plot(*zip(*points, strict=True), marker="o", label=_NAMES[mode])
    measured.axhspan(-50 * base.spread, 50 * base.spread, alpha=0.15, color="grey", label="no checkpoints: spread")
    measured.set(xscale="log", xlabel="steps from save to save", ylabel="overhead, %", title="measured")
    measured.legend()
    for each in recommendations(results):
        curve = each.advice.curve
        if not curve:
            continue
        (line,) = predicted.plot([x for x, _ in curve], [100 * y for _, y in curve], label=_NAMES[each.costs.mode])
        predicted.plot([each.advice.interval], [100 * each.advice.goodput], marker="o", color=line.get_color())
    predicted.set(
        xscale="log",
        xlabel="seconds from save to save",
        ylabel="goodput, %",
        title=f"predicted: one failure in {human_duration(results.question.mtbf)}",
    )
    predicted.legend()
    figure.savefig(path, dpi=120)
    return True
