"""The configuration: read once, checked once, then frozen.

Theory of operation
-------------------
A run is described by one TOML file, by `HPCFT_SECTION__KEY` variables and by `--set section.key=value`; a later
one in this list wins. `load` merges them into one tree, remembers for every key where it came from, and checks the
whole of it, so that all mistakes are reported together: where, which key, why, and the valid key nearest to what
was written. Nobody reads a file or a variable for a setting after that: the keeper of a node hands `Config.to_json()`
to every agent that it starts.

`check_program` asks what the model cannot know: whether the training program is there and compiles; `check_torch`
whether this Python has what the program needs of it; `check_mirror` whether it can reach an object store.

pydantic takes about a tenth of a second to import: commands that have to answer at once import this package only
when they need it. `python -m hpcft.config` prints the reference of all keys.
"""

from hpcft.config.checking import ConfigError, Mistake
from hpcft.config.model import Config
from hpcft.config.preflight import check_mirror, check_program, check_torch
from hpcft.config.reading import load

__all__ = ["Config", "ConfigError", "Mistake", "check_mirror", "check_program", "check_torch", "load"]
