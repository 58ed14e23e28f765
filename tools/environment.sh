#!/usr/bin/env bash
# Makes the environment that the Makefile's targets run in: Python 3.12 or 3.13, torch, the pinned
# packages and this one.
#
#   tools/environment.sh FOLDER      makes it
#   tools/environment.sh --python    says which Python it would take
#
# PYTHON names the Python to take. Otherwise it is the first of python3.12, python3.13 and python3
# that runs and is new enough, on the PATH or among pyenv's; else one that uv fetches into FOLDER.
# TORCH is cpu or cuda, the build of torch on Linux [cuda where there is an NVIDIA driver].
set -euo pipefail
here=$(CDPATH='' cd "$(dirname "$0")/.." && pwd)

usable() { # it runs, is of a right version and can make environments
    "$1" -c 'import sys, ensurepip, venv; sys.exit(not (3, 12) <= sys.version_info < (3, 14))' \
        > /dev/null 2>&1
}

python_here() {
    local name path
    if [ -n "${PYTHON:-}" ]; then
        usable "$PYTHON" && command -v "$PYTHON"
        return
    fi
    for name in python3.12 python3.13 python3; do
        for path in "$(command -v "$name" || true)" "$HOME"/.pyenv/versions/*/bin/"$name"; do
            # A version manager's stand-in may be there and not run.
            if [ -n "$path" ] && usable "$path"; then
                echo "$path"
                return
            fi
        done
    done
    return 1
}

python_of_uv() {
    local uv=uv
    if ! command -v uv > /dev/null; then
        uv=$1/uv/bin/uv
        python3 -m venv "$1/uv" && "$1/uv/bin/pip" install --quiet uv || return 1
    fi
    UV_PYTHON_INSTALL_DIR=$1/python "$uv" python install --quiet --no-bin 3.12 || return 1
    UV_PYTHON_INSTALL_DIR=$1/python "$uv" python find --managed-python 3.12
}

version_of() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2> /dev/null || true
}

remove_former() { # an environment of another Python can't be fixed
    if [ -e "$folder/pyvenv.cfg" ]; then
        echo "environment: what $folder holds is of another Python: made anew"
        rm -rf "$folder"
    fi
}

refuse() {
    echo "environment: error: no Python 3.12 or 3.13 $1" \
        "(install python3.12 with its venv module, or name one: make PYTHON=/path/to/python3.12)" >&2
    exit 2
}

install() { # pip's arguments; says what comes, as it comes
    "$folder/bin/python" -m pip install --disable-pip-version-check --progress-bar off "$@" |
        while read -r verb name _; do
            case $verb in Collecting | Installing) echo "  $verb $name" ;; esac
        done
}

if [ "${1:-}" = --python ]; then
    python_here || refuse "${PYTHON:+at }${PYTHON:-is here}"
    exit
fi
folder=${1:?the folder of the environment}
if ! python=$(python_here); then
    [ -z "${PYTHON:-}" ] || refuse "at $PYTHON"
    echo "environment: no Python 3.12 or 3.13 here: uv fetches one"
    remove_former
    python=$(python_of_uv "$folder") || refuse "is here, and uv could not fetch one"
elif [ "$(version_of "$python")" != "$(version_of "$folder/bin/python")" ]; then
    remove_former
fi
echo "environment: Python $(version_of "$python") ($python) in $folder"
"$python" -m venv "$folder"

torch=$(grep '^torch==' "$here/requirements.txt")
driver() {
    [ -e /proc/driver/nvidia/version ] || nvidia-smi > /dev/null 2>&1
}
if [ "$(uname)" = Linux ] && [ "${TORCH:-}" != cuda ] && { [ "${TORCH:-}" = cpu ] || ! driver; }; then
    # Without the CUDA packages, which are several GB. Where that index is out of reach, pip's own
    # has to do.
    echo "environment: $torch for a machine without a GPU (make TORCH=cuda: for one with)"
    install --no-deps --retries 0 --timeout 15 \
        --index-url https://download.pytorch.org/whl/cpu "$torch" 2> /dev/null ||
        echo "environment: not to be had from PyTorch's index of CPU builds: pip's own has the build" \
            "with CUDA, several GB"
fi
echo "environment: the packages of requirements.txt"
install -r "$here/requirements.txt"
install --no-deps --no-build-isolation -e "$here"
