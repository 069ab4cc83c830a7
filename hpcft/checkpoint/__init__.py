"""Checkpoints: what they look like on disk, how they become durable, and how they are read again.

`layout` names everything, `pieces` says which rank writes what, `image` is the file a rank writes, `manifest` what
makes a directory a checkpoint. `tree`, `write` and `load` touch tensors (and import torch); `commit`, `read`,
`marks` and `retention` never do. The format is described in docs/checkpoint-format.md.
"""
