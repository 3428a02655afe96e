#!/usr/bin/env bash
# tpu_bundle.sh [--env FILE]: makes the folder that tpu_vm.sh copies to each host; what PASS names is in it.

# shellcheck disable=SC2153 # names that the environment file sets
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse_options "" "$@"
load_env NAME VERSION CONFIG WORKDIR
[[ -f $CONFIG ]] || fail 65 "CONFIG is $CONFIG, and there is no such file here"
required=$(requirement tpu)
train=(train --config "configs/$(basename "$CONFIG")" --workdir "$WORKDIR" --distributed auto "${ARGS[@]}")

umask 077
bundle=$LAUNCH/.bundle/neox-jax-$NAME
rm -rf "$bundle"
mkdir -p "$bundle/configs"
cp "$LAUNCH/tpu_worker.sh" "$LAUNCH/common.sh" "$bundle"
cp "$(dirname "$CONFIG")"/*.py "$bundle/configs"
if [[ $VERSION == *.whl ]]; then
  [[ -f $VERSION ]] || fail 65 "VERSION is $VERSION, and there is no such file here"
  cp "$VERSION" "$bundle"
  required="./$(basename "$VERSION")[tpu]"
fi
{
  printf 'REQUIREMENT=%s\n' "$(quoted "$required")"
  printf 'SETUP=%s\n' "$(quoted "${SETUP:-}")"
  printf 'TRAIN=(%s)\n' "$(quoted "${train[@]}")"
  printf 'WORKDIR=%s\n' "$(quoted "$WORKDIR")"
  for name in ${PASS:-}; do printf 'export %s=%s\n' "$name" "$(quoted "${!name}")"; done
} >"$bundle/settings"
