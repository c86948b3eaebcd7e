#!/bin/bash
#SBATCH --job-name=sycoca
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#
# sbatch --export=ALL,RUN=/shared/runs/base train/slurm.sh --config ds_zero2.json --preset base_16 --data ...
#
# One torchrun on each machine. Five minutes before its end the job is asked to stop: it saves, and started again with
# the same RUN it goes on from there.
set -eu
: "${RUN:?RUN names the folder of the run, on a file system that all machines see}"
cd "${SLURM_SUBMIT_DIR:?runs under sbatch, from the checkout}"

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -1)
port=$((20000 + SLURM_JOB_ID % 20000))
resume=()
compgen -G "$RUN/checkpoints/step_*" >/dev/null && resume=(--resume)

exec srun --kill-on-bad-exit=1 torchrun \
  --nnodes "$SLURM_NNODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-1}" \
  --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID" --rdzv_endpoint "$first:$port" \
  train/pretrain.py --run-dir "$RUN" "${resume[@]}" "$@"
