#!/bin/bash
# Distill on four nodes of eight GPUs, in as many jobs as necessary:
#   for i in 1 2 3 4; do sbatch --dependency=singleton examples/slurm_distill.sh DATA MODEL RUN; done
# Each job continues where the previous one stopped; once the run is finished, the remaining jobs end immediately. SLURM
# sends SIGTERM to the ranks 15 minutes before the time limit: they finish the iteration, save, and exit with code 0.
#SBATCH --job-name=distill
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@900
#SBATCH --requeue
set -eu
export MASTER_ADDR MASTER_PORT=29500 OMP_NUM_THREADS=4
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
exec ti2v-distill distill --config recipes/wan22-ti2v-5b.yaml --shards "$1" --model "$2" --out "$3" --replicate "$4"' \
    distill "$1" "$2" "$3" "$SLURM_NNODES"
