# shellcheck shell=bash
# What the scripts of this folder share: options, the environment file, quoting. Sourced, not run; needs bash 4.4.

# Exit codes are those of neox-jax: 2 bad usage, 65 what the user must mend, 75 start the same command again.
LAUNCH=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
SCRIPT=${0##*/}
DRY_RUN="" VERB="" ENV_FILE=$LAUNCH/run.env

# Everything that an environment file may set: unset first, so that nothing comes from the caller's own environment.
SETTINGS=(
  NAME CONFIG WORKDIR ARGS PASS NEOX_JAX VERSION
  PROJECT ZONE ACCELERATOR_TYPE RUNTIME_VERSION SPOT QUEUED SETUP FETCH_TO POLL_SECONDS
  IMAGE TPU_ACCELERATOR TPU_TOPOLOGY CHIPS_PER_NODE VOLUME_CLAIM VOLUME_PATH MAX_RESTARTS
  NUM_NODES GPUS_PER_NODE TASKS_PER_NODE TIME_LIMIT SLURM_ARGS
  NUM_PROCESSES CPU_DEVICES PORT
)

say() { printf '%s: %s\n' "$SCRIPT" "$*" >&2; }

# fail CODE MESSAGE
fail() {
  local code=$1
  shift
  say "$*"
  exit "$code"
}

# The comment at the head of the script is its help.
show_help() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }

# parse_options VERBS "$@": sets VERB, ENV_FILE and DRY_RUN. VERBS are words; none: the script takes no verb.
parse_options() {
  local verbs=$1
  shift
  while (($#)); do
    case $1 in
      --help | -h) show_help && exit 0 ;;
      --dry-run) DRY_RUN=1 ;;
      --env=*) ENV_FILE=${1#--env=} ;;
      --env)
        (($# > 1)) || fail 2 "--env wants a file"
        ENV_FILE=$2
        shift
        ;;
      -*) fail 2 "unknown option $1; --help lists them" ;;
      *)
        [[ -z $VERB && " $verbs " == *" $1 "* ]] || fail 2 "unexpected '$1'; ${verbs:+one of: $verbs; }see --help"
        VERB=$1
        ;;
    esac
    shift
  done
  [[ -n $VERB || -z $verbs ]] || fail 2 "say what to do, one of: $verbs"
}

# load_env NAME...: reads ENV_FILE, which must set all of these.
load_env() {
  local name errors missing=()
  [[ -r $ENV_FILE ]] || fail 65 "no environment file $ENV_FILE; copy run.env.example to it and fill it in"
  ENV_FILE=$(cd "$(dirname "$ENV_FILE")" && pwd)/$(basename "$ENV_FILE")
  # What bash says of a bad line may hold a secret: only the line's number is shown.
  errors=$(bash -eu -c 'source "$1"' bash "$ENV_FILE" 2>&1 >/dev/null) || {
    [[ $errors =~ line\ ([0-9]+) ]]
    fail 65 "$ENV_FILE, line ${BASH_REMATCH[1]:-unknown}: no valid bash; quote values with spaces or signs in them"
  }
  unset "${SETTINGS[@]}"
  # shellcheck disable=SC1090
  source "$ENV_FILE"
  for name in "$@"; do
    [[ -n ${!name:-} ]] || missing+=("$name")
  done
  ((${#missing[@]} == 0)) || fail 65 "$ENV_FILE does not set ${missing[*]}"
  # shellcheck disable=SC2153
  [[ $NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    fail 65 "NAME is '$NAME'; wanted at most 40 of a-z, 0-9 and -, with a letter first and no - last"
  for name in ${PASS:-}; do
    [[ $name =~ ^[A-Za-z_][A-Za-z0-9_]*$ && -n ${!name:-} ]] ||
      fail 65 "PASS names $name, which neither $ENV_FILE nor the environment sets"
  done
  [[ -z ${PASS:-} || -z $(find -L "$ENV_FILE" \( -perm -040 -o -perm -004 \)) ]] ||
    fail 65 "$ENV_FILE holds what PASS names and others can read it; chmod 600 it"
  [[ -n ${ARGS+set} ]] || ARGS=()
  [[ $(declare -p ARGS) == "declare -a"* ]] || fail 65 "ARGS must be a list: ARGS=(--config.a=1 --config.b=2)"
}

# Gives the commands started from here on what PASS names.
export_passed() {
  local name
  for name in ${PASS:-}; do export "${name?}"; done
}

# The requirement that installs VERSION (a release, a git URL at a revision, a wheel) with the given extra.
requirement() {
  case $VERSION in
    git+*@*) printf 'neox_jax[%s] @ %s' "$1" "$VERSION" ;;
    *.whl) printf '%s[%s]' "$VERSION" "$1" ;;
    [0-9]*) printf 'neox_jax[%s]==%s' "$1" "$VERSION" ;;
    *) fail 65 "VERSION is '$VERSION'; wanted a release (0.1.0), git+URL@REVISION, or a file *.whl" ;;
  esac
}

# The words as a line to paste: each quoted where it needs it.
quoted() {
  local word words=()
  for word in "$@"; do
    if [[ -z $word || $word == *[!A-Za-z0-9_@%+=:,./-]* ]]; then
      word="'${word//\'/"'\"'\"'"}'"
    fi
    words+=("$word")
  done
  local IFS=' '
  printf '%s\n' "${words[*]}"
}

# Runs a command, or prints it in a dry run.
run() {
  if [[ $DRY_RUN ]]; then quoted "$@"; else "$@"; fi
}

# run_with_input TEXT COMMAND...: the same, with TEXT as its standard input.
run_with_input() {
  local text=$1
  shift
  if [[ $DRY_RUN ]]; then
    printf "%s <<'END_OF_INPUT'\n%s\nEND_OF_INPUT\n" "$(quoted "$@")" "$text"
  else
    "$@" <<<"$text"
  fi
}

# worst CODE...: what a run of several processes ended with, of their codes; `gone` is one that left none. What is to be
# mended before 75, 75 before 0; one that was killed (above 128) matters where no other says 75.
worst() {
  local code again="" killed=""
  for code in "$@"; do
    if [[ $code == 75 || $code == gone ]]; then
      again=75
    elif ((code > 128)); then
      killed=$code
    elif ((code != 0)); then
      printf '%s' "$code"
      return
    fi
  done
  printf '%s' "${again:-${killed:-0}}"
}
