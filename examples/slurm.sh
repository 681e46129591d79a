#!/bin/bash
# Two hosts with four GPUs each, one process a GPU. Submit it again, as it is, and the run goes on where it was ended.
#
#   sbatch examples/slurm.sh
#
#SBATCH --job-name=ctde_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120        # two minutes before the time is over all hosts save the same step, and end with 75
#SBATCH --requeue
#SBATCH --open-mode=append

# srun tells each process which of them it is, and where the first one is; no address is to be given.
srun python -m ctde_jax.train --dataset mnist --model cnn --run-dir runs/slurm-cnn
status=$?

# 75: ended by SIGTERM, 69: a host was lost. Both go on with the same command, but not for ever.
if { [ $status -eq 75 ] || [ $status -eq 69 ]; } && [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
