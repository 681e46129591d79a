#!/bin/bash
# Two hosts with four GPUs each, one process per GPU. If you submit the script again, the run resumes.
#
#   sbatch examples/slurm.sh
#
#SBATCH --job-name=ctde_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120        # two minutes before the time limit, all hosts save the same step and end with status 75
#SBATCH --requeue
#SBATCH --open-mode=append

# srun provides the index of each process and the address of the first one, so no address is given here.
srun python -m ctde_jax.train --dataset mnist --model cnn --run-dir runs/slurm-cnn
status=$?

# 75: ended by SIGTERM, 69: a host was lost. In both cases the same command resumes the run, at most 20 times.
if { [ $status -eq 75 ] || [ $status -eq 69 ]; } && [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
