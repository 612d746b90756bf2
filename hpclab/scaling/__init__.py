"""Sweeps over numbers of ranks, and what they prove."""

from hpclab.scaling.collectives import allreduce as allreduce
from hpclab.scaling.collectives import by_slowest as by_slowest
from hpclab.scaling.collectives import network as network
from hpclab.scaling.judge import fit as fit
from hpclab.scaling.judge import paired as paired
from hpclab.scaling.judge import regime as regime
from hpclab.scaling.judge import remarks as remarks
from hpclab.scaling.judge import summary as summary
from hpclab.scaling.judge import verdict as verdict
from hpclab.scaling.sweeps import sweep as sweep
from hpclab.scaling.trials import split as split
from hpclab.scaling.trials import throughput as throughput
from hpclab.scaling.trials import trial as trial
from hpclab.scaling.trials import warm_up as warm_up
