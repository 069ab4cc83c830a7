"""When to make a checkpoint. Pure: what was measured comes in, a step goes out.

How often is a trade: a save costs time now, and a failure costs what was trained since the last one. `plan` weighs the
two from what the run itself has seen, for `checkpoint.every = "auto"` and for people; `last_save` says how long the
last save of a start may take.

`Saving` is the leader's side of an ordered save. The order reaches the ranks at different times, and some perhaps not,
while their connection is broken. For whom the step is over when it reads the order, it does not exist; whoever is to
stop there saves and then waits at that step (`worker.run`). So the leader goes on telling until it is settled: the same
step, where nobody has missed it; a later one, where somebody has; and at last that all may go.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Final, NamedTuple

from hpcft.ids import Generation, Step
from hpcft.units import Auto, Cadence, EverySeconds, EverySteps, Never, cadence_text, counted, human_duration
from hpcft.world import Phase, World

SAVE_LEAD_SECONDS = 0.6
"""An ordered save lies this far ahead, so that as a rule every rank has read the order before it comes."""
REPEAT_SECONDS = 2.0
"""An order is told again after this long: a connection may just have been broken, or a rank may have been late."""
LATEST_STEPS = 15
"""So many times are kept of the latest steps."""

UNMEASURED_SECONDS = 60.0
"""Nothing is known of what a save costs: the first one comes after this long, and is the measurement."""
END_LEAD_SECONDS = 120.0
"""So long before the time limit the last save begins where not enough was measured to reckon it."""
MEASURED_SAVES = 3
"""So many saves are enough for that."""
MEDIAN_FACTOR = 2.0
WORST_FACTOR = 1.25
"""The last save is given so many times what a usual one took, or the worst one, whichever is longer."""


# --- how often ---


@dataclass(frozen=True, slots=True)
class SaveRules:
    """What is configured. Seconds where not said otherwise."""

    every: Cadence = Never()
    mtbf: float = 21_600.0
    """Mean time between failures that is expected of the whole job, before any was seen."""
    shortest: float = 30.0
    longest: float = 3_600.0
    """Bounds of the interval that "auto" comes to."""


def failure_rate(mtbf: float, failures: int, trained: float) -> float:
    """Failures per second to be expected after `failures` in `trained` seconds of training.

    Failures are taken for a Poisson process of constant rate, and what is expected beforehand for a Gamma prior of
    shape 1 and rate `mtbf`: as if one failure had been seen in one `mtbf`. The posterior is Gamma(1 + failures,
    mtbf + trained), and this is its mean (Gelman et al., Bayesian Data Analysis, 3rd ed., section 2.6). So a run
    without failures believes its configuration first, and its own experience later; never that nothing can fail.
    """
    return (1 + failures) / (mtbf + trained)


def best_interval(cost: float, mtbf: float) -> float:
    """Seconds from the beginning of one save to that of the next that lose the least time.

    For `cost` seconds of each save, and failures that come as a Poisson process, `mtbf` seconds apart on average.
    Young (A first order approximation to the optimum checkpoint interval, CACM 17, 1974) gives √(2·cost·mtbf); this
    is the higher order of Daly (A higher order estimate of the optimum checkpoint interval for restart dumps, FGCS
    22, 2006), whose equation 37 leaves out the save itself. Where a save costs more than two mtbf, it is useless.
    """
    if cost >= 2 * mtbf:
        return mtbf + cost
    share = cost / (2 * mtbf)
    return math.sqrt(2 * cost * mtbf) * (1 + math.sqrt(share) / 3 + share / 9)


class Loss(NamedTuple):
    """Expected shares of the time."""

    saving: float
    """That saves take."""
    repeating: float
    """And that training spends on steps which a failure had undone."""


def expected_loss(interval: float, cost: float, lag: float, rate: float) -> Loss:
    """With `interval` seconds from save to save, each of which stops training for `cost` and is durable after `lag`,
    and `rate` failures per second: each is worth the time trained since the last save began that became durable."""
    return Loss(cost / max(interval, cost), rate * (interval / 2 + lag))


class Because(NamedTuple):
    """The reasons of a plan one by one, a sentence each; empty: there is nothing to say."""

    interval: str
    formula: str
    cost: str
    failures: str
    prior: str
    expected: str


@dataclass(frozen=True, slots=True)
class Plan:
    """How often is saved, and why. Seconds; None: not known yet."""

    every: Cadence
    interval: float | None
    """From save to save."""
    cost: float | None
    """For which training stands still at each: the median of the latest saves."""
    lag: float | None
    """From the beginning of a save until it is durable, likewise."""
    saves: int
    """How many these are."""
    failures: int
    """Which interrupted training, of all starts."""
    trained: float
    """In so many seconds of training."""
    rate: float
    """Failures expected per second of training."""
    saving: float | None
    """Expected share of the time that saves take,"""
    repeating: float | None
    """and that training spends on steps which a failure had undone."""
    mtbf: float
    """Between failures, as was expected before any was seen."""
    best: float | None
    """The interval that is expected to lose the least time, whatever bounds or configures the one that is kept to."""
    bound: str = ""
    """What keeps `interval` from being that, where it goes by what was measured."""

    @property
    def reason(self) -> str:
        """All of it in one sentence."""
        return _sentence(self)

    @property
    def because(self) -> Because:
        """The same one by one, with the formula."""
        return _because(self)

    @property
    def loss(self) -> float | None:
        return None if self.saving is None or self.repeating is None else min(1.0, self.saving + self.repeating)


def plan(rules: SaveRules, world: World, now: float) -> Plan:
    """What "auto" comes to at present, or what a configured cadence costs.

    Assumed: what a save takes and how often training fails is as it was, whatever number of nodes there was; the
    latest saves, of which the median is taken, follow a change of the world within a few of them, the failures slowly.
    A failure is worth the time trained since the last save began that became durable, wherever it strikes.
    """
    accounts = world.accounts(now)
    trained = accounts.kept + accounts.repeated
    failures = sum(incident.open or bool(incident.downtime) for incident in world.incidents)
    rate = failure_rate(rules.mtbf, failures, trained)
    cost = median(save.blocked for save in world.saves) if world.saves else None
    lag = median(save.lag for save in world.saves) if world.saves else None
    interval, bound = _interval(rules, cost, lag, rate, step_seconds(world, now))
    saving = repeating = None
    if interval is not None and cost is not None and lag is not None:
        saving, repeating = expected_loss(interval, cost, lag, rate)
    best = None if cost is None else best_interval(cost, 1 / rate)
    return Plan(
        rules.every,
        interval,
        cost,
        lag,
        len(world.saves),
        failures,
        trained,
        rate,
        saving,
        repeating,
        rules.mtbf,
        best,
        bound,
    )


def _interval(
    rules: SaveRules, cost: float | None, lag: float | None, rate: float, step: float | None
) -> tuple[float | None, str]:
    """And what has bounded it."""
    match rules.every:
        case EverySeconds(seconds):
            return seconds, ""
        case EverySteps(steps):
            return None if step is None else steps * step, ""
        case Never():
            return None, ""
        case Auto():
            pass
    if cost is None or lag is None:
        return min(max(UNMEASURED_SECONDS, rules.shortest), rules.longest), ""
    best = best_interval(cost, 1 / rate)
    interval = min(max(best, rules.shortest), rules.longest)
    bound = ""
    if interval != best:
        which = "longest that checkpoint.every_max" if interval < best else "shortest that checkpoint.every_min"
        bound = f", the {which} allows (best would be {human_duration(best)})"
    if interval < lag:  # one after the other: else they would be in each other's way
        return lag, f", for it takes {human_duration(lag)} until a save is durable"
    return interval, bound


def _how_often(plan: Plan) -> str:
    if isinstance(plan.every, Never):
        return "no checkpoint is made before the end, as configured"
    if not isinstance(plan.every, Auto):
        return f"every {cadence_text(plan.every)}, as configured"
    return f"every {human_duration(plan.interval)}{plan.bound}" if plan.interval else cadence_text(plan.every)


def _costs(plan: Plan) -> str:
    if plan.cost is None or plan.lag is None:
        first = ": the first one shows it" if isinstance(plan.every, Auto) else ""
        return f"what a save costs has not been measured yet{first}"
    return (
        f"a save stops training for {human_duration(plan.cost)} and is durable after {human_duration(plan.lag)} "
        f"(median of {plan.saves})"
    )


def _failures(plan: Plan) -> str:
    return f"{counted(plan.failures, 'failure')} in {human_duration(plan.trained)} of training"


def _prior(plan: Plan) -> str:
    return f"one in {human_duration(plan.mtbf)} expected beforehand"


def _posterior(plan: Plan) -> str:
    return f"make one in {human_duration(1 / plan.rate)}"


def _expected(plan: Plan) -> str:
    if plan.loss is None or plan.saving is None or plan.repeating is None:
        return ""
    return (
        f"{_share(plan.loss)} of the time is expected to be lost, {_share(plan.saving)} saving and "
        f"{_share(plan.repeating)} repeating steps"
    )


def _sentence(plan: Plan) -> str:
    how_often = _how_often(plan)
    if isinstance(plan.every, Never):
        return how_often
    if plan.cost is None or plan.lag is None:
        return f"{how_often}; {_costs(plan)}"
    expected = _expected(plan)
    numbers = f"{_costs(plan)}; {_failures(plan)}, and {_prior(plan)}, {_posterior(plan)}"
    return f"{how_often}: {numbers}" + (f"; so {expected}" if expected else "")


def _because(plan: Plan) -> Because:
    formula = "Young's formula, in Daly's higher order, waits for what a save costs"
    if plan.cost is not None and plan.best is not None:
        formula = (
            f"Young's formula, √(2 · {human_duration(plan.cost)} · {human_duration(1 / plan.rate)}) for what a save "
            "costs and the time between failures, in Daly's higher order: every "
            f"{human_duration(plan.best)} would lose the least time"
        )
    return Because(
        interval=_how_often(plan),
        formula=formula,
        cost=_costs(plan),
        failures=_failures(plan),
        prior=f"{_prior(plan)} (checkpoint.mtbf); this and what was seen {_posterior(plan)}",
        expected=_expected(plan),
    )


def _share(part: float) -> str:
    return f"{min(part, 1.0):.1%}" if part >= 0.001 else f"{part:.2%}"


def in_force(rules: SaveRules, world: World, now: float) -> Cadence:
    """What the leader keeps to: "auto" as the interval that it comes to at present."""
    if not isinstance(rules.every, Auto):
        return rules.every
    interval = plan(rules, world, now).interval
    assert interval is not None
    return EverySeconds(interval)


# --- which step ---


def due(every: Cadence, world: World, now: float, last_save: float) -> bool:
    """Whether a save that goes by the clock is due; `last_save` is the run clock at the last order."""
    return isinstance(every, EverySeconds) and now - last_save >= every.seconds


def step_seconds(world: World, now: float) -> float | None:
    """Mean seconds per step of the running generation, checkpoints included: what is left to train takes as long."""
    done = world.step - world.base_step
    if world.training_since is None or done <= 0:
        return None
    return (now - world.training_since) / done


@dataclass(frozen=True, slots=True)
class Pace:
    """How long each of the latest steps took, as the leader has seen them come."""

    generation: Generation = Generation(0)
    step: Step = Step(0)
    since: float | None = None
    """When `step` was completed; None before that is known."""
    recent: tuple[float, ...] = ()
    """Seconds for a step, the latest last. Of fast steps many come at a time: then it is their mean."""
    longest: float = 0.0
    """Seconds of the longest step of the generation, with what the program does besides (it evaluates, say) and the
    save in it, but without its first, in which programs are compiled. 0: there was none."""

    @property
    def seconds(self) -> float | None:
        """For a usual step: the few during which a checkpoint was written say nothing of the others."""
        return median(self.recent) if self.recent else None

    def seen(self, world: World, now: float) -> Pace:
        """After a look at the world."""
        if self.generation != world.generation or self.since is None or world.step < self.step:
            return Pace(world.generation, world.step, now if world.step > world.base_step else world.training_since)
        if world.step == self.step:
            return self
        took = (now - self.since) / (world.step - self.step)
        # of several at a time, one may have taken all of it
        longest = max(self.longest, now - self.since) if self.step > world.base_step else 0.0
        return Pace(self.generation, world.step, now, (*self.recent, took)[-LATEST_STEPS:], longest)


def meeting_step(world: World, pace: Pace, now: float, lead: float) -> Step:
    """The step at which all ranks are to save together: the next one that ends `lead` seconds from now or later.

    The lead is for the order's way to all ranks, and for what the leader does not know yet: its picture is a report
    old, and a rank can be a step ahead of another (each step ends with a collective), or a few, where a program runs
    ahead of its GPU. Who reads the order too late costs a repetition of it, nothing else (see `worker.run`).
    """
    reached = max((worker.step for node in world.reports for worker in node.workers), default=world.step)
    reached = max(world.step, reached)
    pace = pace.seen(world, now)
    if pace.seconds is None or pace.since is None:
        return Step(reached + 2)
    seconds = max(pace.seconds, 1e-4)
    left = max(0.0, seconds - (now - pace.since))  # of the step in progress
    return Step(reached + 1 + max(0, math.ceil((lead - left) / seconds)))


def missed(world: World, step: Step, *, stop: bool) -> bool:
    """Whether some rank has gone on from `step` without having saved it; asked as long as not all have reported that.

    Who is to stop there saves, and then waits. Else nobody gets beyond the next step before all have saved, or taken
    the copy that will be written: each step ends with a collective.
    """
    if not stop:
        return world.step > step
    return any(
        worker.step >= step and worker.phase not in ("checkpoint", "done")
        for node in world.reports
        for worker in node.workers
    )


def _in_hand(world: World, step: Step) -> bool:
    """Whether every node has taken the step, or says that copies of it by all its ranks are being sealed or written."""
    if world.formation is None:
        return False
    saving = {report.node: {save.rank for save in report.saves if save.step == step} for report in world.reports}
    taken = world.holdings.taken.get(step, {})
    members = world.formation.members
    return all(each.node in taken or saving.get(each.node, set()) >= set(each.ranks()) for each in members)


class Order(NamedTuple):
    """What all ranks are told: to save at a step, and perhaps to stop there."""

    step: Step
    stop: bool


LET_GO: Final = Order(Step(0), stop=True)
"""To those who have saved and wait at that step: all have, so end. Who does not wait takes no notice."""


@dataclass(frozen=True, slots=True)
class Saving:
    """The standing order of a generation, if there is one, and since when it stands."""

    order: Order | None = None
    told_at: float = 0.0
    """Run clock; before the first order, of the generation's beginning."""
    let_go: bool = False
    """The last save is settled, and its ranks are told to end."""

    def ordered(self, world: World, pace: Pace, now: float, *, stop: bool) -> Saving:
        """All ranks are to save together as soon as that can be."""
        return Saving(Order(meeting_step(world, pace, now, SAVE_LEAD_SECONDS), stop), now)

    def next(
        self, world: World, pace: Pace, now: float, every: Cadence, settled: Callable[[Step], bool]
    ) -> tuple[Saving, Order | None]:
        """After a look at the world: what stands from now on, and what is to be told.

        `settled` says of a step whether all ranks have reported its save, or one that it failed.
        """
        if world.formation is None or world.training_since is None:
            return self, None
        waited = now > self.told_at + REPEAT_SECONDS
        if self.order is None:
            if world.phase is Phase.RUNNING and due(every, world, now, self.told_at):
                return self._told(self.ordered(world, pace, now, stop=False))
            return self, None
        step, stop = self.order
        newest = world.restore.step if world.restore is not None else -1
        refused = world.save_failed[0] if world.save_failed is not None else -1
        left_out = world.save_skipped[0] if world.save_skipped is not None else -1
        if not stop:
            if max(newest, refused, left_out) >= step:
                return replace(self, order=None), None  # the cadence has its next turn
            if waited and missed(world, step, stop=False) and not (settled(step) or _in_hand(world, step)):
                return self._told(self.ordered(world, pace, now, stop=False))
            return self, None
        late = missed(world, step, stop=True)
        # nobody passes the last one, so a later one is not it
        if self.let_go or (step in (newest, refused) and not late):
            told = replace(self, let_go=True, told_at=now)
            return (told, LET_GO) if waited or not self.let_go else (self, None)
        if waited:
            return self._told(self.ordered(world, pace, now, stop=True) if late else replace(self, told_at=now))
        return self, None

    @staticmethod
    def _told(saving: Saving) -> tuple[Saving, Order | None]:
        return saving, saving.order


# --- copies in memory ---


@dataclass(frozen=True, slots=True)
class Copying:
    """Copies in memory that go by the clock. One that some rank has missed is given up: another follows soon."""

    told_at: float = 0.0
    """Run clock; before the first order, of the generation's beginning."""
    ordered: Step | None = None

    def next(
        self, world: World, pace: Pace, now: float, every: Cadence, *, saving: bool
    ) -> tuple[Copying, Step | None, Step | None]:
        """After a look at the world: what stands, the step to be copied if one is to be told, and one to be forgotten.

        While a save is ordered (`saving`) there is no room for another order, nor need: its copies are as good.
        """
        if world.phase is not Phase.RUNNING or world.training_since is None or saving:
            return self, None, None
        if not due(every, world, now, self.told_at):
            return self, None, None
        missed = self.ordered if self.ordered is not None and not world.taken(self.ordered) else None
        step = meeting_step(world, pace, now, SAVE_LEAD_SECONDS)
        return Copying(now, step), step, missed


# --- the last save of a start ---


@dataclass(frozen=True, slots=True)
class LastSave:
    """How many seconds the last save may take, from the order until it is durable, and how that was reckoned."""

    seconds: float
    why: str


def last_save(world: World, pace: Pace, now: float) -> LastSave | None:
    """None: too little was measured to say it.

    It consists of the order, which may have to be repeated; of the rest of the step in progress, at most the longest
    one that was seen; and of the save. A single one may be slower than any before: so it is given twice what a usual
    one takes, or a quarter more than the worst.
    """
    saves = [save.lag for save in world.saves]
    if len(saves) < MEASURED_SAVES or pace.generation != world.generation or not pace.longest or pace.since is None:
        return None
    usual, worst = median(saves), max(saves)
    step = max(pace.longest, now - pace.since)
    seconds = max(MEDIAN_FACTOR * usual, WORST_FACTOR * worst) + step + SAVE_LEAD_SECONDS + REPEAT_SECONDS
    return LastSave(
        seconds,
        f"it may take {human_duration(seconds)}: of {len(saves)} saves the usual one took {human_duration(usual)} and "
        f"the worst {human_duration(worst)}, and the longest step {human_duration(step)}",
    )
