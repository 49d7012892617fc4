#!/bin/sh
# Make .venv whole: the pinned libraries and this package, editable. Nothing is done where that is so already.
#
# The stamp is written last, so a .venv without it is not trusted; it names what was installed (a checksum of
# settings.ini and setup.py) and where. `making` stands in a .venv for as long as one is being made.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3.11}
venv=.venv log=runs/setup.log
here=$(pwd -P)
want="$(cat settings.ini setup.py | cksum) $here"

starts() { "$venv/bin/python" -c 'import pip' >/dev/null 2>&1; }
whole() { [ "$(cat "$venv/stamp" 2>/dev/null)" = "$want" ] && starts; }

moved() { [ -e "$venv/stamp" ] && case "$(cat "$venv/stamp")" in *" $here") false ;; esac; }

whole && exit 0
mkdir -p runs
if command -v flock >/dev/null 2>&1; then
    exec 9>runs/setup.lock
    flock -n 9 || { echo "setup: another one is making $venv; waiting for it"; flock 9; }
    whole && exit 0
fi

fail() {
    echo "setup: $1 failed; the last lines of $log:" >&2
    tail -n 20 "$log" | sed 's/^/    /' >&2
    echo "setup: $2" >&2
    exit 1
}

: >"$log"
if [ -e "$venv/making" ] || ! starts || moved; then
    command -v "$PYTHON" >/dev/null 2>&1 || {
        echo "setup: no '$PYTHON' on this machine; expected Python 3.11. Install it, or name yours: make ... PYTHON=/path/to/python" >&2
        exit 1
    }
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "setup: '$PYTHON' is older than 3.11; expected 3.11. Name another: make ... PYTHON=/path/to/python3.11" >&2
        exit 1
    }
    echo "setup: making $venv"
    rm -rf "$venv"
    mkdir "$venv"
    : >"$venv/making"
    "$PYTHON" -m venv "$venv" >>"$log" 2>&1 ||
        fail "$PYTHON -m venv" "on Debian and Ubuntu, venv is a package of its own: apt-get install python3.11-venv"
fi
rm -f "$venv/stamp"
: >"$venv/making"
echo "setup: installing the pinned libraries into $venv (a minute or more; progress in $log)"
"$venv/bin/python" -m pip install --disable-pip-version-check --no-input -e '.[dev]' >>"$log" 2>&1 ||
    fail "pip install" "run the same command again once the cause is gone; what was downloaded is kept"
rm -f "$venv/making"
echo "$want" >"$venv/stamp"
echo "setup: done"
