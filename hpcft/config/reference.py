"""The reference of all configuration keys, printed from the model, so that it cannot disagree with it."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic.fields import FieldInfo

from hpcft.config.checking import sections_of
from hpcft.config.model import Config, kind_of
from hpcft.units import Written

_PREAMBLE = """\
# Configuration

<!-- Printed by `python -m hpcft.config > docs/configuration.md`: change hpcft/config/, not this page. -->

A run is configured by one TOML file. [`configs/demo.toml`](../configs/demo.toml) runs on one machine,
[`configs/train.toml`](../configs/train.toml) on a Slurm cluster; copy one of them and change what you need.
Only `run.name` and one of `job.module`, `job.script`, `job.command` are required:

```toml
[run]
name = "my-training"

[job]
script = "train.py"
```

## Overrides

Every key can be set without touching the file. A later one in this list wins:

1. the file,
2. a variable `HPCFT_SECTION__KEY`, in capital letters with two underscores between section and key:
   `HPCFT_CHECKPOINT__EVERY="100 steps"`,
3. `--set section.key=value` on the command line: `--set nodes.min=2 --set 'job.args=["--fast"]'`.

The value is read as TOML, and as plain text where it is not TOML or where the key holds text: text needs no quotes
of its own. A key of `[train]` is in lower case when it comes from a variable.

All mistakes are reported together, each with the file (or `--set`, or the variable), the key, the reason and the
nearest valid key. Nothing is started before they are gone; the exit code is 2.

## Values

| kind | written as |
|---|---|
| duration | number and unit in quotes: `"500ms"`, `"30s"`, `"5m"`, `"2h"`, `"1d"`, `"1.5h"` |
| size | number and unit in quotes: `"16MiB"`, `"1GiB"` (powers of 1024), `"4MB"` (powers of 1000), `"512B"` |
| how often | `"200 steps"`, a duration such as `"60s"`, `"auto"` or `"off"` |
| path | text; `~` is the home directory; the key says what a relative one is relative to |

Each node reads the file once, when a start of the run begins, and hands it to its agents and workers: editing it
changes nothing in a start that is under way. The next start, also one after a requeue, reads it again.

## Keys
"""

_TRAIN = """\
Free: whatever the training program wants to know. Numbers, text, true or false, and lists of them, which it finds
unchanged in `run.config`. No tables within. Nothing here is checked: only the program knows its keys.
"""


def markdown() -> str:
    """The text of docs/configuration.md."""
    parts = [_PREAMBLE]
    for section, keys in sections_of(Config).items():
        if keys is None:
            parts.append(f"### [{section}]\n\n{_TRAIN}")
            continue
        model = Config.model_fields[section].annotation
        rows = [(f"`{key}`", kind_of(field), _default(field), field.description) for key, field in keys.items()]
        header = ["| key | kind | default | meaning |", "|---|---|---|---|"]
        table = "\n".join([*header, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])
        parts.append(f"### [{section}]\n\n{model.__doc__ if model else ''}\n\n{table}\n")
    return "\n".join(parts)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if value is None:
        return "none"
    for mark in field.metadata:
        if isinstance(mark, Written):
            value = mark.text(value)
    if isinstance(value, Path):
        value = str(value)
    return f"`{json.dumps(value)}`"
