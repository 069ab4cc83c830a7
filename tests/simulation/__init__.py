"""The shipped pure core under a simulated clock, network, disk and Slurm.

Theory of operation
-------------------
One priority queue holds everything that is going to happen (`clock`). Machines have clocks of their own that drift,
can lose power, freeze, or have only their agent stopped (`machine`); connections are FIFO with random delays, hold
what is sent across a cut, and tell of an end only when the kernel could know of it (`network`). On top run the loops
of `agent.py` and `leader.py`, retold without asyncio around the *unpatched* `Membership`, `apply`, `decide`,
`takes_effect`, `may_lead` and `may_claim` (`agent`, `leader`). `cluster` puts it together, injects faults, and
watches the invariants at every instant at which they could break.

What the simulation takes for granted, and the shipped core therefore needs:
- killing takes less time than the margin between lease and time-out (`Timing.lease`), clocks drift by one per cent;
- Slurm starts a run again only after it has ended the agent that led it; other processes of the earlier start may
  outlive it on machines that Slurm could not reach.
"""
