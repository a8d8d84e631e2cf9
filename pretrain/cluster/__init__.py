"""Where this process stands among the ranks of a run, how they meet and how they talk to each other.

The only place that reads the variables of launchers and of Slurm, asks Slurm, and makes process groups.
"""

from pretrain.cluster.layout import Cluster, detect, master
from pretrain.cluster.local import free_port, launch_local
from pretrain.cluster.meeting import ClusterConfig, connected, find_peers, meet, ranges
from pretrain.cluster.slurm import SlurmJob, job_seconds_left, requeue, seconds_of, slurm_job
from pretrain.cluster.talking import (
    agree,
    difference,
    first_said,
    from_all,
    from_first,
    host_name,
    is_lost_peer,
    peers,
    versions,
)

__all__ = [
    "Cluster",
    "ClusterConfig",
    "SlurmJob",
    "agree",
    "connected",
    "detect",
    "difference",
    "find_peers",
    "first_said",
    "free_port",
    "from_all",
    "from_first",
    "host_name",
    "is_lost_peer",
    "job_seconds_left",
    "launch_local",
    "master",
    "meet",
    "peers",
    "ranges",
    "requeue",
    "seconds_of",
    "slurm_job",
    "versions",
]
