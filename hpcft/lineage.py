"""Which of the checkpoints on disk count: those that the run would go on from, the newest last."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from hpcft.checkpoint.layout import CheckpointDamagedError, CheckpointEntry, checkpoint_name, parse_name
from hpcft.checkpoint.manifest import Manifest
from hpcft.checkpoint.read import read_manifest
from hpcft.errors import NotFoundError
from hpcft.events import CheckpointRef
from hpcft.ids import Generation, RunId, Step
from hpcft.world import World

log = logging.getLogger("hpcft.lineage")


def on_disk(before: World, found: Sequence[CheckpointEntry], run: RunId) -> list[CheckpointRef]:
    """What a term after `before` may start from, oldest first; `found` are all committed checkpoints, in order.

    The journal's last leader may have committed more than it could write down: it died, or the disk was full. Nobody
    has gone on from an older checkpoint since, for no later term has a journal. So the newest checkpoint of its term
    counts, and those that it descends from.
    """
    there = {checkpoint_name(each.step, each.generation): each for each in found}
    known = [each for each in before.standing if checkpoint_name(each.step, each.generation) in there]
    if not before.standing and before.generation == Generation(0):
        return [CheckpointRef(each.step, each.generation) for each in found]
    last = max(((each.generation, each.step) for each in known), default=(Generation(0), Step(0)))
    unwritten: list[CheckpointRef] = []
    parent: str | None = None
    for entry in reversed(found):
        if (entry.generation, entry.step) <= last:
            break
        manifest = _manifest(entry, run)
        if manifest is None or manifest.term < before.term:
            continue  # damaged, another run's, or a deposed leader's
        name = checkpoint_name(entry.step, entry.generation)
        if not unwritten or name == parent:
            unwritten.insert(0, CheckpointRef(entry.step, entry.generation))
            parent = manifest.parent
    if not unwritten:
        return known
    ancestor = parse_name(parent) if parent is not None else None
    if ancestor is None:
        return unwritten
    step, generation = ancestor  # it may be gone: then what was before it still counts
    return [*(each for each in known if each.step <= step and each.generation <= generation), *unwritten]


def _manifest(entry: CheckpointEntry, run: RunId) -> Manifest | None:
    try:
        return read_manifest(entry.directory, run)[0]
    except (CheckpointDamagedError, NotFoundError) as error:
        log.warning("%s is passed over: %s", entry.directory.name, error.message)
        return None
