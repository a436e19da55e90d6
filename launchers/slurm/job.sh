# The body of every sbatch script here, after its settings: runs in the batch shell, on the first node of the job.
# Starts the pool's servers on the last nodes, waits for all, and starts torchrun on the others. USR1 to this shell, which
# SLURM sends before the time is up, becomes <run_dir>/STOP: the trainer saves after its step and the job is queued again.
# A trainer that failed is started afresh inside the job, from its last checkpoint.
set +e -uo pipefail # whatever the preamble set
start=${SLURM_RESTART_COUNT:-0} attempt=0 stopping='' pool_steps=()
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
num_trainers=$((${#nodes[@]} - pool_nodes))
rto=$root/.venv/bin/rto token=$run_dir/pool/token status=$run_dir/run_status.json
port=$((20000 + SLURM_JOB_ID % 6000 * 2)) # below the ports that systems give out by themselves
: "${interface:=$(awk '$2 == "00000000" {print $1; exit}' /proc/net/route)}"
export NCCL_SOCKET_IFNAME=$interface GLOO_SOCKET_IFNAME=$interface OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR} # a lost rank is told in one line, not with torch's C++ stacks

say() { echo "[$(date +%T) job $SLURM_JOB_ID, start $start, attempt $attempt] $*"; }
join() { local IFS=,; echo "$*"; }
pause() { sleep 1 & wait $!; } # not a plain sleep, so that a signal is acted upon at once
finish() { # STATUS
  stop_pool
  exit "$1"
}
fail() { # MESSAGE...
  say "error: $*"
  finish 1
}

# A task on its node. $0 is the preamble, which may print and change the arguments; stdout is the command's alone.
# shellcheck disable=SC2016  # expanded on the node
readonly on_node='
  rto_command=("$@")
  if [ -n "$0" ]; then source "$0" >&2; fi
  [ $? -eq 0 ] || { echo "error: the last command of $0 failed on $SLURMD_NODENAME" >&2 && exit 1; }
  exec "${rto_command[@]}"'
case " ${step_options[*]} " in
  *' --container-image='*) node_preamble='' ;; # pyxis: the task starts in the image, where the modules are not
  *) node_preamble=$preamble ;;
esac

step() { # NAME FIRST COUNT COMMAND...: a task on each of COUNT nodes from FIRST on; always in a subshell, as & or $(...) give
  # --overlap: a step must not wait until an earlier one, whose attempt is still ending, has given its node back.
  # --export: a job submitted with --export=NONE would start its tasks without what this shell exports.
  exec srun --overlap --export=ALL --job-name="$1" --nodelist="$(join "${nodes[@]:$2:$3}")" --nodes="$3" --ntasks="$3" \
    --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" --kill-on-bad-exit=1 "${step_options[@]}" \
    bash -c "$on_node" "$node_preamble" "${container[@]}" "${@:4}"
}

start_pool() {
  local first group=()
  stop_pool
  announced=$run_dir/pool/announced-$SLURM_JOB_ID.$start.$attempt
  mkdir -p "$announced"
  # Made here, as servers on several nodes would each make one.
  [ -s "$token" ] || (umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$token")
  for ((first = num_trainers; first < ${#nodes[@]}; first += server_nodes)); do
    # The parts of a server larger than a node meet at the first of its nodes.
    [ "$server_nodes" -eq 1 ] || group=(--nodes "$server_nodes" --leader "${nodes[first]}:$((port + 1))")
    # shellcheck disable=SC2016  # expanded on the node
    step pool "$first" "$server_nodes" bash -c '
      [ "$0" -eq 1 ] || set -- "$@" --node-rank "$SLURM_NODEID"
      exec "${@:3}" --address-file "$1/$SLURMD_NODENAME.address" --log-file "$2/$SLURMD_NODENAME.log"' \
      "$server_nodes" "$announced" "$run_dir/pool" "$rto" pool "${pool_options[@]}" --token-file "$token" \
      --ready-within "$pool_wait_s" --interface "$interface" "${group[@]}" &
    pool_steps+=($!)
  done
}

pool_is_up() {
  local one
  [ ${#pool_steps[@]} -gt 0 ] || return 1
  for one in "${pool_steps[@]}"; do kill -0 "$one" 2>/dev/null || return 1; done
}

stop_pool() {
  [ ${#pool_steps[@]} -gt 0 ] || return 0
  # To the tasks, which stop their servers in order: srun itself would kill them at once.
  squeue -h -s -j "$SLURM_JOB_ID" -o '%i %j' | awk '$2 == "pool" {print $1}' | xargs -r scancel --quiet --signal=TERM 2>/dev/null
  local deadline=$((SECONDS + 30)) one
  for one in "${pool_steps[@]}"; do
    while kill -0 "$one" 2>/dev/null && [ $SECONDS -lt $deadline ]; do pause; done
  done
  kill -TERM "${pool_steps[@]}" 2>/dev/null
  wait "${pool_steps[@]}"
  pool_steps=()
}

num_announced() { cat "$announced"/*.address 2>/dev/null | wc -l; }

wait_for_pool() {
  local deadline=$((SECONDS + pool_wait_s))
  until [ "$(num_announced)" -ge "$num_servers" ] || [ -n "$stopping" ]; do
    pool_is_up || fail "the pool ended while it started; its logs are $run_dir/pool/*.log"
    [ $SECONDS -lt $deadline ] || fail "$(num_announced) of $num_servers inference servers were ready within" \
      "$pool_wait_s s; look into $run_dir/pool/*.log, or raise pool_wait_s"
    pause
  done
}

train() { # one attempt
  local trainer keys=()
  if [ "$num_servers" -gt 0 ]; then
    keys=("rollout.servers=[$(cat "$announced"/*.address | paste -sd,)]" "rollout.token_file=$token")
  fi
  rm -f "$status"
  RTO_ATTEMPT=$attempt step trainer 0 "$num_trainers" "$rto" node "$recipe" "${overrides[@]}" "${keys[@]}" \
    --nodes "$num_trainers" --ranks "$ranks_per_node" --meeting "$head:$port" \
    --meeting-id "$SLURM_JOB_ID.$start.$attempt" --interface "$interface" &
  trainer=$!
  while kill -0 "$trainer" 2>/dev/null; do
    [ -z "$stopping" ] || touch "$run_dir/STOP" # more than once, as a trainer removes what is older than itself
    pause
  done
}

decide() { # what follows the attempt, in $next: AGAIN, REQUEUE or END; and $code, the exit status of an END
  local line ended told=()
  [ -z "$stopping" ] || told=(--time-is-up)
  line=$(step decision 0 1 "$rto" after-attempt "$run_dir" --attempt "$attempt" --restarts "$restarts" "${told[@]}") ||
    fail "nothing decided what follows this attempt: its step failed, as those of a cancelled job do; how the attempt" \
      "ended is in $status, if a rank could say so; submit the job again to go on from the last checkpoint"
  read -r next code ended <<<"$line"
  say "$ended"
}

requeue() {
  stop_pool
  rm -f "$run_dir/STOP"
  say "the job is queued again"
  scontrol requeue "$SLURM_JOB_ID" && sleep 60 # SLURM ends this shell meanwhile
  exit 85
}

trap 'stopping=yes; touch "$run_dir/STOP"' USR1
trap 'finish 143' TERM
mkdir -p "$run_dir/pool"
head=$(step address 0 1 "$rto" address --interface "$interface") || fail "no address on interface $interface; set interface"
while :; do
  attempt=$((attempt + 1))
  say "trainer: $(join "${nodes[@]:0:num_trainers}"); pool: $(join "${nodes[@]:num_trainers}"); meeting: $head:$port"
  if [ "$num_servers" -gt 0 ]; then
    pool_is_up || start_pool
    wait_for_pool
  fi
  [ -z "$stopping" ] || requeue
  train
  decide
  case $next in
    AGAIN) ;;
    REQUEUE) requeue ;;
    END) finish "$code" ;;
    *) fail "not understood: $next $code" ;;
  esac
  case $(squeue -h -j "$SLURM_JOB_ID" -o %T) in
    RUNNING | '') ;; # no answer says nothing: SLURM's controller may be away for a moment
    *) finish 1 ;; # cancelled
  esac
done
