#!/usr/bin/env bash
# tpu_worker.sh install|start|train|follow|code|stop: what tpu_vm.sh has each host of a slice do. It runs there.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
chmod 600 settings
# shellcheck disable=SC1091
source ./settings

running() { [[ -f pid && ! -f code ]] && kill -0 "$(<pid)" 2>/dev/null; }

case ${1:-} in
  install)
    [[ -z $SETUP ]] || bash -c "$SETUP"
    # The images' own Python is older than neox_jax needs; uv brings one along.
    python3 -m pip install --quiet --user 'uv>=0.9,<1'
    ~/.local/bin/uv venv --quiet --allow-existing --python 3.12 venv
    ~/.local/bin/uv pip install --quiet --python venv/bin/python "$REQUIREMENT"
    ;;
  start)
    if running; then
      echo "training runs here already, and goes on"
      exit
    fi
    rm -f pid code
    [[ ! -f log ]] || mv log log.previous
    ln -sfn "$WORKDIR" run
    setsid bash "$PWD/tpu_worker.sh" train </dev/null >log 2>&1 &
    until [[ -s pid ]]; do sleep 0.1; done
    ;;
  train)
    venv/bin/neox-jax "${TRAIN[@]}" &
    echo $! >pid
    code=0
    wait $! || code=$?
    echo $code >code.new
    mv code.new code
    ;;
  follow)
    [[ -f log ]] || exit 0
    if running; then tail -n 1000 --pid="$(<pid)" -f log; else tail -n 1000 log; fi
    ;;
  code)
    for _ in {1..20}; do # between the end of training and its code there is a moment
      if [[ -f code ]]; then
        echo "code $(<code)"
        exit
      elif running; then
        echo "code running"
        exit
      fi
      sleep 0.1
    done
    echo "code gone"
    ;;
  stop) if running; then kill -TERM "$(<pid)"; fi ;;
  *) exit 2 ;;
esac
