"""A real Slurm cluster on this machine: `with Cluster.start(directory) as cluster: ...`.

Theory of operation. The cluster is one process tree in namespaces of its own. Its first process (`init.py` on the
head) has a pid, mount, network, IPC and host-name namespace; munged and slurmctld run there, and a bridge is its
switch. Every node is a tree of the same kind nested in it, with a network cable (a veth pair) to the bridge, an own
/tmp and /dev/shm, and a slurmd. Nothing has a name outside: no bridge, no network namespace, no mount and no user is
added to the machine, so any number of clusters can exist at once, with the same addresses.

That is also how everything goes away: when the head's first process ends, the kernel kills all others, and their
namespaces go with the last of them. It ends when it is told to (`stop`), and when the process that started the
cluster ends in whatever way (it watches a pidfd), so an interrupted or killed test run leaves nothing but files.

What differs from a cluster in production:
- A node that loses power keeps its page cache (it is the machine's); all nodes share one clock and one processor.
- ProctrackType is linuxproc, which needs no cgroups. A signal to a job reaches *every* descendant of its tasks, in
  whatever session (proctrack/cgroup signals the tasks alone, but for SIGKILL), and a process whose parents have died
  is out of Slurm's sight. Both are harder on hpcft than production is.
- Times are short: see `Size`.

Nodes are numbered from 1 as in their names (`node1`); 0 is the head, where users log in and submit.
"""

from tests.cluster.cluster import Cluster, ClusterError, Process, missing, until
from tests.cluster.files import HEAD, USER, Size, address, node_name

__all__ = ["HEAD", "USER", "Cluster", "ClusterError", "Process", "Size", "address", "missing", "node_name", "until"]
