#!/usr/bin/env bash
# gke.sh VERB [--env FILE] [--dry-run]: a run on a TPU slice in GKE, by gke_jobset.yaml, through kubectl.
#
#   start     apply the configuration, what PASS names as a Secret, and the JobSet
#   logs      follow what the hosts print
#   status    the JobSet and its pods
#   delete    delete all of it; SIGTERM lets training save first
#
#   --env FILE   the environment file (default: run.env beside this script)
#   --dry-run    print the commands and manifests, run nothing

# shellcheck disable=SC2153 # names that the environment file sets
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# Any text as a JSON string, which is YAML too.
json() {
  local text=$1
  text=${text//\\/\\\\}
  text=${text//\"/\\\"}
  text=${text//$'\n'/\\n}
  text=${text//$'\t'/\\t}
  printf '"%s"' "$text"
}

json_list() {
  local word separator=""
  printf '['
  for word in "$@"; do
    printf '%s' "$separator"
    json "$word"
    separator=", "
  done
  printf ']'
}

# The manifest with every ${NAME} filled in; what is filled in is not looked at again.
render() {
  local rest filled="" before name
  local -A values
  for name in NAME IMAGE TPU_ACCELERATOR TPU_TOPOLOGY VOLUME_CLAIM VOLUME_PATH; do
    values[$name]=$(json "${!name}")
  done
  for name in MAX_RESTARTS NUM_NODES CHIPS_PER_NODE; do
    [[ ${!name} =~ ^[0-9]+$ ]] || fail 65 "$name is '${!name}'; wanted a whole number"
    values[$name]=${!name}
  done
  values[REQUIREMENT]=$(json "$REQUIREMENT")
  values[TRAIN]=$(json_list "${TRAIN[@]//\$/\$\$}")
  rest=$(grep -v '^#' "$LAUNCH/gke_jobset.yaml")
  while [[ $rest =~ \$\{([A-Z_]+)\} ]]; do
    name=${BASH_REMATCH[1]}
    before=${rest%%"\${$name}"*}
    filled+=$before${values[$name]}
    rest=${rest#*"\${$name}"}
  done
  printf '%s' "$filled$rest"
}

# The Secret goes to kubectl's standard input, so neither a command nor a file has it; a dry run has the command that
# makes it.
apply_secret() {
  if [[ $DRY_RUN ]]; then
    printf '%s | kubectl apply -f -\n' "$(quoted bash "$LAUNCH/gke.sh" secret --env "$ENV_FILE")"
  else
    secret | kubectl apply -f -
  fi
}

secret() {
  local name
  printf 'apiVersion: v1\nkind: Secret\nmetadata: {name: %s}\ndata:\n' "$(json "$NAME")"
  for name in $PASS; do printf '  %s: %s\n' "$name" "$(printf '%s' "${!name}" | base64 | tr -d '\n')"; done
}

parse_options "start logs status delete secret" "$@" # secret is what a dry run's commands call
load_env NAME CONFIG WORKDIR VERSION IMAGE NUM_NODES TPU_ACCELERATOR TPU_TOPOLOGY CHIPS_PER_NODE VOLUME_CLAIM \
  VOLUME_PATH MAX_RESTARTS
[[ $VERSION != *.whl ]] || fail 65 "VERSION is a file here, $VERSION; for GKE a release or git+URL@REVISION"
REQUIREMENT=$(requirement tpu)
TRAIN=(train --config "configs/$(basename "$CONFIG")" --workdir "$WORKDIR" --distributed auto "${ARGS[@]}")

case $VERB in
  start)
    [[ -f $CONFIG ]] || fail 65 "CONFIG is $CONFIG, and there is no such file here"
    manifest=$(render)
    # Made anew, since a JobSet's template cannot be changed, and one that has ended would stay ended.
    run kubectl delete jobset "$NAME" --ignore-not-found --cascade=foreground
    run kubectl delete configmap "$NAME" --ignore-not-found
    run kubectl create configmap "$NAME" --from-file="$(dirname "$CONFIG")"
    if [[ ${PASS:-} ]]; then apply_secret; else run kubectl delete secret "$NAME" --ignore-not-found; fi
    run_with_input "$manifest" kubectl apply -f -
    ;;
  logs)
    run kubectl logs --selector "jobset.sigs.k8s.io/jobset-name=$NAME" --follow --prefix --max-log-requests "$NUM_NODES"
    ;;
  status)
    run kubectl get jobset "$NAME"
    run kubectl get pods --selector "jobset.sigs.k8s.io/jobset-name=$NAME" --output wide
    ;;
  delete)
    run kubectl delete jobset "$NAME" --ignore-not-found --cascade=foreground
    run kubectl delete configmap "$NAME" --ignore-not-found
    run kubectl delete secret "$NAME" --ignore-not-found
    ;;
  secret) secret ;;
esac
