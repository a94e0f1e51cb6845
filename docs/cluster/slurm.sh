#!/bin/bash
#SBATCH --job-name=hinge
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
# Run one hinge command on all GPUs of a job:
#   sbatch docs/cluster/slurm.sh hinge features cohort.csv --output features
set -euo pipefail

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address="$head:$((20000 + SLURM_JOB_ID % 20000))"
# without a token, everyone who reaches the port could run code as you
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN RAY_USAGE_STATS_ENABLED=0

# no MPI: hinge would take a task for one of several processes of a launch
run() { srun --mpi=none --overlap --ntasks-per-node=1 "$@"; }
ray_start=(ray start --block --object-store-memory=100000000 --num-gpus="$SLURM_GPUS_ON_NODE" --num-cpus="$SLURM_CPUS_PER_TASK")

run --nodes=1 --nodelist="$head" "${ray_start[@]}" --head --port="${address##*:}" --include-dashboard=false &
run --nodes=1 --nodelist="$head" timeout 300 bash -c "until ray status --address $address; do sleep 2; done" >/dev/null 2>&1
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
  run --nodes=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$head" "${ray_start[@]}" --address="$address" &
fi

# workers for all GPUs: those of machines that join later start then
run --nodes=1 --nodelist="$head" "$@" --ray "$address" --workers $((SLURM_JOB_NUM_NODES * SLURM_GPUS_ON_NODE))
