"""`hpcft explain`: every scenario told, single matters in their words, and the command on a journal."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jsonschema
import orjson
import pytest
import test_scenarios
from worlds import at_step, began, committed, failed, formation, joined, proposed, ready

from hpcft import events as ev
from hpcft import explanation, status, wire
from hpcft.cadence import SaveRules
from hpcft.cli import main
from hpcft.errors import ExitCode
from hpcft.explanation import Kind, Paragraph, explain
from hpcft.ids import Generation, Incarnation, NodeId, Step
from hpcft.journal import Record, is_journaled, replay
from hpcft.membership import Timing
from hpcft.policy import Rules
from hpcft.rundir import RunDirectory
from hpcft.units import Auto
from hpcft.world import Save, World

SCHEMA = json.loads((Path(__file__).resolve().parents[2] / "docs" / "explain.schema.json").read_text())
BEGAN = datetime(2026, 1, 1, 3, 0, tzinfo=UTC)


def record(at: float, event: ev.Event) -> Record:
    return Record(at, BEGAN + timedelta(seconds=at), event)


def records(*happened: tuple[float, ev.Event]) -> list[Record]:
    return [record(at, event) for at, event in happened]


def told(paragraphs: Iterable[Paragraph], width: int = 1000) -> str:
    """Without the times of day, which depend on where this runs."""
    lines = [line for each in paragraphs for line in each.lines(width)]
    assert all(len(line) <= width for line in lines)
    return "\n".join(line[23:] if line.startswith("  2") else line.strip() for line in lines)


# --- every scenario ---


@pytest.fixture
def scenario(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Record]:
    """What a leader would have journaled of tests/scenarios/<name>.txt."""
    journal: list[Record] = []
    apply = test_scenarios.apply

    def see(world: World, event: ev.Event, now: float) -> World:
        if is_journaled(event):
            journal.append(record(now, event))
        return apply(world, event, now)

    monkeypatch.setattr(test_scenarios, "apply", see)
    (path,) = [each for each in test_scenarios.SCENARIOS if each.stem == request.param]
    test_scenarios.play(path.read_text())
    return journal


@pytest.mark.parametrize("scenario", [each.stem for each in test_scenarios.SCENARIOS], indirect=True)
def test_each_decision_and_each_incident_is_told_once_and_in_order(scenario: list[Record]) -> None:
    found = explain(scenario)
    decided = [(each.at, each.event.reason) for each in scenario if isinstance(each.event, ev.Decided)]
    mine = [(each.at, each.reason) for one in found if one.kind is not Kind.NOTICE for each in one.decisions]
    assert sorted(mine) == sorted(decided)
    numbers = [each.incident["number"] for each in found if each.incident is not None]
    assert sorted(numbers) == list(range(1, len(numbers) + 1))
    assert [each.at for each in found] == sorted(each.at for each in found)
    assert sum(each.kind is Kind.START for each in found) == found[-1].start
    assert told(found, width=100)
    everything = status.snapshot(World(), RULES, 0.0) | {"name": "demo", "directory": "/runs/demo"}
    jsonschema.Draft202012Validator(SCHEMA).validate(
        json.loads(json.dumps(explanation.History(everything, found).as_dict()))
    )


@pytest.mark.parametrize("scenario", ["copies_outlive_a_node"], indirect=True)
def test_a_lost_node_from_its_loss_to_the_smaller_world(scenario: list[Record]) -> None:
    start, failure = explain(scenario)
    assert told([start, failure]).splitlines() == [
        "start 1: 17.0",
        "seen      3 nodes in the allocation; node1 leads (term 1)",
        "decided   after 200ms: 3 nodes are ready: generation 1 with 3 nodes and 6 ranks, from the beginning",
        "cost      training began after 2s",
        "#1 node lost: node3 is gone: all its processes have ended",
        "decided   node3 was lost: generation 2 with 2 nodes and 4 ranks, from the copy of step 30 in memory "
        "(node3's from node1)",
        "world     4 ranks on 2 nodes, before it 6 ranks on 3 nodes",
        "cost      1.00 s down, 10 steps lost (workers started after 400ms); it counts as a failure of infrastructure",
    ]
    assert failure.restored == {"step": 30, "generation": 1, "memory": True}
    assert (failure.seconds, failure.steps) == (pytest.approx(1.0), 10)


@pytest.mark.parametrize("scenario", ["below_minimum"], indirect=True)
def test_what_could_not_be_recovered_goes_on_in_the_next_start(scenario: list[Record]) -> None:
    first, failure, end, second = explain(scenario)
    assert (first.start, failure.start, end.start, second.start) == (1, 1, 1, 2)
    assert [each.actions for each in failure.decisions] == [("evict",), ("requeue",)]
    assert end.title == "requeued (exit code 75): node2 was lost; 1 node left, nodes.min is 2.0"
    assert end.cost.startswith("step 30; goodput 90.2% of 26.5s")
    assert second.restored == {"step": 30, "generation": 1, "memory": False}
    assert "seen      the newest checkpoint of its lineage is of step 30" in told([second])


@pytest.mark.parametrize("scenario", ["way_to_leader_broken"], indirect=True)
def test_a_silence_belongs_to_the_loss_that_it_leads_to(scenario: list[Record]) -> None:
    _, failure = explain(scenario)
    rows = told([failure]).splitlines()[1:5]
    assert [row.partition(" ")[0] for row in rows] == ["decided", "seen", "seen", "decided"]
    assert rows[0].endswith("node2 has been silent for 2s: node3 is asked about it")
    assert rows[1].endswith("after 300ms: node2 answers node3: the way between it and the leader is broken")


@pytest.mark.parametrize("scenario", ["silence_passes"], indirect=True)
def test_a_silence_that_passes_interrupted_nothing(scenario: list[Record]) -> None:
    _, once, silence = explain(scenario)
    assert once.title == silence.title == "node2 has been silent for 2s: node3 is asked about it"
    assert (silence.kind, silence.cost) == (Kind.NODE, "")
    gone = ev.Decided(
        (ev.Evict(NodeId("node2"), Incarnation("node2/1")),), "node2 is gone: all its processes have ended"
    )
    _, _, silence, failure = explain([*scenario, record(3600.0, gone)])
    assert [each.what for each in silence.seen][-1] == "node2 trains on: step 60"
    assert (failure.kind, failure.at) == (Kind.FAILURE, 3600.0), "what happens an hour later has nothing to do with it"


@pytest.mark.parametrize("scenario", ["time_limit"], indirect=True)
def test_leaving_has_what_was_asked_and_what_came_of_it(scenario: list[Record]) -> None:
    _, leaving, end = explain(scenario)
    assert told([leaving, end]).splitlines()[:6] == [
        "the run is to leave: time limit, 1m 30s left",
        "decided   time limit: a last checkpoint is made (1m 30s left for it)",
        "decided   after 1.4s: time limit; saved at step 33: the job is requeued",
        "seen      after 2s: Slurm requeues the job",
        "cost      it ended after 2s",
        "requeued (exit code 75): time limit; saved at step 33",
    ]


# --- what no scenario has ---


def trained(step: int = 10) -> list[Record]:
    """Two nodes with two ranks each have completed `step` after two seconds."""
    formed = formation("ab", 1)
    return records(
        (1.0, replace(began(), leaderless=1.0)),
        (1.0, ev.CheckpointsFound(())),
        (1.0, joined("a")),
        (1.0, joined("b")),
        (1.0, proposed(formed)),
        (1.0, committed(1)),
        (2.0, ready("a")),
        (2.0, ready("b")),
        (3.0, at_step("a", step)),
        (3.0, at_step("b", step)),
    )


def skipped(step: int) -> ev.CheckpointSkipped:
    return ev.CheckpointSkipped(Step(step), Generation(1), "the copies of earlier saves are still being written")


def test_a_start_has_begun_when_its_nodes_were_there() -> None:
    (start,) = explain(trained())
    assert (start.at, start.wall, start.seconds) == (0.0, BEGAN, 2.0)


def test_saves_that_were_left_out_one_after_the_other_are_one_matter() -> None:
    durable = ev.CheckpointCommitted(ev.CheckpointRef(Step(10), Generation(1)), 0.1, 1000)
    happened = records(
        (4.0, skipped(12)), (5.0, durable), (5.5, skipped(14)), (6.0, skipped(16)), (7.0, failed("a", 0, step=17)),
        (7.0, proposed(formation("ab", 2))), (8.0, replace(skipped(18), generation=Generation(2))),
    )  # fmt: skip
    _, one, _, other = explain([*trained(), *happened])
    assert told([one]).splitlines() == [
        "3 saves left out, of steps 12 to 16",
        "seen      after 2s: the copies of earlier saves are still being written",
        "cost      training went on; a failure then would have gone back to the checkpoint of step 10, or to a newer "
        "copy in memory",
    ]
    assert (one.steps, other.title) == (3, "1 save left out, of step 18")


def test_of_many_ranks_that_fail_at_once_a_few_are_named() -> None:
    names = "abcdef"
    formed = formation(names, 1)
    before = records(
        (0.0, began(names)), *((0.0, joined(name)) for name in names), (0.0, proposed(formed)), (0.0, committed(1)),
        *((1.0, ready(name)) for name in names), *((2.0, at_step(name, 5)) for name in names),
    )  # fmt: skip
    happened = [record(3.0, failed(name, 2 * number, step=5)) for number, name in enumerate(names)]
    _, failure = explain([*before, *happened])
    assert failure.title == "#1 worker failed: rank 0 on a: killed by SIGKILL"
    assert [each.what for each in failure.seen] == [
        "rank 2 on b: killed by SIGKILL",
        "rank 4 on c: killed by SIGKILL",
        "rank 6 on d: killed by SIGKILL",
        "2 more ranks failed",
    ]
    assert failure.cost == "not over yet; it counts as a failure of infrastructure"


def test_of_a_plain_command_no_steps_are_told() -> None:
    verdict = ev.Verdict(ev.Outcome.FINISHED, 0, "the command has ended on all ranks, with status 0")
    plain = [record(2.0, replace(ready(name), counts_steps=False)) for name in "ab"]
    over = record(9.0, ev.Decided((ev.Conclude(verdict),), verdict.reason))
    *_, end = explain([*trained()[:6], *plain, over])
    assert (end.cost, end.steps, end.seconds) == ("9s in all, 0 incidents", None, 9.0)


def test_a_checkpoint_that_fails_in_a_recovery_is_part_of_it() -> None:
    happened = records(
        (4.0, failed("a", 0, step=10)),
        (4.0, ev.CheckpointFailed(Step(10), Generation(1), "no space left on device")),
    )
    _, failure = explain([*trained(), *happened])
    assert [each.what for each in failure.seen] == ["the checkpoint of step 10 failed: no space left on device"]


# --- the command ---

RULES = Rules(timing=Timing(0.5, 2.0, 5.0), minimum_nodes=1, saving=SaveRules(Auto(), mtbf=3600.0, shortest=1.0))


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """One that has lost a worker and goes on."""
    run = RunDirectory(tmp_path / "runs" / "demo")
    run.prepare()
    happened = [*trained(), record(4.0, failed("a", 0, step=10)), record(4.0, proposed(formation("ab", 2)))]
    lines: list[object] = [{"predecessor": None, "replayed": 0, "term": 1, "format": 1}]
    lines += [{"at": each.at, "wall": each.wall.isoformat(), "event": wire.encode(each.event)} for each in happened]
    path = run.journal / "term-000001-g0000-a.jsonl"
    path.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    world = replace(replay(run.journal).world, saves=(Save(2.0, 5.0),))
    run.status.write_bytes(orjson.dumps(status.snapshot(world, RULES, 4.0)))
    return run


def shown(run: RunDirectory, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["explain", str(run.path), *options]) == ExitCode.OK
    return capsys.readouterr().out


def test_text_and_json_tell_the_same(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    text, document = shown(run, capsys), json.loads(shown(run, capsys, "--json"))
    jsonschema.Draft202012Validator(SCHEMA).validate(document)
    assert text.startswith("demo: recovering\n")
    assert [each["kind"] for each in document["paragraphs"]] == ["start", "failure"]
    for each in document["paragraphs"]:
        assert each["title"] in text and each["cost"] in text
    assert text.index("#1 worker failed") < text.index("how often is saved")


def test_the_cadence_is_told_in_its_own_words(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    cadence = status.read(run)["cadence"]
    because = cadence["because"]
    rows = shown(run, capsys).splitlines()[-6:]
    assert [row.split(maxsplit=1) for row in rows] == [[name, because[name]] for name in because]
    assert because["interval"] == "every 1m 26s", "√(2 · 2 · 1801), in the higher order"
    assert cadence["best_interval_seconds"] == cadence["interval_seconds"] == pytest.approx(85.55, abs=0.1)
    assert because["formula"].startswith("Young's formula, √(2 · 2s · 30m 01s)")
    assert because["formula"].endswith("every 1m 26s would lose the least time")
    assert because["cost"] == "a save stops training for 2s and is durable after 5s (median of 1)"
    assert because["failures"] == "1 failure in 2s of training"
    assert because["prior"] == (
        "one in 1h 00m expected beforehand (checkpoint.mtbf); this and what was seen make one in 30m 01s"
    )
    assert because["expected"].endswith("saving and 2.7% repeating steps")


def test_what_an_earlier_version_left_of_the_cadence_is_one_sentence(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshot: dict[str, Any] = orjson.loads(run.status.read_bytes())
    del snapshot["cadence"]["because"]
    run.status.write_bytes(orjson.dumps(snapshot))
    assert shown(run, capsys).splitlines()[-1].split(maxsplit=1) == ["interval", snapshot["cadence"]["reason"]]


def test_only_the_last_matters(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(run, capsys, "--last", "1")
    assert "start 1" not in text and "#1 worker failed" in text and "  1 earlier\n" in text
    document = json.loads(shown(run, capsys, "--last", "0", "--json"))
    assert (document["paragraphs"], document["earlier"]) == ([], 2)
    assert "earlier" not in shown(run, capsys, "--last", "2")


def test_what_cannot_be_explained_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fresh = RunDirectory(tmp_path / "runs" / "fresh")
    fresh.prepare()
    assert shown(fresh, capsys) == "fresh: not started\n"
    assert main(["explain", "nosuch", "--root", str(tmp_path / "runs")]) == ExitCode.NOT_FOUND
    (fresh.journal / "term-000001-g0000-a.jsonl").write_bytes(b"nonsense\n")
    assert main(["explain", str(fresh.path)]) == ExitCode.DAMAGED
    assert "line 1, cannot be read" in capsys.readouterr().err


def test_a_node_that_held_no_rank_goes_without_an_incident() -> None:
    gone = ev.Decided((ev.Evict(NodeId("c"), joined("c").incarnation),), "c is gone: all its processes have ended")
    _, node = explain([*trained(), record(3.0, joined("c")), record(4.0, gone)])
    assert (node.kind, node.title) == (Kind.NODE, "c is gone: all its processes have ended")


def test_a_start_that_never_trained_says_so() -> None:
    ended = ev.Verdict(ev.Outcome.FAILED, 13, "the allocation has 2 nodes, nodes.min asks for 3")
    (waiting,) = explain(trained()[:4])
    assert (waiting.cost, waiting.seconds) == ("it does not train yet", None)
    start, end = explain([*trained()[:4], record(5.0, ev.Decided((ev.Conclude(ended),), ended.reason))])
    assert start.cost == "it did not train"
    assert end.title == f"failed (exit code 13): {ended.reason}"
    assert told([end]).count(ended.reason) == 1
