"""The commands `hpcft bench …`: they wire, and never compute. As cheap to import as `cli`, which see."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from hpcft.errors import ExitCode, HpcftError, UsageError
from hpcft.options import (
    Commands,
    complete_run,
    find,
    json_option,
    load_config,
    print_json,
    root_option,
    set_option,
    with_options,
)

if TYPE_CHECKING:
    from hpcft.bench.campaign import Results
    from hpcft.bench.plan import Mode
    from hpcft.bench.site import Site

INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""


@click.group("bench", cls=Commands)
def bench_group() -> None:
    """Measure this machine or cluster."""


def _parsed(name: str) -> Any:
    """A callback: the value as the parser of `bench.plan` or `units` reads it."""

    def parse(ctx: click.Context, param: click.Parameter, text: str | None) -> Any:
        from hpcft import units
        from hpcft.bench import plan

        if text is None:
            return None
        try:
            return getattr(plan if hasattr(plan, name) else units, name)(text)
        except ValueError as error:
            raise click.BadParameter(str(error)) from error

    return parse


@bench_group.command("checkpoint-frequency")
@click.argument("config", type=click.Path(path_type=Path), required=False)
@click.option(
    "--params",
    metavar="N",
    callback=_parsed("parse_parameters"),
    help="Train a model of so many parameters (2M, 125M, 1.5B) on made-up data, instead of a CONFIG.",
)
@click.option(
    "--every",
    metavar="N,N,…",
    callback=_parsed("parse_every"),
    help="How often to save, in units; default: 1,5,10,50 steps, or 1,5,10 epochs.",
)
@click.option("--unit", type=click.Choice(["step", "epoch"]), default="step", show_default=True, help="Of --every.")
@click.option(
    "--mode",
    "modes",
    type=click.Choice(["sync", "async", "memory"]),
    multiple=True,
    help="Only this way of saving; may be repeated. memory: copies that are not written.",
)
@click.option(
    "--steps", type=click.IntRange(min=2), metavar="N", help="Of each trial; default: as many as it takes, within 2m."
)
@click.option("--mtbf", metavar="DURATION", callback=_parsed("parse_duration"), help="Between failures (3h), expected.")
@click.option(
    "--mtbf-of",
    metavar="RUN",
    shell_complete=complete_run,
    help="Take it from what this run, a name below --root or a path, has seen of failures.",
)
@click.option("--nodes", type=click.IntRange(min=1), metavar="N", help="Virtual nodes, outside an allocation.")
@click.option("--workers", type=click.IntRange(min=1), metavar="K", help="Workers on each node.")
@click.option("--local", is_flag=True, help="On this machine alone, also inside a Slurm allocation.")
@click.option("--keep", is_flag=True, help="Leave the checkpoints of the trials there.")
@with_options(set_option, root_option, json_option)
def checkpoint_frequency_command(
    config: Path | None,
    params: int | None,
    every: tuple[int, ...] | None,
    unit: str,
    modes: tuple[str, ...],
    steps: int | None,
    mtbf: float | None,
    mtbf_of: str | None,
    nodes: int | None,
    workers: int | None,
    local: bool,
    keep: bool,
    sets: tuple[str, ...],
    root: Path,
    as_json: bool,
) -> int:
    """What checkpoints cost here, and how often they pay.

    Trains without checkpoints, and with one every so many steps, in each mode; kills a worker at the end of each
    trial. In a Slurm allocation on its nodes, else on this machine. Says beforehand how long it will take; Ctrl-C ends
    it with what there is. Table, CSV, JSON and a plot lie in a directory below --root. See docs/benchmarking.md.

    \b
        hpcft bench checkpoint-frequency --params 125M --mtbf 3h
        hpcft bench checkpoint-frequency train.toml --every 1,5,10 --unit epoch
    """
    from rich.console import Console

    from hpcft import process
    from hpcft.bench import report
    from hpcft.bench.campaign import Campaign, Question, check_room, write_job
    from hpcft.bench.meter import meter
    from hpcft.bench.plan import EVERY, STATE_BYTES

    if (config is None) == (params is None):
        raise UsageError(
            "what to train is not said" if config is None else "CONFIG and --params exclude each other",
            "give a CONFIG, or --params N",
        )
    if mtbf is not None and mtbf_of is not None:
        raise UsageError("--mtbf and --mtbf-of exclude each other", "leave out one of them")
    if mtbf == 0:
        raise UsageError("failures that come at once leave no time to train", "--mtbf 3h, say")
    if steps is not None and unit == "step" and (never := [each for each in every or () if each > steps]):
        raise UsageError(
            f"a checkpoint every {', '.join(map(str, never))} steps does not come about in --steps {steps}",
            f"--steps {2 * max(never)}, say, or save more often",
        )
    directory = root.absolute() / f"bench-{time.strftime('%Y%m%d-%H%M%S')}"
    directory.mkdir(parents=True)
    try:
        if params is not None:
            check_room(directory, params * STATE_BYTES)
            config = directory / "job.toml"
            write_job(config, params, {})
        assert config is not None
        site, chosen, expected = _prepared(config, sets, modes, nodes, workers, local, params is not None)
        seconds, source = _mtbf(root, mtbf, mtbf_of, expected)
    except HpcftError:
        shutil.rmtree(directory)
        raise
    question = Question(
        config=config,
        sets=sets,
        model=str(config) if params is None else f"{params:,} parameters",
        modes=chosen,
        every=every or EVERY[unit == "epoch"],
        epochs=unit == "epoch",
        steps=steps,
        mtbf=seconds,
        mtbf_source=source,
        keep=keep,
    )
    process.become_subreaper()
    stderr = Console(stderr=True)
    interrupted = False
    failed: HpcftError | OSError | None = None
    with meter(stderr) as shown:
        campaign = Campaign(question, site, directory, shown)
        try:
            with _interruptible():
                campaign.run()
        except KeyboardInterrupt:
            interrupted = True
        except (HpcftError, OSError) as error:
            failed = error
    results = campaign.results
    files: list[str] = []
    try:
        files = _write(results, directory) if results.trials else []
    except OSError as error:
        failed = failed or error
    if failed is not None and not results.trials:
        raise failed
    if interrupted and not results.trials:
        shutil.rmtree(directory, ignore_errors=True)  # there is nothing in it that anybody would look for
    if as_json:
        print_json({"directory": str(directory) if results.trials else None, **report.as_dict(results)})
    else:
        report.show(results, Console(width=None if sys.stdout.isatty() else 200))
        for line in files:
            click.echo(line)
    if failed is not None:  # what was measured before is shown all the same
        raise failed
    return INTERRUPTED if interrupted else ExitCode.OK


def _prepared(
    path: Path,
    sets: tuple[str, ...],
    modes: tuple[str, ...],
    nodes: int | None,
    workers: int | None,
    local: bool,
    sized: bool,
) -> tuple[Site, tuple[Mode, ...], float]:
    """Where the trials run, which modes, and the configured time between failures."""
    from hpcft.bench.campaign import SIZED
    from hpcft.bench.plan import SAVING, Mode
    from hpcft.bench.site import InAllocation, Local
    from hpcft.config import check_program, check_torch
    from hpcft.slurm.nodelist import expand

    config = load_config(path, sets)
    if config.job.command is not None:
        raise UsageError(
            "of a plain command's steps and checkpoints nothing is known, so there is nothing to measure",
            "give a program that uses hpcft, or --params N",
        )
    check_program(config)
    check_torch(config)
    if config.job.module == SIZED:
        from hpcft.examples.sized import Settings  # with torch, which takes a second

        try:
            Settings.of(config.train)
        except ValueError as error:
            raise UsageError(str(error), "--params 2M, say; --set train.batch_size=64 and the like") from error
    asked = tuple(Mode(each) for each in modes) or SAVING
    chosen = tuple(each for each in SAVING if each in asked)
    site: Site
    if "SLURM_JOB_NODELIST" in os.environ and not local:
        if nodes is not None:
            raise UsageError("--nodes is for virtual nodes", "an allocation has its nodes; or --local")
        held = tuple(expand(os.environ["SLURM_JOB_NODELIST"]))
        gpus = any(os.environ.get(name) for name in ("SLURM_GPUS_ON_NODE", "SLURM_JOB_GPUS", "CUDA_VISIBLE_DEVICES"))
        each = workers or config.nodes.workers_per_node or (0 if gpus else 1)
        site = InAllocation(held, os.environ.get("SLURMD_NODENAME", ""), each)
    elif sized:
        site = Local(nodes or 1, workers or 2)
    else:
        site = Local(nodes or config.local.nodes, workers or config.local.workers)
    return site, chosen, config.checkpoint.mtbf


def _mtbf(root: Path, given: float | None, of: str | None, expected: float) -> tuple[float, str]:
    """Seconds between failures, and how that is known."""
    from hpcft import status

    if given is not None:
        return given, "as given by --mtbf"
    if of is None:
        return expected, "checkpoint.mtbf, an expectation: --mtbf says better"
    run = find(root, of)
    cadence = status.read(run).get("cadence")
    if cadence is None:
        raise UsageError(f"{run.name} does not say how often it has failed", "give --mtbf instead")
    seen = f"{cadence['failures']} in {cadence['trained_seconds'] / 3600:.1f} h of training"
    return 3600 / cadence["failures_per_hour"], f"from {run.name}: {seen}, and what was expected beforehand"


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM, as Slurm sends it, is taken like Ctrl-C; a second one of either does not disturb the clearing up."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _write(results: Results, directory: Path) -> list[str]:
    """The files of the bench; returns what to say of them."""
    import json

    from hpcft.bench import report

    (directory / "results.json").write_text(json.dumps(report.as_dict(results), indent=2) + "\n")
    (directory / "table.csv").write_text(report.as_csv(results))
    drawn = report.plot(results, directory / "plot.png")
    files = f"results.json, table.csv{', plot.png' if drawn else ''}"
    return [f"{directory}: {files}", *([] if drawn else [report.NO_PLOT])]
