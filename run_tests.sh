#!/usr/bin/env bash
# Sets up what is missing and runs the tests. Arguments go to pytest: ./run_tests.sh tests/workloads -k poisson
set -u
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/scripts/setup_env.sh" || exit 1
cd "$here" || exit 1
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} WANDB_SILENT=${WANDB_SILENT:-true} TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg
exec python -m pytest "$@"
