"""The second home of checkpoints: copies in an object store, for the day on which the file system has lost them.

Theory of operation
-------------------
A disposable process beside the leader (`child`, started and watched by `supervisor`) copies the newest committed
checkpoint whenever one is due (`plan.due`). It touches nothing but the store: when it hangs, is killed or ends, neither
training nor commits nor the end of the run notice, and another one goes on where it was.

    <url>/<run.name>/<run id>/chunks/step-00001200-g0007-<nonce>/shard-00003-of-00016.safetensors/00012
    <url>/<run.name>/<run id>/manifests/step-00001200-g0007-<nonce>.json

**An object is a chunk**: the 16 MiB for which the manifest has a digest. It is put in one request, so it is there as a
whole or not at all, and nothing invisible is left behind by a kill, as unfinished multipart uploads are. Whoever goes
on lists what is there and sends the rest. A chunk is compared with its digest before it is sent, and with the store's
ETag afterwards; where that is no MD5 it is read back.

**The manifest goes last**, and only what has one is offered. It is byte for byte the local one.

**The name carries the nonce.** Under one prefix lies what one attempt of one generation has committed, so two who
write there write the same bytes: a deposed leader's process can add a checkpoint of its own branch, and never mix two.
It deletes nothing newer than what it has just mirrored itself.

`restore` is the way back: into a directory that nobody is offered, every chunk compared with its digest, synced, then
renamed. Nothing here imports torch.
"""
