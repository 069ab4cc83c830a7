"""The worker side: what user code imports. The only code, with the checkpoint package, that touches tensors.

`run` is what a user sees. Below it: `spec` (what the agent says at the start), `link` (page and channel to the agent),
`group` (one process group per generation), `alone` (what is said where there is no agent), `replicas` (DDP with pinned
buckets), `randomness`, `restoring`, `saving`, and `report` (the last words of a worker that fails). Nothing is imported
here, so that `report` needs no torch.
"""
