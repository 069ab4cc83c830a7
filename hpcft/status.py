"""What is going on, in one screen: the view of a world for `hpcft status`.

`snapshot` is what the leader writes to `status.json` about once a second and answers an operator with; its shape is
docs/status.schema.json. `render` turns it into text. Nothing here imports torch, pydantic or rich.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import orjson

from hpcft.cadence import plan, step_seconds
from hpcft.errors import UnusableError
from hpcft.events import Formation, Member, Verdict, WorkerReport
from hpcft.ids import Rank
from hpcft.policy import Rules, silence
from hpcft.rundir import STATUS_FRESH_SECONDS, RunDirectory
from hpcft.units import cadence_text, counted, human_duration, human_size
from hpcft.world import Incident, Node, Phase, World

SCHEMA = 1

SILENT_SECONDS = 10.0
"""A write that has made no progress for this long is worth a look at the file system."""

_SHOWN_INCIDENTS = 5


def snapshot(world: World, rules: Rules, now: float) -> dict[str, Any]:
    """The world as JSON; times in seconds, `now` on the run clock."""
    formation = world.formation
    members = formation.members if formation is not None else ()
    seconds = step_seconds(world, now)
    reported = {report.rank: report for node in world.reports for report in node.workers}
    total = world.total_steps
    lineage = world.checkpoints if world.verdict is None else world.standing
    return {
        "schema": SCHEMA,
        "run": world.run,
        "state": state(world),
        "reason": world.last_reason,
        "allocation": world.allocation,
        "start": world.starts,
        "term": world.term,
        "leader": world.leader,
        "generation": world.generation,
        "step": world.step,
        "total_steps": total,
        "loss": world.loss,
        "steps_per_second": None if seconds is None else 1 / seconds,
        "tokens_per_second": _tokens_per_second(reported.values(), sum(each.workers for each in members), seconds),
        "world_size": formation.world_size if formation is not None else 0,
        "restored": None if formation is None else restored(formation),
        "plain_command": not rules.saves,
        "nodes": [_node(node, _member(members, node), world, rules, now) for node in world.nodes],
        "workers": [
            {
                "rank": rank,
                "node": member.node,
                "pid": report.pid if (report := reported.get(Rank(rank))) is not None else None,
                "phase": report.phase if report is not None else None,
                # reports come once a second; what all ranks are known to have completed may be newer
                "step": max(report.step, world.step) if report is not None else None,
                "step_age_seconds": report.step_age if report is not None else None,
                "steps_per_second": report.steps_per_second if report is not None else None,
                "loss": report.loss if report is not None else None,
            }
            for member in members
            for rank in member.ranks()
        ],
        "incidents": [incident_as_dict(incident) for incident in world.incidents],
        "checkpoints": [{"step": each.step, "generation": each.generation} for each in lineage],
        "saving": _saving(world),
        "cadence": _cadence(world, rules, now) if rules.saves else None,
        # of a plain command's steps nothing is known, and so nothing of what it lost
        "goodput": world.goodput(now) if rules.saves else None,
        "seconds": asdict(world.accounts(now)) if rules.saves else None,
        "elapsed_seconds": now,
        "eta_seconds": None if total is None or seconds is None else max(0.0, (total - world.step) * seconds),
        "budget": [
            {
                "cause": budget.value,
                "used": sum(each.budget is budget and each.at > now - rules.window for each in world.spent),
                "limit": limit,
                "window_seconds": rules.window,
            }
            for budget, limit in rules.budgets
        ],
        "mirror": None,
        "warnings": list(_warnings(world)),
        "verdict": None if world.verdict is None else verdict_as_dict(world.verdict),
    }


def restored(formation: Formation) -> dict[str, Any] | None:
    """The state that a generation starts from; None: from the beginning."""
    if formation.restore is None:
        return None
    step, generation = formation.restore.step, formation.restore.generation
    return {"step": step, "generation": generation, "memory": bool(formation.memory)}


def verdict_as_dict(verdict: Verdict) -> dict[str, Any]:
    return {"outcome": verdict.outcome.value, "exit_code": verdict.exit_code, "reason": verdict.reason}


def _cadence(world: World, rules: Rules, now: float) -> dict[str, Any]:
    reckoned = plan(rules.saving, world, now)
    return {
        "every": cadence_text(reckoned.every),
        "interval_seconds": reckoned.interval,
        "blocked_seconds": reckoned.cost,
        "durable_seconds": reckoned.lag,
        "saves": reckoned.saves,
        "failures": reckoned.failures,
        "trained_seconds": reckoned.trained,
        "failures_per_hour": reckoned.rate * 3600,
        "expected_loss": reckoned.loss,
        "expected_mtbf_seconds": reckoned.mtbf,
        "best_interval_seconds": reckoned.best,
        "reason": reckoned.reason,
        "because": reckoned.because._asdict(),
    }


def state(world: World) -> str:
    """One word: gathering, forming, starting, training, recovering, leaving, or how it ended."""
    if world.verdict is not None:
        return world.verdict.outcome.value
    if world.phase is Phase.RUNNING:
        if world.failures or world.lost_members:
            return "recovering"
        return "training" if world.training_since is not None else "starting"
    if world.phase is Phase.FORMING and world.open_incident is not None:
        return "recovering"
    return world.phase.value


def _saving(world: World) -> dict[str, Any]:
    """What is being made of the state, beside what is durable."""
    skipped, held, safe = world.save_skipped, world.holdings.held, world.holdings.safe
    return {
        "held_step": None if held is None else held.snapshot.step,
        "safe_step": None if safe is None else safe.snapshot.step,
        "writing": [
            {
                "node": report.node,
                "rank": save.rank,
                "step": save.step,
                "seconds": save.seconds,
                "written_bytes": save.written,
                "size_bytes": save.size,
                "silent_seconds": save.silent,
            }
            for report in world.reports
            for save in report.saves
        ],
        "memory_bytes": {report.node: report.reserved for report in world.reports},
        "copy_blocked_seconds": median(world.copies) if world.copies else None,
        "skipped": world.skipped,
        "last_skipped": None if skipped is None else {"step": skipped[0], "reason": skipped[1]},
    }


def _warnings(world: World) -> Iterator[str]:
    for report in world.reports:
        if report.low_memory:
            yield f"{report.node}: {report.low_memory}"
        silent = [save for save in report.saves if save.silent > SILENT_SECONDS]
        if silent:
            ranks = ", ".join(str(save.rank) for save in silent)
            longest = max(save.silent for save in silent)
            yield (
                f"the checkpoint of step {silent[0].step} makes no progress on {report.node} (rank {ranks}) for "
                f"{human_duration(longest)}: does the file system answer there? Training goes on"
            )


def _tokens_per_second(reports: Iterable[WorkerReport], world_size: int, seconds: float | None) -> float | None:
    """Not before all ranks have reported: what some of them trained on is not what a step has."""
    tokens = [report.tokens for report in reports if report.tokens]  # a program that counts none has 0
    return sum(tokens) / seconds if tokens and len(tokens) == world_size and seconds else None


def _member(members: tuple[Member, ...], node: Node) -> Member | None:
    return next((each for each in members if (each.node, each.incarnation) == (node.id, node.incarnation)), None)


def _node(node: Node, member: Member | None, world: World, rules: Rules, now: float) -> dict[str, Any]:
    quiet = silence(node, now)
    if world.verdict is not None:
        health = "ended"
    elif not node.connected or node.workers_gone:
        health = "disconnected"
    elif quiet >= rules.timing.suspect:
        health = "suspect"
    else:
        health = "member" if member is not None else "spare"
    return {
        "node": node.id,
        "incarnation": node.incarnation,
        "address": node.address,
        "state": health,
        "ranks": list(member.ranks()) if member is not None else [],
        "heartbeat_age_seconds": quiet,
    }


def incident_as_dict(incident: Incident) -> dict[str, Any]:
    return {
        "number": incident.number,
        "cause": incident.cause,
        "culprit": incident.culprit,
        "decision": _decision(incident.decision),
        "reason": incident.decision,
        "detected_at": incident.detected_at,
        "downtime_seconds": incident.downtime,
        "steps_lost": incident.steps_lost,
        "generation": incident.generation,
        "step": incident.step,
        "times": incident.times,
        "budget": incident.budget.value if incident.budget is not None else None,
        "last_output": list(incident.tail),
    }


def _decision(sentence: str) -> str:
    """What was decided, without why; the why may be an exception's message, with any punctuation in it."""
    for marker in (": generation ", ": the job is requeued"):
        if marker in sentence:
            return sentence[sentence.rindex(marker) + 2 :]
    return sentence


# --- reading ---


def read(run: RunDirectory) -> dict[str, Any]:
    """The leader's last snapshot, with `live` and `age_seconds` added.

    Raises:
        UnusableError: the status file cannot be read; the message says why.
    """
    about = {"name": run.name, "directory": str(run.path.absolute())}
    try:
        found: dict[str, Any] = orjson.loads(run.status.read_bytes())
        age = max(0.0, time.time() - run.status.stat().st_mtime)
    except FileNotFoundError:
        nothing = {"schema": SCHEMA, "run": run.run_id(), "state": "not started", "live": False, "age_seconds": None}
        return {**about, **nothing}
    except (OSError, ValueError) as error:
        raise UnusableError(f"{run.status} cannot be read: {error}", "try again in a second") from error
    ended = found.get("verdict") is not None
    live = not ended and age < STATUS_FRESH_SECONDS
    return {**about, **found, "live": live, "age_seconds": age}


def render(status: Mapping[str, Any], width: int = 100) -> str:
    """One screen of text. Sentences and ranks are wrapped; whatever else does not fit is cut."""
    return "\n".join(line[:width].rstrip() for line in _lines(status, width))


def wrapped(text: str, width: int, indent: int, hang: int = 0) -> list[str]:
    """Lines of a text for a screen; all but the first begin `hang` further to the right."""
    first, rest = " " * indent, " " * (indent + hang)
    return textwrap.wrap(text, max(width, 40), initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


def headline(status: Mapping[str, Any]) -> str:
    """The run and its state."""
    name = status.get("name", status["run"])
    return f"{name}: {status['state']}" + ("" if status.get("live", True) else _silence_of(status))


def _lines(status: Mapping[str, Any], width: int) -> Iterator[str]:
    yield headline(status)
    if status["state"] == "not started":
        return
    if status["reason"]:
        yield from wrapped(status["reason"], width, 2)
    for warning in status["warnings"]:
        yield from wrapped(f"warning: {warning}", width, 2)
    yield ""
    plain = status.get("plain_command", False)  # of its steps, and what it saves, nothing is known
    if not plain:
        yield f"  step        {_progress(status)}"
    if status["loss"] is not None:
        yield f"  loss        {status['loss']:.4f}"
    nodes = len({worker["node"] for worker in status["workers"]})
    yield (
        f"  world       {counted(status['world_size'], 'rank')} on {counted(nodes, 'node')}, "
        f"generation {status['generation']}, start {status['start']}, leader {status['leader']}"
    )
    elapsed = human_duration(status["elapsed_seconds"])
    if plain:
        yield f"  elapsed     {elapsed}"
    else:
        yield f"  goodput     {goodput(status)}"
        steps = [str(each["step"]) for each in status["checkpoints"]]
        yield f"  checkpoints {', '.join(steps[-6:]) or 'none yet'}{_saves(status)}"
        yield from cadence_lines(status, width)
        if status.get("mirror") is not None:  # nor does an earlier version's file
            yield f"  mirror      {_mirror(status['mirror'])}"
    budgets = [f"{each['cause']} {each['used']}/{each['limit']}" for each in status["budget"]]
    yield f"  budget      {', '.join(budgets)} used"
    yield from _node_lines(status, width)
    yield from _incident_lines(status, width)


def cadence_lines(status: Mapping[str, Any], width: int) -> Iterator[str]:
    """How often is saved, and why; nothing for a plain command, and where an earlier version's file does not say it."""
    cadence = status.get("cadence")
    if cadence is not None:
        first, *rest = wrapped(cadence["reason"], width, 14)
        yield f"  saves       {first.lstrip()}"
        yield from rest


def goodput(status: Mapping[str, Any]) -> str:
    """Its share of the time, and where the rest has gone."""
    elapsed = human_duration(status["elapsed_seconds"])
    if status["goodput"] is None:
        return f"unknown, {elapsed} in all"
    seconds = status.get("seconds") or {}  # an earlier version's file does not say it
    lost = [("repeated steps", "repeated"), ("recovery", "recovery"), ("start-up and leaving", "other")]
    rest = ", ".join(f"{name} {human_duration(seconds[key])}" for name, key in lost if seconds.get(key, 0.0) >= 0.05)
    return f"{status['goodput']:.1%} of {elapsed}" + (f" ({rest})" if rest else "")


def _saves(status: Mapping[str, Any]) -> str:
    saving = status.get("saving")  # an earlier version's file does not say it
    if saving is None:
        return ""
    parts = []
    for step in sorted({each["step"] for each in saving["writing"]}):
        ranks = [each for each in saving["writing"] if each["step"] == step]
        written, size = (sum(each[key] for each in ranks) for key in ("written_bytes", "size_bytes"))
        since = max(each["seconds"] for each in ranks)
        parts.append(f"{step} being written ({human_size(written)} of {human_size(size)}, {human_duration(since)})")
    if saving["skipped"]:
        parts.append(f"{saving['skipped']} left out: earlier ones were still being written")
    if memory := max(saving["memory_bytes"].values(), default=0):
        parts.append(f"{human_size(memory)} of memory on a node")
    if copying := saving.get("copy_blocked_seconds"):
        parts.append(f"a copy in memory stops training for {human_duration(copying)}")
    return "".join(f"; {part}" for part in parts)


def _mirror(mirror: Mapping[str, Any]) -> str:
    upto = "nothing yet" if mirror["mirrored"] is None else f"up to step {mirror['mirrored']}"
    if mirror["uploading"] is None:
        return upto
    return f"{upto}; {mirror['uploading']} is under way, {human_size(mirror['bytes_left'])} to go"


def _silence_of(status: Mapping[str, Any]) -> str:
    if status.get("verdict") is not None or status.get("age_seconds") is None:
        return ""
    return f" (but its leader has been silent for {human_duration(status['age_seconds'])})"


def _is_current(status: Mapping[str, Any]) -> bool:
    """Whether what passes with time is still true: not of a run that has ended, or whose leader has been silent."""
    return status["verdict"] is None and bool(status.get("live", True))


def _progress(status: Mapping[str, Any]) -> str:
    parts = [str(status["step"])]
    if status["total_steps"] is not None:
        parts[0] += f" of {status['total_steps']}"
    if status["steps_per_second"] is not None:
        parts.append(f"{status['steps_per_second']:.1f} steps/s")
    if status["tokens_per_second"] is not None:
        parts.append(f"{status['tokens_per_second']:.0f} tokens/s")
    if status["eta_seconds"] is not None and _is_current(status):
        parts.append(f"done in {human_duration(status['eta_seconds'])}")
    return ", ".join(parts)


def _node_lines(status: Mapping[str, Any], width: int) -> Iterator[str]:
    if not status["nodes"]:
        return
    yield ""
    plain = status.get("plain_command", False)
    name = max(14, 2 + max(len(node["node"]) for node in status["nodes"]))
    yield f"  {'NODE':<{name}}{'STATE':<14}{'HEARTBEAT':>10}  {'RANKS' if plain else 'RANKS (step, steps/s)'}"
    workers = {worker["rank"]: worker for worker in status["workers"]}
    for node in status["nodes"]:
        age = f"{node['heartbeat_age_seconds']:.1f} s" if _is_current(status) else "-"
        before = f"  {node['node']:<{name}}{node['state']:<14}{age:>10}  "
        ranks = [_rank(workers[rank], plain) for rank in node["ranks"] if rank in workers]
        for row in _rows(ranks, width - len(before)):
            yield before + row
            before = " " * len(before)


def _rows(cells: Sequence[str], width: int) -> Iterator[str]:
    row = ""
    for cell in cells:
        if row and len(row) + 2 + len(cell) > width:
            yield row
            row = ""
        row += f"  {cell}" if row else cell
    yield row or "-"


def _rank(worker: Mapping[str, Any], plain: bool) -> str:
    if worker["step"] is None:
        return f"{worker['rank']} (starting)"
    if plain:
        return str(worker["rank"])
    rate = "" if worker["steps_per_second"] is None else f", {worker['steps_per_second']:.1f}"
    return f"{worker['rank']} ({worker['step']}{rate})"


def _incident_lines(status: Mapping[str, Any], width: int) -> Iterator[str]:
    if not status["incidents"]:
        return
    yield ""
    earlier = len(status["incidents"]) - _SHOWN_INCIDENTS
    yield "  INCIDENTS" + (f" ({earlier} earlier: hpcft status --json)" if earlier > 0 else "")
    for incident in status["incidents"][-_SHOWN_INCIDENTS:]:
        cost = cost_of(incident, ended=status["verdict"] is not None)
        yield from wrapped(f"{title_of(incident)} ({cost})", width, 2, hang=3)
        if incident["reason"]:
            yield from wrapped(incident["reason"], width, 5)
        if status.get("plain_command") and incident["last_output"]:  # nobody else says what went wrong
            yield f"     its last line: {incident['last_output'][-1]}"


def title_of(incident: Mapping[str, Any]) -> str:
    return f"#{incident['number']} {incident['cause']}: {incident['culprit']}"


def cost_of(incident: Mapping[str, Any], *, ended: bool) -> str:
    """In time and steps; `ended`: nothing can come after it any more."""
    down, lost = incident["downtime_seconds"], incident["steps_lost"]
    if down is None:
        cost = "not recovered" if ended else "not over yet"
    elif not down and not lost:
        cost = "training went on"
    else:
        cost = f"{down:.2f} s down" + (f", {counted(lost, 'step')} lost" if lost is not None else "")
    times = incident.get("times", 1)  # an earlier version's file does not say it
    return f"{times} times, the latest; {cost}" if times > 1 else cost
