#!/usr/bin/env bash
#SBATCH --job-name=vlm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#
# Every stage of a recipe on a SLURM cluster:
#
#     sbatch configs/cluster/slurm.sh llava_1_5 fsdp2 [options of every stage ...]
#
# fsdp2 is a file of this folder: ddp, fsdp2 or hybrid. Each stage is one srun over all tasks. Three minutes before the
# time is over every task gets SIGTERM; the stage saves its state after the step, and the job queues again. Finished
# stages are skipped at once and a stopped stage goes on from its newest checkpoint, so after any other failure the same
# sbatch command continues.
set -euo pipefail

usage="usage: sbatch configs/cluster/slurm.sh SYSTEM ddp|fsdp2|hybrid [options of every stage ...]"
system=${1:?$usage} cluster=${2:?$usage}
shift 2
settings=configs/cluster/$cluster.yaml
[ -f "$settings" ] || { echo "$settings is not there; $usage" >&2; exit 2; }

names='import sys; from vlm.recipes import find_recipe, load_recipe
print(*[node.name for node in load_recipe(find_recipe(sys.argv[1])).nodes])'
stages=$(python -c "$names" "$system")
for stage in $stages; do
    status=0
    srun --kill-on-bad-exit=1 python -m cli fit --recipe "$system" --stage "$stage" -c "$settings" -- \
        --trainer.num_nodes="$SLURM_NNODES" --trainer.devices="${SLURM_NTASKS_PER_NODE%%[^0-9]*}" "$@" || status=$?
    if [ "$status" -eq 143 ]; then  # stopped by SIGTERM, saved
        scontrol requeue "$SLURM_JOB_ID"
    fi
    [ "$status" -eq 0 ] || exit "$status"
done
