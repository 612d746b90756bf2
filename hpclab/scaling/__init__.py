"""Sweeps over numbers of ranks, and what they prove."""

from hpclab.scaling.sweeps import IDEAL as IDEAL
from hpclab.scaling.sweeps import LEAST_STEPS as LEAST_STEPS
from hpclab.scaling.sweeps import NOISY as NOISY
from hpclab.scaling.sweeps import WARM_ROUNDS as WARM_ROUNDS
from hpclab.scaling.sweeps import allreduce as allreduce
from hpclab.scaling.sweeps import fit as fit
from hpclab.scaling.sweeps import network as network
from hpclab.scaling.sweeps import regime as regime
from hpclab.scaling.sweeps import remarks as remarks
from hpclab.scaling.sweeps import split as split
from hpclab.scaling.sweeps import summary as summary
from hpclab.scaling.sweeps import sweep as sweep
from hpclab.scaling.sweeps import throughput as throughput
from hpclab.scaling.sweeps import trial as trial
from hpclab.scaling.sweeps import verdict as verdict
from hpclab.scaling.sweeps import warm_up as warm_up
