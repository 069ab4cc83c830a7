"""The names of things. Each is a type of its own, so that a rank is never passed where a step is meant."""

from typing import NewType

RunId = NewType("RunId", str)
"""Random, written once into `run.json`; two runs of the same name never share one."""

NodeId = NewType("NodeId", str)
"""The node's name as Slurm spells it (or `node1` … on a local cluster)."""

Incarnation = NewType("Incarnation", str)
"""Random id of one agent's life: a restarted node is never mistaken for the old one."""

Term = NewType("Term", int)
"""Number of a leadership; claimed by `link(2)` in the run directory, only grows."""

Generation = NewType("Generation", int)
"""Number of a membership round; only grows, also across requeues; fences everything that carries it."""

Rank = NewType("Rank", int)
LocalRank = NewType("LocalRank", int)

Step = NewType("Step", int)
"""Number of completed optimizer steps of the run: step 0 is the state before the first one."""
