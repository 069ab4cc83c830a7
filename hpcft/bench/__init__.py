"""`hpcft bench`: what checkpoints cost on this machine or cluster, and how often they pay.

Theory of operation
-------------------
A *trial* is a real run (`hpcft run`, or `hpcft agent` on the nodes of the allocation) with one way of saving, which is
ended when it has trained long enough. Before that, one of its workers is killed. All trials train the same model for as
many steps; some save nothing, at the beginning, between the others and at the end, and are what the others are compared
with. What is measured is what the run itself has recorded in its journal: when which step was completed, for how long
each save stopped training, and when it was durable.

`plan` says which trials, `site` where they run, `measure` makes one, `campaign` all of them; `predict` says what
follows for the cadence, and `report` shows all this. `plan` and `predict` are pure.
"""
