#!/usr/bin/env bash
# Sets up what is missing and runs the tests: all of them, two at a time, since most wait for processes to start, and those that
# judge times by themselves afterwards. Arguments go to pytest instead: ./run_tests.sh tests/workloads -k poisson
set -u
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/scripts/setup_env.sh" || exit 1
cd "$here" || exit 1
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} WANDB_SILENT=${WANDB_SILENT:-true} TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg
[ $# -eq 0 ] || exec python -m pytest "$@"
status=0
python -m pytest -q --durations=15 -n 2 -m "not alone" || status=$?
mapfile -t files < <(grep -rl --include='test_*.py' 'pytest\.mark\.alone' tests)  # to import the others takes as long as to run them
python -m pytest -q --durations=5 -m alone "${files[@]}" || status=$?
exit $status
