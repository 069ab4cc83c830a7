"""`hpcft bench`: which trials, what a journal says of one, what follows for the cadence, and how it is shown."""

from __future__ import annotations

import csv
import io
import os
import signal
import threading
import time
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import orjson
import pytest
from rich.console import Console

from hpcft import cli_bench, process, status, wire
from hpcft.bench import campaign, plan, predict, raw, report, site
from hpcft.bench.campaign import Campaign, Meter, Question, Results, check_room, write_job
from hpcft.bench.measure import LastSave, figures, settings
from hpcft.bench.meter import meter
from hpcft.bench.plan import Mode, Pace, Trial
from hpcft.bench.predict import Costs, Figures
from hpcft.bench.site import Local
from hpcft.cadence import expected_loss
from hpcft.cli import main
from hpcft.config import load
from hpcft.errors import ExitCode, UnusableError
from hpcft.events import (
    CheckpointCommitted,
    CheckpointRef,
    CheckpointSkipped,
    CopiesMeasured,
    Event,
    Failure,
    FailureKind,
    Progressed,
    WorkerFailed,
)
from hpcft.ids import Generation, Incarnation, NodeId, Rank, Step
from hpcft.membership import Timing
from hpcft.policy import Rules
from hpcft.rundir import RunDirectory
from hpcft.units import EverySteps
from hpcft.world import World

# --- which trials ---


@pytest.mark.parametrize(
    ("text", "number"), [("125M", 125_000_000), ("1.5B", 1_500_000_000), ("800k", 800_000), ("2000000", 2_000_000)]
)
def test_numbers_of_parameters(text: str, number: int) -> None:
    assert plan.parse_parameters(text) == number


@pytest.mark.parametrize("text", ["", "M", "-1M", "1T", "1e6", "many"])
def test_what_is_no_number_of_parameters(text: str) -> None:
    with pytest.raises(ValueError, match="not a number of parameters"):
        plan.parse_parameters(text)


def test_more_parameters_than_any_machine_holds_are_a_mistake() -> None:
    for text in ("9" * 400, "9" * 5000, "9999999B"):
        with pytest.raises(ValueError, match="no machine"):
            plan.parse_parameters(text)


def test_how_often() -> None:
    assert plan.parse_every("10, 1,5,5") == (1, 5, 10)
    for wrong in ("", "0", "1,", "1.5", "-1", "x", "9" * 5000):
        with pytest.raises(ValueError, match="whole numbers"):
            plan.parse_every(wrong)


def test_a_run_without_checkpoints_comes_before_and_after_each_mode() -> None:
    trials = plan.trials((Mode.SYNC, Mode.ASYNC), (1, 5, 50), steps=20)
    assert [each.name for each in trials] == ["none-2", "sync-1", "sync-5", "none-3", "async-1", "async-5", "none-4"]
    assert len({each.name for each in (plan.calibration(), *trials)}) == len(trials) + 1


def test_a_trial_has_time_for_two_saves_of_the_longest_cadence() -> None:
    assert plan.steps_of(Pace(0.1, 3.0, 0.0), (1, 50), None) == 100
    assert plan.steps_of(Pace(0.001, 3.0, 0.0), (1, 50), None) == 8000, "and lasts eight seconds"
    assert plan.steps_of(Pace(10.0, 3.0, 0.0), (1, 50), None) == 12, "but not for hours"
    assert plan.steps_of(Pace(0.1, 3.0, 0.0), (1, 50), total=30) == 29, "and the program has to go on after it"


def test_what_a_trial_is_expected_to_take_grows_with_its_saves() -> None:
    pace = Pace(step=0.1, startup=4.0, save=0.5)
    often, seldom = (plan.seconds_of(Trial("x", Mode.SYNC, every), pace, 100) for every in (1, 50))
    assert often - seldom == pytest.approx(98 * 0.5)
    assert plan.seconds_of(Trial("x", Mode.ASYNC, 1), pace, 100) == pytest.approx(seldom - 1.0)


def test_a_trials_settings_are_a_valid_configuration(tmp_path: Path) -> None:
    job = tmp_path / "job.toml"
    write_job(job, 20_000, {"context": 16})
    for mode in Mode:
        config = load(job, sets=settings(Trial("t", mode, 5 if mode is not Mode.NONE else 0), tmp_path))
        assert config.run.root == tmp_path
        assert config.checkpoint.mode == ("async" if mode in (Mode.ASYNC, Mode.MEMORY) else "sync")
        assert isinstance(config.checkpoint.every, EverySteps) is (mode in (Mode.SYNC, Mode.ASYNC))
        assert isinstance(config.checkpoint.snapshot_every, EverySteps) is (mode is Mode.MEMORY)
        assert not config.slurm.requeue, "a trial must not send the job that it is part of back to the queue"


# --- what a journal says of a trial ---

NODE, LIFE, FIRST, SECOND = NodeId("node1"), Incarnation("a"), Generation(1), Generation(2)


def progressed(step: int, generation: Generation = FIRST) -> Progressed:
    return Progressed(NODE, generation, Step(step), loss=None)


def committed(step: int, blocked: float, generation: Generation = FIRST) -> CheckpointCommitted:
    return CheckpointCommitted(CheckpointRef(Step(step), generation), 0.0, 1000, blocked=blocked, lag=2 * blocked)


def write_journal(directory: Path, events: Iterable[tuple[float, Event]]) -> Path:
    lines: list[object] = [{"predecessor": None, "replayed": 0, "term": 1, "format": 1}]
    lines += [{"at": at, "wall": "2026-01-01T00:00:00+00:00", "event": wire.encode(event)} for at, event in events]
    directory.mkdir()
    (directory / "term-000001-g0001-a.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    return directory


def test_steps_and_saves_are_those_before_the_kill(tmp_path: Path) -> None:
    killed = WorkerFailed(NODE, LIFE, FIRST, Rank(0), Failure(FailureKind.EXIT, "SIGKILL", Step(22)))
    journal = write_journal(
        tmp_path / "journal",
        [
            (1.0, progressed(1)),
            (2.0, progressed(2)),
            (7.0, committed(10, 0.1)),
            (12.0, committed(20, 0.3)),
            (12.5, CheckpointSkipped(Step(21), FIRST, "busy")),
            (13.0, progressed(22)),
            (13.5, killed),
            (13.6, progressed(23)),
            (14.0, committed(23, 9.0)),
            (20.0, progressed(30, SECOND)),
            (21.0, committed(30, 9.0, SECOND)),
        ],
    )
    found = figures(Trial("async-10", Mode.ASYNC, 10), journal)
    assert (found.steps, found.seconds) == (20, 11.0)
    assert (found.blocked, found.lags, found.sizes) == ((0.1, 0.3), (0.2, 0.6), (1000, 1000))
    assert found.left_out == 1


def test_copies_that_are_not_written_are_measured_too(tmp_path: Path) -> None:
    """Those before the kill that all nodes have made; of the others that were due it is said how many they were."""

    def took(*copies: tuple[int, float], generation: Generation = FIRST) -> CopiesMeasured:
        return CopiesMeasured(generation, tuple((Step(step), seconds) for step, seconds in copies))

    events: list[tuple[float, Event]] = [
        (1.0, progressed(2)),
        (6.0, took((5, 0.1), (10, 0.4), (20, 0.2))),
        (12.0, progressed(22)),
        (12.1, WorkerFailed(NODE, LIFE, FIRST, Rank(0), Failure(FailureKind.EXIT, "SIGKILL", Step(22)))),
        (12.2, took((25, 9.0))),
        (20.0, progressed(30, SECOND)),
        (21.0, took((30, 9.0), generation=SECOND)),
    ]
    found = figures(Trial("memory-5", Mode.MEMORY, 5), write_journal(tmp_path / "journal", events))
    assert (found.blocked, found.saves, found.left_out, found.lags) == ((0.1, 0.4, 0.2), 3, 1, ())
    (row,) = [each for each in report.rows(results(trials=(*MEASURED[:4], found))) if each.every_steps == 5]
    assert (row.mode, row.blocked_median, row.blocked_p99, row.saves) == ("memory only", 0.2, 0.4, 3)


def test_the_last_save_of_a_run_without_checkpoints_is_none_of_its_saves(tmp_path: Path) -> None:
    events = [(1.0, progressed(2)), (3.0, progressed(6)), (4.0, committed(6, 0.5))]
    found = figures(Trial("none-1", Mode.NONE), write_journal(tmp_path / "journal", events))
    assert (found.steps, found.seconds, found.saves) == (4, 2.0, 0)


def test_too_few_steps_are_said_to_be_too_few(tmp_path: Path) -> None:
    with pytest.raises(UnusableError, match="too few steps"):
        figures(Trial("none-1", Mode.NONE), write_journal(tmp_path / "journal", [(1.0, progressed(2))]))


# --- what follows ---


def test_percentiles_are_values_that_were_seen() -> None:
    values = [float(each) for each in range(1, 201)]
    assert predict.percentile(values, 0.99) == 198.0
    assert predict.percentile([3.0, 1.0, 2.0], 0.99) == 3.0
    assert predict.percentile([5.0], 0.99) == 5.0


def trial(mode: Mode, every: int, seconds: float, *, steps: int = 100, blocked: float = 0.1) -> Figures:
    saves = steps // every if every else 0
    written = 0 if mode is Mode.MEMORY else saves
    return Figures(
        mode, every, steps, seconds, (blocked,) * saves, (0.4,) * written, (4000,) * written, recovery=0.2, steps_lost=3
    )


MEASURED = (
    trial(Mode.NONE, 0, 3.0, steps=10),
    trial(Mode.NONE, 0, 9.9),
    trial(Mode.NONE, 0, 10.0),
    trial(Mode.NONE, 0, 10.2),
    trial(Mode.SYNC, 1, 60.0),
    trial(Mode.SYNC, 10, 15.0),
    trial(Mode.ASYNC, 10, 11.0, blocked=0.2),
    trial(Mode.MEMORY, 10, 10.5, blocked=0.03),
)


def test_training_without_checkpoints_is_what_others_are_compared_with() -> None:
    base = predict.baseline(MEASURED)
    assert base.step == pytest.approx(0.1)
    assert base.spread == pytest.approx(0.03)
    assert base.trials == 3, "without the first, which is short, and slow with what is done once"
    assert predict.baseline(MEASURED[:1]).step == pytest.approx(0.3)
    assert predict.overhead(MEASURED[5], base) == pytest.approx(0.5)


def test_a_save_costs_what_it_makes_training_longer_and_at_least_the_time_that_it_blocks() -> None:
    base = predict.baseline(MEASURED)
    sync, async_, memory = (predict.costs(mode, MEASURED, base) for mode in (Mode.SYNC, Mode.ASYNC, Mode.MEMORY))
    assert sync is not None and async_ is not None and memory is not None
    assert sync.cost == pytest.approx(0.5), "100 saves took 50 s more, 10 saves 5 s"
    assert async_.slowdown == pytest.approx(0.1)
    assert async_.cost == pytest.approx(0.2), "it is known to have blocked for longer"
    assert (memory.blocked, memory.lag) == (0.03, 0.0), "it is durable nowhere"
    assert memory.cost == memory.slowdown == pytest.approx(0.05)
    assert predict.costs(Mode.SYNC, MEASURED[:4], base) is None


def test_a_copy_that_seems_to_cost_nothing_costs_the_time_that_it_blocks() -> None:
    faster = (*MEASURED[:4], trial(Mode.MEMORY, 10, 9.0, blocked=0.03))
    found = predict.costs(Mode.MEMORY, faster, predict.baseline(faster))
    assert found is not None and (found.slowdown, found.cost) == (0.0, 0.03)
    assert "memory only: every" in shown(results(trials=faster))


@pytest.mark.parametrize("mtbf", [600.0, 10_800.0, 86_400.0])
@pytest.mark.parametrize("cost", [0.05, 2.0, 30.0])
def test_no_other_interval_is_expected_to_lose_less(cost: float, mtbf: float) -> None:
    found = Costs(Mode.SYNC, cost, cost, lag=cost, recovery=1.0)
    advised = predict.advice(found, mtbf, step=0.1)
    assert advised.goodput >= max(goodput for _, goodput in advised.curve) - 0.002
    assert advised.goodput == pytest.approx(1 - advised.saving - advised.repeating - advised.recovering)
    loss = expected_loss(advised.interval, cost, cost, 1 / mtbf)
    assert (advised.saving, advised.repeating) == (loss.saving, loss.repeating)
    assert advised.steps * 0.1 + cost == pytest.approx(advised.interval, abs=0.05), "from save to save, that included"
    assert all(shorter < longer for (shorter, _), (longer, _) in pairwise(advised.curve))


def test_a_save_is_durable_before_the_next_one_begins() -> None:
    advised = predict.advice(Costs(Mode.ASYNC, 0.001, 0.0, lag=60.0, recovery=0.0), 3600.0, step=1.0)
    assert (advised.interval, advised.steps, advised.bound_by_lag) == (60.0, 60, True)
    assert min(interval for interval, _ in advised.curve) >= 60.0


def test_steps_are_those_between_two_saves() -> None:
    advised = predict.advice(Costs(Mode.SYNC, 100.0, 100.0, lag=100.0, recovery=0.0), 600.0, step=1.0)
    assert (round(advised.interval), advised.steps) == (383, 283)


def test_nothing_is_saved_more_often_than_every_step() -> None:
    advised = predict.advice(Costs(Mode.SYNC, 0.001, 0.0, lag=0.001, recovery=0.0), 3600.0, step=100.0)
    assert (advised.steps, advised.bound_by_lag) == (1, False)


# --- how it is shown ---


def results(**changes: object) -> Results:
    question = Question(
        config=Path("job.toml"),
        sets=(),
        model="2,000,000 parameters",
        modes=(Mode.SYNC, Mode.ASYNC),
        every=(1, 10, 500),
        epochs=False,
        steps=None,
        mtbf=10_800.0,
        mtbf_source="as given by --mtbf",
    )
    found = Results(question, "1 x 2 workers on this machine", "2 cores", 0.0, (0.5, 1.5))
    found.steps, found.size, found.raw, found.trials, found.not_reached = (
        100,
        4000,
        (16_000.0, 20_000.0),
        MEASURED,
        (500,),
    )
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def shown(found: Results) -> str:
    text = io.StringIO()
    report.show(found, Console(file=text, width=200))
    return text.getvalue()


def test_rows_have_overhead_rates_and_their_share_of_the_limit() -> None:
    none, often, seldom, *_ = report.rows(results())
    assert (none.training_seconds, none.overhead, none.note) == (pytest.approx(10.0), 0.0, "median of 3")
    assert (often.every, often.overhead, often.saves) == (1, pytest.approx(5.0), 100)
    assert (seldom.bytes_per_second, seldom.raw_share) == (pytest.approx(10_000.0), pytest.approx(0.5))
    assert (seldom.recovery_seconds, seldom.steps_lost) == (0.2, 3)


def test_what_was_not_measured_says_so() -> None:
    notes = [row.note for row in report.rows(results())]
    assert notes.count("a trial is shorter; --steps N") == 3, "one for each mode that was measured"


def test_epochs_are_shown_as_epochs() -> None:
    found = results(epoch_steps=10)
    rows = report.rows(replace(found, question=replace(found.question, epochs=True)))
    assert [(row.every, row.every_steps) for row in rows if row.every_steps == 10] == [(1, 10)] * 3


def test_the_text_has_the_number_of_samples_and_a_recommendation() -> None:
    text = shown(results(complete=True))
    assert "p99 is the longest of the saves where there are fewer than 100 of them (here 10 at least)" in text
    assert "3.0% between the slowest and the fastest" in text
    assert 'recommended: checkpoint.mode = "async", checkpoint.every = "' in text
    assert "interrupted" not in text


def test_what_is_chance_is_not_recommended() -> None:
    text = shown(results(trials=(*MEASURED, trial(Mode.NONE, 0, 12.3))))
    assert "no recommendation: runs without checkpoints differ by 24%" in text
    assert "recommended: " not in text and "asynchronous: every" in text
    assert report.as_dict(results())["noisy"] is False


def test_an_interrupted_bench_shows_what_there_is() -> None:
    assert "interrupted: this is what there is" in shown(results(trials=MEASURED[:5]))
    assert "no recommendation: nothing was saved" in shown(results(trials=MEASURED[:1]))
    assert shown(results(trials=())) == "nothing was measured\n"
    assert report.as_dict(results(trials=()))["rows"] == []


def test_csv_and_json_have_the_same_rows() -> None:
    found = results()
    lines = list(csv.DictReader(io.StringIO(report.as_csv(found))))
    document = orjson.loads(orjson.dumps(report.as_dict(found)))
    assert [line["mode"] for line in lines] == [row["mode"] for row in document["rows"]]
    assert [line["overhead"] for line in lines] == [
        "" if row["overhead"] is None else str(row["overhead"]) for row in document["rows"]
    ]
    assert [each["mode"] for each in document["recommendations"]] == ["async", "sync", "memory"]


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert report.plot(results(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


# --- the directory ---


def test_the_raw_limit_leaves_nothing_behind(tmp_path: Path) -> None:
    assert raw.measure(tmp_path, 2, 10_000) > 0
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        raw.measure(tmp_path / "missing", 1, 10)


def test_a_full_file_system_is_found_before_anything_is_trained(tmp_path: Path) -> None:
    check_room(tmp_path, 1)
    with pytest.raises(UnusableError, match="free space"):
        check_room(tmp_path, 1 << 60)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site, "_LONGEST_SECONDS", 0.01)


def test_a_file_system_that_has_become_slow_is_said_and_keeps_nothing(tmp_path: Path, short: None) -> None:
    with pytest.raises(UnusableError, match=r"writing 1 file of 1 MiB to .* as a measure takes longer than"):
        Local(1, 1).raw_rate(tmp_path, 1, 1 << 20)
    assert list(tmp_path.iterdir()) == []


def test_sigterm_while_the_raw_limit_is_measured_leaves_nothing(tmp_path: Path) -> None:
    def act() -> None:
        until = time.monotonic() + 60
        while not list(tmp_path.iterdir()) and time.monotonic() < until:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=act)
    with cli_bench._interruptible(), pytest.raises(KeyboardInterrupt):
        thread.start()
        Local(1, 2).raw_rate(tmp_path, 2, 256 << 20)
    thread.join()
    assert list(tmp_path.iterdir()) == []


def test_trials_count_also_where_the_raw_limit_cannot_be_measured(
    tmp_path: Path, short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trials themselves are made end to end elsewhere."""
    left = list(MEASURED)
    monkeypatch.setattr(campaign, "measure", lambda trial, *_: (left.pop(0), RunDirectory(tmp_path / trial.name)))
    monkeypatch.setattr(process, "end_descendants", lambda seconds: [])  # which might be another test's
    monkeypatch.setattr(campaign, "last_save", lambda run: LastSave(4000, 0.1, None))
    made = Campaign(replace(results().question, every=(1,), steps=100), Local(1, 1), tmp_path, Meter())
    made._root.mkdir()
    made.run()
    assert made.results.complete and len(made.results.trials) == 6
    assert made.results.raw == () and "takes longer" in made.results.notes[1]
    assert "the raw limit is not known" in shown(made.results)
    assert report.as_dict(made.results)["notes"] == list(made.results.notes)


# --- the command ---


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), UnusableError("a trial has ended")])
def test_what_was_measured_is_shown_whatever_ends_the_rest(
    error: Exception, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(self: Campaign) -> None:
        self.results.trials = MEASURED
        raise error

    monkeypatch.setattr(Campaign, "run", run)
    monkeypatch.setattr(process, "become_subreaper", lambda: None)  # this process has other tests to run
    code = main(["bench", "checkpoint-frequency", "--params", "20k", "--root", str(tmp_path), "--local"])
    said = capsys.readouterr()
    assert code == ExitCode.UNUSABLE
    assert "synchronous" in said.out and str(getattr(error, "strerror", error)) in said.err
    assert (next(tmp_path.glob("bench-*")) / "results.json").exists()


@pytest.mark.parametrize("terminal", [True, False])
def test_how_far_it_is_is_shown(terminal: bool) -> None:
    text = io.StringIO()
    with meter(Console(file=text, width=100, force_terminal=terminal)) as shown:
        shown.say("first, a run")
        shown.begin(100.0)
        shown.see("1/2 sync-1", 0.0)
        shown.see("1/2 sync-1", 1.0)
        shown.see("2/2 none-2", 40.0)
    said = text.getvalue()
    assert "first, a run" in said
    assert "2/2 none-2" in said
    assert terminal or said.splitlines()[1:] == ["1/2 sync-1, about 1m 40s to go", "2/2 none-2, about 1m 00s to go"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "what to train is not said"),
        (["job.toml", "--params", "2M"], "exclude each other"),
        (["--params", "many"], "not a number of parameters"),
        (["--params", "2M", "--every", "0"], "whole numbers"),
        (["--params", "2M", "--mtbf", "3"], "has no unit"),
        (["--params", "2M", "--mtbf", "0s"], "leave no time to train"),
        (["--params", "2M", "--mtbf", "3h", "--mtbf-of", "x"], "exclude each other"),
        (["--params", "2M", "--mtbf-of", "nothing"], "there is no run 'nothing'"),
        (["--params", "2M", "--set", "no.such=1"], "unknown section"),
        (["--params", "5"], "the smallest has 10000"),
        (["--params", "1M", "--every", "5,100", "--steps", "20"], "every 100 steps does not come about"),
        (["--params", "0"], "train.parameters = 0 is no whole number above 0"),
        (["--params", "2M", "--set", "train.bogus=1"], "train.bogus is none of its settings"),
        (["--params", "2M", "--set", "train.batch_size=0"], "train.batch_size = 0"),
        (["--params", "2M", "--set", "train.context=many"], "train.context = 'many'"),
        (["--params", "900000B"], "free space"),
        (["missing.toml"], "there is no such file"),
    ],
)
def test_mistakes_start_nothing_and_leave_nothing(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["bench", "checkpoint-frequency", *arguments, "--root", str(tmp_path)])
    said = capsys.readouterr().err
    if "train." in message or "smallest" in message:
        assert code == ExitCode.USAGE
    assert code in (ExitCode.USAGE, ExitCode.NOT_FOUND, ExitCode.UNUSABLE)
    assert message in said
    assert list(tmp_path.iterdir()) == []


def test_the_time_between_failures_of_a_run_is_what_its_status_says(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "one")
    run.prepare()
    rules = Rules(timing=Timing(0.5, 2.0, 5.0), minimum_nodes=1)
    run.status.write_bytes(orjson.dumps(status.snapshot(World(run=run.run_id()), rules, 0.0)))
    seconds, source = cli_bench._mtbf(tmp_path, None, "one", expected=1.0)
    assert seconds == pytest.approx(rules.saving.mtbf), "it has not trained, and believes what was expected"
    assert source.startswith("from one: 0 in 0.0 h of training")
    assert cli_bench._mtbf(tmp_path / "elsewhere", None, str(tmp_path / "one"), expected=1.0) == (seconds, source)
    assert cli_bench._mtbf(tmp_path, 5.0, None, expected=1.0)[0] == 5.0
    assert cli_bench._mtbf(tmp_path, None, None, expected=1.0)[0] == 1.0
