# The phases of an experiment in processes side by side; sourced by its script. `command` is what runs it, an array.
# Needs: root, seeds (how many of the design's), lanes (how many processes, each with a pool), lane_args (an array).
pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true' EXIT

in_lanes() { # PHASE: the seeds dealt out over the lanes
  local lane chosen seed pid
  pids=()
  for lane in $(seq 0 $((lanes - 1))); do
    chosen=''
    for seed in $(seq "$lane" "$lanes" $((seeds - 1))); do chosen+=${chosen:+,}$seed; done
    [ -n "$chosen" ] || continue
    echo "$1, seeds $chosen: $root/$1-$lane.log"
    "${command[@]}" --phase "$1" --num-seeds "$seeds" --seeds "$chosen" "${lane_args[@]}" >>"$root/$1-$lane.log" 2>&1 &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do
    wait "$pid" || { echo "error: a lane failed; its log says why" >&2 && exit 1; }
  done
}

experiment() {
  mkdir -p "$root"
  in_lanes tune
  in_lanes compare
  "${command[@]}" --phase report --num-seeds "$seeds"
}
