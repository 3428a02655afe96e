#!/usr/bin/env bash
# babysit.sh [--stalls N] [--pause SECONDS] [--dry-run] [--] COMMAND...: runs it again on exit 75, and on nothing else.
#
# Training exits 75 when the same command would go on from a checkpoint; tpu_vm.sh run also when its slice is lost.
# Whether it got on is read in what it prints: "going on from step N", "stopped and saved at step N".
#
#   --stalls N         give up after so many starts in a row that got no further (default: 5); exits 75
#   --pause SECONDS    before a new start (default: 10), doubled for each that got no further, up to 10 minutes
#   --dry-run          print the command, run nothing
#
# SIGTERM and Ctrl-C are passed on as SIGTERM; training saves, and it is not started again.

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

max_stalls=5 pause=10
while (($#)); do
  case $1 in
    --help | -h) show_help && exit 0 ;;
    --dry-run) DRY_RUN=1 ;;
    --stalls | --pause)
      [[ ${2:-} =~ ^[0-9]+$ ]] || fail 2 "$1 wants a whole number"
      if [[ $1 == --stalls ]]; then max_stalls=$2; else pause=$2; fi
      shift
      ;;
    --)
      shift
      break
      ;;
    -*) fail 2 "unknown option $1; --help lists them" ;;
    *) break ;;
  esac
  shift
done
(($#)) || fail 2 "wants a command, as: babysit.sh bash launch/tpu_vm.sh run"
if [[ $DRY_RUN ]]; then
  quoted "$@"
  exit
fi

notes=$(mktemp)
trap 'rm -f "$notes"' EXIT

# Passes lines on and notes the steps that they tell of.
watch_steps() {
  local line
  trap '' TERM INT HUP # it ends when what it reads does
  while IFS= read -r line || [[ $line ]]; do
    printf '%s\n' "$line"
    if [[ $line =~ (going on from|stopped and saved at)\ step\ ([0-9]+) ]]; then
      echo "${BASH_REMATCH[2]}" >>"$notes"
    fi
  done
}

child="" told="" stalls=0 furthest=-1
# An INT would be ignored by a background command, which is what bash makes of it.
trap 'told=1; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true' TERM INT HUP

while true; do
  exec {pipe}> >(watch_steps)
  watcher=$!
  "$@" >&"$pipe" &
  child=$!
  exec {pipe}>&-
  code=0
  wait $child || code=$?
  while kill -0 $child 2>/dev/null; do # a signal ended the wait, not the command
    code=0
    wait $child || code=$?
  done
  child=""
  wait $watcher || true
  ((code == 75)) && [[ -z $told ]] || exit "$code"

  step=$(sort -n "$notes" | tail -n 1)
  if ((${step:--1} > furthest)); then
    furthest=$step stalls=0
  else
    stalls=$((stalls + 1))
  fi
  ((stalls < max_stalls)) ||
    fail 75 "$stalls starts in a row got no further than step $furthest; look at what they print"
  seconds=$((pause << (stalls < 10 ? stalls : 10)))
  ((seconds <= 600)) || seconds=600
  say "exit 75, the furthest step is ${step:-not known}; again in $seconds s"
  sleep "$seconds" &
  wait $! || true
  [[ -z $told ]] || exit 75
done
