#!/usr/bin/env bash
# Sets up what is missing, runs the artifact and draws its figures.
#   ./run_all.sh smoke          minutes: what to try first
#   ./run_all.sh [fast]         the default
#   ./run_all.sh full           hours: more seeds, more points, larger models
#   ./run_all.sh MODE NAME...   only these experiments of the mode
#   ./run_all.sh figures [NAME...]   redraw from records, nothing is run
# Runs that are done are not run again. `--plan` says what a mode would do and stops.
set -u
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/scripts/setup_env.sh" || exit 1
cd "$here" || exit 1
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} WANDB_SILENT=${WANDB_SILENT:-true} TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg
exec python -m runner.artifact "$@"
