"""The long campaigns, `make drills`: every seed and every moment, for hours; results go to docs/drills/<date>.md.

Three campaigns. `properties`: those of single modules, with thousands of random examples each. `simulation`: the
protocol under a simulated clock and network, with as many histories instead of the hundred of `make test`. `moments`:
the tests marked `drill`, real processes and a real Slurm cluster, at many more moments than `make test` has time for.
What failed is named with the example that reproduces it.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "drills"

CAMPAIGNS = {
    "properties": ["tests/unit", "-m", "not drill"],
    "simulation": ["tests/simulation", "-m", "not drill"],
    "moments": ["-m", "drill"],
}
TIMES = "50"
"""So many times the examples of `make test`, where HPCFT_SEARCH does not say otherwise (see tests/search.py)."""
_NOTHING_FOUND = 5
"""pytest's exit status when no test was selected."""


@dataclass(frozen=True, slots=True)
class Result:
    campaign: str
    tests: int
    failures: tuple[str, ...]
    seconds: float
    status: int

    @property
    def passed(self) -> bool:
        return not self.failures and self.status in (0, _NOTHING_FOUND)


def fly(campaign: str) -> Result:
    """Run one campaign, its output on this terminal."""
    with TemporaryDirectory() as name:
        report = Path(name, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-rfEs", "--timeout=0", f"--junitxml={report}"]
        began = time.monotonic()
        variables = {"HPCFT_SEARCH": TIMES, **os.environ}
        done = subprocess.run([*command, *CAMPAIGNS[campaign]], cwd=ROOT, env=variables, check=False)
        seconds = time.monotonic() - began
        cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    failures = tuple(
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    )
    skipped = sum(case.find("skipped") is not None for case in cases)
    return Result(campaign, len(cases) - skipped, failures, seconds, done.returncode)


def machine() -> str:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1024**3
    return f"{os.cpu_count()} cores, {memory:.0f} GiB, Linux {platform.release()}, Python {platform.python_version()}"


def commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def page(results: list[Result], day: str) -> Iterator[str]:
    yield f"# Drills of {day}\n"
    yield f"Commit {commit()}; {machine()}. Made by `make drills`.\n"
    yield "| campaign | tests | failed | minutes |"
    yield "|---|---|---|---|"
    for each in results:
        yield f"| {each.campaign} | {each.tests} | {len(each.failures)} | {each.seconds / 60:.1f} |"
    for each in results:
        if each.failures:
            yield f"\n## What failed in {each.campaign}\n"
            yield from (f"- `{failure}`" for failure in each.failures)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("campaign", nargs="*", choices=[*CAMPAIGNS, []], help="default: all")
    chosen = parser.parse_args().campaign or list(CAMPAIGNS)
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    results = []
    for campaign in chosen:
        print(f"\n== {campaign}", flush=True)
        results.append(fly(campaign))
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{day}.md"
    path.write_text("\n".join(page(results, day)) + "\n")
    print(f"\n{path.relative_to(ROOT)} has the results")
    return 0 if all(each.passed for each in results) else 1


if __name__ == "__main__":
    sys.exit(main())
