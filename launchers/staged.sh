# Functions of the launchers that run stages one after another; sourced by them. They set `logs` (a folder) and
# `go_on` (the command that goes on from where they stopped), and name their stages by `stages NAME=MINUTES...`.
readonly rto=.venv/bin/rto
stage_pid='' pool_pid='' pool_keys=() stage=0 stage_seconds=() began=$SECONDS

stop() { # PID: SIGTERM, and SIGKILL if it has not ended after 20 s
  [ -n "$1" ] || return 0
  kill -TERM "$1" 2>/dev/null || return 0
  for _ in $(seq 100); do
    kill -0 "$1" 2>/dev/null || return 0
    sleep 0.2
  done
  kill -KILL "$1" 2>/dev/null || true
}
trap 'stop "$stage_pid"; stop "$pool_pid"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

stages() { # SECONDS...: what each stage takes on two quiet cores
  stage_seconds=("$@")
}

time_left() { # of this stage and those after it, as fast as the ones before were
  local left=0 done=0 number
  for number in "${!stage_seconds[@]}"; do
    if [ "$number" -lt $((stage - 1)) ]; then done=$((done + stage_seconds[number])); else left=$((left + stage_seconds[number])); fi
  done
  local took=$((SECONDS - began))
  # What was there already took no time, and says nothing of what is to come; the first stages, short and with the
  # set-up before them, say little.
  local said=$(((left + done) / 4))
  [ "$done" -gt 0 ] && [ "$took" -gt "$done" ] && left=$((left * (took + said) / (done + said)))
  if [ "$left" -lt 120 ]; then echo "$left s"; else echo "$(((left + 30) / 60)) min"; fi
}

announce() { # TITLE
  stage=$((stage + 1))
  echo "[$stage/${#stage_seconds[@]}] $1: about ${stage_seconds[stage - 1]} s; $(time_left) left"
}

show_end_of() { # LOG: its last error message, else its last lines
  local line
  line=$(grep -n '^error' "$1" | tail -1 | cut -d: -f1) || true
  if [ -n "$line" ]; then tail -n "+$line" "$1" | head -40; else tail -n 30 "$1"; fi >&2
}

give_up() { # LOG
  show_end_of "$1"
  echo "error: this stage failed; its log is $1. To go on from here:" >&2
  echo "  $go_on" >&2
  exit 1
}

run() { # LOG COMMAND...: progress on a terminal, everything else in the log
  local log=$logs/$1.log begin=$SECONDS
  shift
  # In the background, so that a signal to this script is acted upon at once.
  if [ -t 1 ]; then "$@" 2>>"$log" & else "$@" >>"$log" 2>&1 & fi
  stage_pid=$!
  wait "$stage_pid" || give_up "$log"
  stage_pid=''
  echo "      done in $((SECONDS - begin)) s"
}

start_pool() { # FOLDER MODEL OPTION...: of `rto pool`; its token and address lie in the folder
  mkdir -p "$1"
  rm -f "$1/address"
  pool_folder=$1
  "$rto" pool "${@:2}" --token-file "$1/token" --address-file "$1/address" --log-file "$1/server.log" >"$logs/pool.log" 2>&1 &
  pool_pid=$!
}

wait_for_pool() {
  until [ -s "$pool_folder/address" ]; do
    kill -0 "$pool_pid" 2>/dev/null || give_up "$logs/pool.log"
    sleep 1
  done
  pool_keys=("rollout.servers=[$(cat "$pool_folder/address")]" "rollout.token_file=$pool_folder/token")
}
