#!/usr/bin/env bash
# Makes an image for enroot and pyxis, from NVIDIA's PyTorch image, without Docker.
#
#   launch/enroot.sh [IMAGE.sqsh]                             [megatron-scalebio.sqsh]
#   CONTAINER_IMAGE=$PWD/megatron-scalebio.sqsh sbatch ... launch/slurm/reweight.sbatch --config run.yaml
#
# BASE names another image of NVIDIA's registry [the one that the Dockerfile names].
set -euo pipefail
here=$(CDPATH='' cd "$(dirname "$0")/.." && pwd)
image=${1:-megatron-scalebio.sqsh}
base=${BASE:-$(sed -n 's/^ARG BASE=//p' "$here/Dockerfile")}
name=megatron-scalebio-$$
work=$(mktemp -d)
trap 'enroot remove --force "$name" > /dev/null 2>&1 || true; rm -rf "$work"' EXIT

[ ! -e "$image" ] || { echo "enroot: error: $image is there already (remove it, or name another)" >&2; exit 2; }
type -P enroot > /dev/null || { echo "enroot: error: enroot is not on PATH (load its module)" >&2; exit 2; }
enroot import --output "$work/base.sqsh" "docker://${base/\//#}"
enroot create --name "$name" "$work/base.sqsh"
enroot start --root --rw --mount "$here:/opt/megatron-scalebio" "$name" /opt/megatron-scalebio/tools/install.sh
enroot export --output "$image" "$name"
echo "enroot: $image"
