# Sourced by ./run and ./check: makes .venv with pip and keeps it current. `prepare core` or `prepare check`.
# A stamp in .venv holds a hash of what was installed; while it matches, nothing is asked of pip or of the network.

fail() { # fail MESSAGE TIP
    printf 'error: %s\ntip: %s\n' "$1" "$2" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    return 1
}

# What the installed environment depends on. The folder counts too: a moved checkout breaks the links inside .venv.
fingerprint() {
    local files=(pyproject.toml)
    [ -f constraints-ci.txt ] && files+=(constraints-ci.txt)
    { pwd -P && cat "${files[@]}"; } | .venv/bin/python -c 'import hashlib, sys
print(hashlib.sha256(sys.version.encode() + sys.stdin.buffer.read()).hexdigest())'
}

install() { # install ARGUMENT...
    local options=(--disable-pip-version-check --no-input)
    [ -f constraints-ci.txt ] && options+=(-c constraints-ci.txt)
    [ -t 1 ] || options+=(--quiet)
    .venv/bin/python -m pip install "${options[@]}" "$@" </dev/null
}

prepare() { # prepare core|check
    local kind=$1 python now requirement='.[serve]' stamp
    if ! .venv/bin/python -c 'import pip' 2>/dev/null; then
        python=$(find_python) || fail "Python 3.11 or newer not found" "install it, or name it: PYTHON=/path/to/python $0"
        echo "making .venv with $("$python" --version)"
        "$python" -m venv --clear .venv || fail "could not make .venv" "on Debian and Ubuntu: apt-get install python3-venv"
    fi
    now=$(fingerprint)
    for stamp in ".venv/volvelle-$kind.stamp" .venv/volvelle-check.stamp; do # the check environment serves ./run too
        if [ "$(cat "$stamp" 2>/dev/null)" = "$now" ]; then return; fi
    done
    [ "$kind" = check ] && requirement='.[dev,peers,serve,docs]'
    echo "installing volvelle into .venv (the first time this downloads PyTorch and takes some minutes)"
    install -e "$requirement" || fail "pip could not install volvelle" "the lines above say why; without a network, only an environment that is already installed works"
    # Bare: timm asks for torchvision, whose wheels on PyPI are for CUDA; beside a CPU build of torch importing one fails,
    # and transformers with it. Tests against timm skip where it is absent.
    [ "$kind" = core ] || install --no-deps 'timm>=1' || echo "timm could not be installed: tests against it will skip" >&2
    # Aside, not among the packages: its operators are the oracle of ours, and the wheel's CUDA would break transformers.
    [ "$kind" = core ] || install --no-deps --target .venv/lib/torchvision-aside 'torchvision==0.28.0' ||
        echo "torchvision could not be installed: tests against its operators will skip" >&2
    [ "$kind" = core ] || prepare_browser
    printf '%s\n' "$now" >".venv/volvelle-$kind.stamp"
}

# Tests of the studio drive a real browser. Where Debian's cannot be installed they skip, and say so.
prepare_browser() {
    local root=()
    if command -v chromedriver >/dev/null && command -v chromium >/dev/null; then return; fi
    [ "$(id -u)" = 0 ] || root=(sudo -n)
    { "${root[@]}" apt-get update -qq && "${root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends chromium chromium-driver; } >/dev/null 2>&1 </dev/null ||
        echo "Chromium could not be installed: tests of the studio in a browser will skip" >&2
}
