#!/bin/sh
# What `make test` runs once .venv is there: the sync check beside the notebooks, then pytest, each whatever the one
# before gave. pytest reports the outcome of the first two as tests of its own, so its last line speaks for all; and it
# runs the story's notebooks, as `make tables` does. What the notebooks have built is there for the tests
# (SMOKE_STORE). `test.sh all` runs the tests marked slow, too.
cd "$(dirname "$0")/.." || exit 1
PATH="$(pwd)/.venv/bin:$PATH"
STORY='^([_.]|0[0-6]_(paper|data|sft|dpo|merge|eval|tables)[.])'
export PATH OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT
trap 'kill $check 2>/dev/null; exit 130' INT TERM
echo 'test: notebooks, library and README in sync? every notebook of the machinery'
sh tools/check.sh >"$made/check" 2>&1 &
check=$!
export SMOKE_STORE="$made/store"
SOLAR_STORE="$SMOKE_STORE" nbdev_test --n_workers 2 --skip_file_re "$STORY"
export STEP_NOTEBOOKS=$?
wait $check
export STEP_CHECK=$?
cat "$made/check"
# Whole files to a worker, in the order of conftest.py: the long ones first, so that both workers end together.
marked='not slow'
[ "${1:-}" = all ] && marked=''
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "$marked" tests
