"""Prints the phases of a start, as hpcft/world.py has them, into docs/architecture.md, between two markers.

A test compares the two, so that the picture is the code's.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from hpcft.world import TRANSITIONS, Phase

PAGE = Path(__file__).resolve().parent.parent / "docs" / "architecture.md"
BEGIN = "<!-- state diagram: printed by `make docs` from hpcft/world.py; do not change it here -->\n"
END = "<!-- end of the state diagram -->\n"


def diagram() -> str:
    """Phases in the order of their definition; several actions may share an arrow."""
    lines = [f"    [*] --> {next(iter(Phase))}: a term begins"]
    for origin in Phase:
        for target in Phase:
            actions = [
                str(next(field.default for field in fields(action) if field.name == "action"))
                for action, (origins, leads_to) in TRANSITIONS.items()
                if origin in origins and leads_to is target
            ]
            if actions:
                lines.append(f"    {origin} --> {target}: {', '.join(actions)}")
    lines.append(f"    {Phase.ENDED} --> [*]: verdict")
    return "\n".join(["```mermaid", "stateDiagram-v2", *lines, "```", ""])


def renewed(page: str) -> str:
    """The page with the diagram of today."""
    before, begins, rest = page.partition(BEGIN)
    _, ends, after = rest.partition(END)
    if not (begins and ends):
        raise ValueError(f"{PAGE.name} has lost the markers of its state diagram")
    return f"{before}{BEGIN}{diagram()}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text()))
