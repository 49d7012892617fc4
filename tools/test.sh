#!/bin/sh
# What `make test` runs once .venv is there: the sync check, every notebook, then pytest, each whatever the one before
# gave. pytest reports the outcome of the first two as tests of its own, so its last line speaks for all. What the
# notebooks have built is there for the tests (SMOKE_STORE). `test.sh all` runs the tests marked slow, too.
cd "$(dirname "$0")/.." || exit 1
PATH="$(pwd)/.venv/bin:$PATH"
export PATH OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg
echo 'test: notebooks, library and README in sync?'
sh tools/check.sh
export STEP_CHECK=$?
echo 'test: every notebook'
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT
trap 'exit 130' INT TERM
export SMOKE_STORE="$made/store"
SOLAR_STORE="$SMOKE_STORE" nbdev_test --n_workers 2
export STEP_NOTEBOOKS=$?
marked='not slow'
[ "${1:-}" = all ] && marked=''
python -m pytest -n 2 --dist loadfile -m "$marked" tests
