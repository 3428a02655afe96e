#!/usr/bin/env bash
# gpu_node.sh VERB [--env FILE] [--dry-run]: a run on this machine, one process for all of its GPUs.
#
#   install   make the virtual environment of NEOX_JAX (as .venv/bin/neox-jax) and install neox_jax for CUDA in it
#   run       train; exits with training's code
#
#   --env FILE   the environment file (default: run.env beside this script)
#   --dry-run    print the commands, run none

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse_options "install run" "$@"

case $VERB in
  install)
    load_env NAME NEOX_JAX VERSION
    [[ $NEOX_JAX == */bin/neox-jax ]] ||
      fail 65 "NEOX_JAX is $NEOX_JAX; to install, wanted FOLDER/bin/neox-jax, as .venv/bin/neox-jax"
    required=$(requirement cuda)
    [[ $VERSION != *.whl || $VERSION == /* ]] || required=./$required
    run python3 -m venv "${NEOX_JAX%/bin/neox-jax}"
    run "${NEOX_JAX%/neox-jax}/python" -m pip install "$required"
    ;;
  run)
    load_env NAME NEOX_JAX CONFIG WORKDIR
    export_passed
    # The shell gives way to training, which so gets signals itself.
    [[ $DRY_RUN ]] || exec "$NEOX_JAX" train --config "$CONFIG" --workdir "$WORKDIR" --distributed off "${ARGS[@]}"
    quoted "$NEOX_JAX" train --config "$CONFIG" --workdir "$WORKDIR" --distributed off "${ARGS[@]}"
    ;;
esac
