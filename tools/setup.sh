#!/bin/sh
# Make .venv whole: the pinned libraries and this package, editable. Nothing is done where that is so already.
#
# The stamp is written last, so a .venv without it is not trusted; it names what was installed (a checksum of
# settings.ini and setup.py) and where. `making` stands in a .venv for as long as one is being made.
set -eu
cd "$(dirname "$0")/.."
venv=.venv log=runs/setup.log
here=$(pwd -P)
versions=$(sed -n 's/^python_versions = //p' settings.ini)
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

SAY='import sys; print(*sys.version_info[:2], sep=".")'
SERVES='import ensurepip, sys; sys.exit("%d.%d" % sys.version_info[:2] not in sys.argv[1:])'

serves() { command -v "$1" >/dev/null 2>&1 && "$1" -c "$SERVES" $versions >/dev/null 2>&1; }

# The first Python that serves: the one that is named, or python3.11 and so on, and then python3.
choose() {
    named=${PYTHON:-}
    if [ -n "$named" ]; then
        ! serves "$named" || return 0
    else
        for PYTHON in $(printf 'python%s ' $versions) python3; do
            ! serves "$PYTHON" || return 0
        done
    fi
    if [ -n "$named" ] && ! command -v "$named" >/dev/null 2>&1; then
        echo "setup: no '$named' on this machine; expected the name or path of a Python ($versions). Name another: make ... PYTHON=/path/to/python" >&2
    elif [ -n "$named" ]; then
        echo "setup: '$named' is Python $("$named" -c "$SAY" 2>/dev/null) or has no venv; expected one of $versions, with venv. Name another, or leave PYTHON out." >&2
    else
        echo "setup: no Python that serves; looked for $(printf 'python%s, ' $versions)python3 with venv. Install one, or name yours:" \
            "make ... PYTHON=/path/to/python (on Debian and Ubuntu, venv is a package of its own: apt-get install python3-venv)" >&2
    fi
    exit 1
}

: >"$log"
if [ -e "$venv/making" ] || ! starts || moved; then
    choose
    echo "setup: making $venv with $PYTHON, Python $("$PYTHON" -c "$SAY" 2>/dev/null)"
    rm -rf "$venv"
    mkdir "$venv"
    : >"$venv/making"
    "$PYTHON" -m venv "$venv" >>"$log" 2>&1 ||
        fail "$PYTHON -m venv" "look there for the cause, then run the same command again"
fi
rm -f "$venv/stamp" "$venv/fetched"
: >"$venv/making"
echo "setup: installing the pinned libraries into $venv (about 1 GB to fetch, more where torch comes with CUDA; all of it in $log)"
# the large files are said as they come; what is imported is compiled then (Makefile): all else of torch and its like
# would take a minute for nothing
{
    "$venv/bin/python" -m pip install --disable-pip-version-check --no-input --no-compile -e '.[dev]' 2>&1 && : >"$venv/fetched"
} | tee -a "$log" | awk '
    /Downloading .* \([0-9][0-9][0-9.]* [MG]B\)/ { n = split($2, part, "/"); print "setup:   " part[n], $3, $4; fflush() }
    /^Installing collected packages/ { print "setup:   unpacking"; fflush() }'
[ -e "$venv/fetched" ] || fail "pip install" "run the same command again once the cause is gone; what was downloaded is kept"
rm -f "$venv/fetched"
rm -f "$venv/making"
echo "$want" >"$venv/stamp"
echo "setup: done"
