#!/bin/bash
#SBATCH --job-name=ddp
#SBATCH --nodes=2 --ntasks-per-node=1
#SBATCH --time=00:10:00
#SBATCH --output=ddp-%j.out
# On a site, add what its documentation asks for: --account,
# --partition, --cpus-per-task; and `module load` your Python.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Where the ranks meet:
export MASTER_ADDR=$(scontrol show node "$first" | grep -oP 'NodeAddr=\K\S+')
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) OMP_NUM_THREADS=1
# srun starts one copy of the command for each task, and tells it
# which one it is.
srun bash -c \
  'RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS exec "$@"' - \
  "${PYTHON:-python}" train_ddp.py "$@"
