"""Clusters: on this machine, in a job queue, or a running one, behind one call."""

from hpclab.cluster.client import GUARD as GUARD
from hpclab.cluster.client import REGISTER_SECONDS as REGISTER_SECONDS
from hpclab.cluster.client import ClusterClient as ClusterClient
from hpclab.cluster.client import IgnoreInterrupt as IgnoreInterrupt
from hpclab.cluster.client import connect as connect
