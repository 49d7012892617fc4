#!/bin/sh
# Are the notebooks clean, and do library and README say what the notebooks say? Made again in a copy and compared,
# so that nothing here is changed and uncommitted work is judged as it stands.
set -eu
unset IN_TEST  # nbdev_export does nothing where it is set, and the check would be silent
cd "$(dirname "$0")/.."
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
trap 'exit 130' INT TERM
cp -R nbs solar_repro tools settings.ini pyproject.toml setup.py README.md "$copy"
(
    cd "$copy"
    nbdev_clean
    nbdev_export
    python tools/build_readme.py
)
rc=0
for f in nbs solar_repro README.md pyproject.toml; do
    diff -r -q -x __pycache__ -x .ipynb_checkpoints -x nbdev.yml -x sidebar.yml "$f" "$copy/$f" || rc=1
done
[ $rc = 0 ] || echo 'check: notebooks, library and README differ as listed. Run nbdev_clean, nbdev_export and
tools/build_readme.py, look at the changes and commit them.' >&2
exit $rc
