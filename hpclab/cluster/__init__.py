"""Clusters: on this machine, in a job queue, or a running one, behind one call."""

from hpclab.cluster.client import ClusterClient as ClusterClient
from hpclab.cluster.client import IgnoreInterrupt as IgnoreInterrupt
from hpclab.cluster.client import connect as connect
