#!/bin/bash
# Encode a large CSV with a SLURM job array: 64 jobs of one GPU, 100 shards (of 256 rows) each.
#   sbatch examples/slurm_encode.sh clips.csv MODEL DATA
# Jobs beyond the last shard say so and exit with code 0. Submit failed jobs again: finished shards are kept, and the job
# that ends last writes the manifest.
#SBATCH --job-name=encode
#SBATCH --array=0-63
#SBATCH --gpus=1
#SBATCH --cpus-per-task=16
#SBATCH --requeue
set -eu
per_job=${PER_JOB:-100}
first=$((SLURM_ARRAY_TASK_ID * per_job))
exec ti2v-distill encode --data "$1" --model "$2" --out "$3" --shard-range "$first:$((first + per_job))" --compile
