"""A real Slurm of your own, without root."""

from hpclab.slurm.private import Slurm as Slurm
from hpclab.slurm.private import find as find
from hpclab.slurm.private import here as here
from hpclab.slurm.private import start as start
from hpclab.slurm.programs import install_line as install_line
from hpclab.slurm.programs import missing as missing
