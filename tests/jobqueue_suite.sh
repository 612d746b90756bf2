#!/usr/bin/env bash
# dask-jobqueue's own tests for Slurm, against a private Slurm of ours: `tests/jobqueue_suite.sh CHECKOUT`, where CHECKOUT
# is a clone of https://github.com/dask/dask-jobqueue at the tag that is installed here. Needs pytest-asyncio, and root:
# as in its own containers, there must be a folder /shared_space, and eth0 must have two further names.
set -euo pipefail
checkout=$(realpath "$1")
mkdir /shared_space
trap 'ip addr flush label "eth0:*"; rm -r /shared_space' EXIT
ip addr add 10.99.7.1/32 dev eth0 label eth0:worker
ip addr add 10.99.7.2/32 dev eth0 label eth0:scheduler
export CHECKOUT=$checkout
python - <<'END'
import os
import subprocess
import sys

from hpclab import slurm

checkout = os.environ["CHECKOUT"]
with slurm.start(nodes=2, cpus=2, memory="4GB") as private:
    env = private.env | {"PYTHONPATH": os.pathsep.join([checkout, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "pytest", "dask_jobqueue", "-E", "slurm", "-rfE"]
    sys.exit(subprocess.run(command, cwd=checkout, env=env).returncode)
END
