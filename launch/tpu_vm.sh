#!/usr/bin/env bash
# tpu_vm.sh VERB [--env FILE] [--dry-run]: a run on a Cloud TPU slice, through gcloud.
#
#   run       create, install, start, then logs until training ends; exits with its code, 75 where the slice is lost
#   create    create the slice, or use the one there is; one that was preempted is deleted first
#   install   copy the configuration and install neox_jax on all hosts
#   start     start training on all hosts; it goes on when the connection ends
#   logs      follow what host 0 prints until it ends
#   status    the state of the slice, and of training on each host
#   stop      SIGTERM: training saves and exits 75
#   fetch     copy the run folder here, to FETCH_TO
#   delete    delete the slice
#
#   --env FILE   the environment file (default: run.env beside this script)
#   --dry-run    print the commands for a slice that is not there yet, run none

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse_options "run create install start logs status stop fetch delete" "$@"
load_env NAME PROJECT ZONE ACCELERATOR_TYPE RUNTIME_VERSION VERSION CONFIG WORKDIR
requirement tpu >/dev/null

WHERE=(--zone="$ZONE" --project="$PROJECT")
BUNDLE=$LAUNCH/.bundle/neox-jax-$NAME
REMOTE=neox-jax-$NAME
PAUSE=${POLL_SECONDS:-30}
SIMULATED=NONE

tpu() { run gcloud compute tpus "$@" "${WHERE[@]}"; }
on_all() { tpu tpu-vm ssh "$NAME" --worker=all --command="bash $REMOTE/tpu_worker.sh $1"; }
on_first() { tpu tpu-vm ssh "$NAME" --worker=0 --command="bash $REMOTE/tpu_worker.sh $1"; }

# look KIND FIELD: sets STATE, NONE where there is no such thing and UNKNOWN where gcloud cannot say. A dry run has what
# the commands before it would have made.
look() {
  local errors
  if [[ $DRY_RUN ]]; then
    tpu "$1" describe "$NAME" --format="value($2)"
    STATE=$SIMULATED
    return
  fi
  errors=$(mktemp)
  if ! STATE=$(tpu "$1" describe "$NAME" --format="value($2)" 2>"$errors"); then
    if grep -q NOT_FOUND "$errors"; then
      STATE=NONE
    else
      cat "$errors" >&2
      STATE=UNKNOWN
    fi
  fi
  rm -f "$errors"
}

create() {
  local kind=tpu-vm field=state ready=READY lost="PREEMPTED TERMINATED" make=()
  if [[ ${QUEUED:-} ]]; then
    kind=queued-resources field=state.state ready=ACTIVE lost="SUSPENDED FAILED"
    make=(--node-id="$NAME" --runtime-version="$RUNTIME_VERSION")
  else
    make=(--version="$RUNTIME_VERSION")
  fi
  while true; do
    look $kind $field
    case " $lost " in *" $STATE "*)
      say "$NAME is $STATE and is created again"
      remove
      STATE=NONE
      ;;
    esac
    case $STATE in
      "$ready") return ;;
      NONE)
        tpu $kind create "$NAME" --accelerator-type="$ACCELERATOR_TYPE" "${make[@]}" ${SPOT:+--spot} ||
          fail 65 "$NAME could not be created; where it is capacity that is missing, QUEUED=1 waits for it"
        SIMULATED=$ready
        [[ ${QUEUED:-} ]] || return 0
        ;;
      UNKNOWN) fail 65 "cannot see whether $NAME is there; gcloud says why" ;;
      STOPPED | STOPPING | HIDDEN | HIDING) fail 65 "$NAME is $STATE; start it or delete it" ;;
      *)
        say "$NAME is $STATE"
        sleep "$PAUSE"
        ;;
    esac
  done
}

remove() {
  if [[ ${QUEUED:-} ]]; then
    tpu queued-resources delete "$NAME" --force --quiet
  else
    tpu tpu-vm delete "$NAME" --quiet
  fi
}

fail_if_lost() {
  case $STATE in
    READY | UNKNOWN) ;;
    *) fail 75 "$NAME is lost (${STATE/NONE/deleted}); run makes it again" ;;
  esac
}

# explain CODE WHAT: ends this script where a command on the hosts has failed, with 75 where that may pass by itself.
explain() {
  look tpu-vm state
  fail_if_lost
  [[ $STATE == READY ]] || fail 75 "$NAME cannot be reached; the same command tries again"
  (($1 != 255)) || fail 75 "a host of $NAME does not answer; the same command tries again"
  fail 65 "$2 failed on a host of $NAME (code $1); what it said is above"
}

install() {
  local code=0
  trap 'rm -rf "$BUNDLE"' EXIT
  run bash "$LAUNCH/tpu_bundle.sh" --env "$ENV_FILE"
  tpu tpu-vm scp "$BUNDLE" "$NAME:." --recurse --worker=all || code=$?
  run rm -rf "$BUNDLE"
  ((code == 0)) || explain "$code" "the copy"
  on_all install || explain $? "the installation"
}

start() { on_all start || explain $? "the start"; }

# Follows the first host until no host trains any more; then exits with the worst of their codes.
follow() {
  local told="" output child codes misses=0
  if [[ $DRY_RUN ]]; then
    on_first follow
    on_all code
    return
  fi
  trap 'told=1; say "stopping $NAME"; on_all stop' TERM INT HUP
  while true; do
    on_first follow &
    child=$!
    wait $child || true
    while kill -0 $child 2>/dev/null; do wait $child || true; done # a signal ends a wait, not the following
    if output=$(on_all code); then
      misses=0
      mapfile -t codes < <(sed -n 's/^code //p' <<<"$output")
      if ((${#codes[@]})) && [[ " ${codes[*]} " != *" running "* ]]; then
        exit "$(worst "${codes[@]}")"
      fi
    else
      look tpu-vm state
      fail_if_lost
      misses=$((misses + 1))
      ((misses < 5)) || fail 75 "a host of $NAME does not answer; the same command tries again"
    fi
    [[ $told ]] || say "training goes on on $NAME; following it again"
    sleep "$PAUSE"
  done
}

case $VERB in
  create) create ;;
  install) install ;;
  start) start ;;
  logs) on_first follow ;;
  status)
    look tpu-vm state
    [[ $DRY_RUN ]] || printf '%s is %s\n' "$NAME" "$STATE"
    if [[ $STATE == READY || $DRY_RUN ]]; then on_all code; fi
    ;;
  stop) on_all stop ;;
  fetch)
    run mkdir -p "${FETCH_TO:-runs}/$NAME"
    tpu tpu-vm scp "$NAME:$REMOTE/run" "${FETCH_TO:-runs}/$NAME" --recurse --worker=0
    ;;
  delete) remove ;;
  run)
    create
    install
    start
    follow
    ;;
esac
