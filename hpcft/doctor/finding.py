"""What doctor says of one thing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from hpcft.errors import ExitCode

Grade = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    grade: Grade
    subject: str
    detail: str
    advice: str = ""
    """What to do; empty only where nothing has to be done."""

    def text(self) -> str:
        advice = f"\n{'':19}{self.advice}" if self.advice else ""
        return f"{self.subject:<12} {self.detail}{advice}"


def exit_code(findings: Iterable[Finding]) -> ExitCode:
    return ExitCode.UNUSABLE if any(each.grade == "fail" for each in findings) else ExitCode.OK


def as_dict(findings: Sequence[Finding]) -> dict[str, Any]:
    grades = [each.grade for each in findings]
    worst = next((grade for grade in ("fail", "warn") if grade in grades), "ok")
    return {"grade": worst, "findings": [asdict(each) for each in findings]}
