#!/bin/bash
# Train on the nodes of a Slurm job, go on after a requeue: sbatch configs/slurm.sh CONFIG RUN_DIR
#SBATCH --job-name=rewardmap
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@600   # ten minutes before the end every rank saves and leaves with code 138

config=$1
run_dir=$2
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=29500
if [ -f "$run_dir/config.toml" ]; then
    arguments="--resume $run_dir"
else
    arguments="$config --run-dir $run_dir"
fi

srun --kill-on-bad-exit=1 bash -c "
    RANK=\$SLURM_PROCID WORLD_SIZE=\$SLURM_NTASKS LOCAL_RANK=\$SLURM_LOCALID exec rewardmap train $arguments"
code=$?
if [ "$code" -eq 138 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
