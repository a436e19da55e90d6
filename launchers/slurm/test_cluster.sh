#!/usr/bin/env bash
# A real SLURM with several nodes, all of them this machine, for tests: root only, no systemd; two GPUs in name on each
# node, and the feature `tested` on all.
# Usage: bash launchers/slurm/test_cluster.sh start DIR [NODES]   then: . DIR/env.sh   (installs Debian's packages if missing)
#        bash launchers/slurm/test_cluster.sh stop DIR
# Status 3: SLURM is not there and cannot be installed.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,6s/^# //p' "${BASH_SOURCE[0]}" && exit 2; }
mkdir -p "$2"
dir=$(cd "$2" && pwd -P) num_nodes=${3:-3} host=$(hostname -s)
[ ${#dir} -le 60 ] || { echo "error: $dir is ${#dir} characters long; its sockets need at most 60" >&2 && exit 2; }
[[ $dir =~ ^[A-Za-z0-9/._-]+$ ]] || { echo "error: $dir: slurm.conf takes letters, digits, / . _ and - only" >&2 && exit 2; }
mark="# test cluster $dir"
PATH=$PATH:/usr/sbin:/sbin
export SLURM_CONF=$dir/slurm.conf

install() {
  local package missing=()
  for package in munge:munged slurmctld:slurmctld slurmd:slurmd slurm-client:srun; do
    command -v "${package#*:}" >/dev/null || missing+=("${package%:*}")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  if [ $EUID -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "missing: ${missing[*]}" >&2
    exit 3
  fi
  # Services would be started by the installation, with settings of their own.
  local policy=/usr/sbin/policy-rc.d made=''
  [ -e $policy ] || { printf '#!/bin/sh\nexit 101\n' >$policy && chmod 755 $policy && made=yes; }
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; } \
    >"$dir/apt.log" 2>&1 || { tail -5 "$dir/apt.log" >&2 && missing=failed; }
  [ -z "$made" ] || rm -f $policy
  [ "${missing[*]}" != failed ] || exit 3
}

configure() { # PORT PREFIX
  local i
  [ -n "$(getent ahostsv4 "$host")" ] || echo "127.0.0.1 $host $mark" >>/etc/hosts
  for ((i = 1; i <= num_nodes; i++)); do echo "127.0.0.1 $2$i $mark" >>/etc/hosts; done
  cat <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$1
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for cred_expire before it may start again; 5 s is the least.
AuthInfo=socket=$dir/munge.socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
GresTypes=gpu
SelectType=select/cons_tres
# Memory is given out too, as on most clusters.
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1
PriorityType=priority/basic
JobRequeue=1
ReturnToService=2
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
KillWait=5
MinJobAge=300
SlurmdTimeout=60
InactiveLimit=0
CONF
  for ((i = 1; i <= num_nodes; i++)); do
    echo "NodeName=$2$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$(($1 + i)) CPUs=4 RealMemory=4096 Gres=gpu:2 Feature=tested State=UNKNOWN"
  done
  echo "PartitionName=main Nodes=$2[1-$num_nodes] Default=YES MaxTime=INFINITE OverSubscribe=NO State=UP"
}

start() {
  local i prefix=n$$- port=$((17000 + $$ % 300 * 20))
  install
  mkdir -p "$dir/state"
  chmod 755 "$dir"
  (umask 077 && head -c 128 /dev/urandom >"$dir/munge.key")
  configure "$port" "$prefix" >"$SLURM_CONF"
  echo "Name=gpu File=/dev/null,/dev/zero" >"$dir/gres.conf" # any two devices
  echo "export SLURM_CONF=$SLURM_CONF" >"$dir/env.sh"
  munged --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" --force \
    --log-file="$dir/munged.log" --seed-file="$dir/munged.seed" --num-threads=2
  slurmctld -f "$SLURM_CONF"
  for ((i = 1; i <= num_nodes; i++)); do
    mkdir -p "$dir/spool-$prefix$i"
    slurmd -f "$SLURM_CONF" -N "$prefix$i"
  done
  for ((i = 0; i < 150; i++)); do
    [ "$(sinfo -h -N -o %T 2>/dev/null | grep -c idle)" = "$num_nodes" ] && return
    sleep 0.2
  done
  tail -n 5 "$dir"/*.log >&2
  exit 1
}

stop() {
  local pid_file pid i
  timeout 10 scancel --state=RUNNING,PENDING --user=root 2>/dev/null || true
  for ((i = 0; i < 60; i++)); do [ -n "$(timeout 10 squeue -h 2>/dev/null)" ] || break; sleep 0.2; done
  for pid_file in "$dir"/slurmd-*.pid "$dir/slurmctld.pid" "$dir/munged.pid"; do
    pid=$(cat "$pid_file" 2>/dev/null) || continue
    kill "$pid" 2>/dev/null || continue
    for ((i = 0; i < 50; i++)); do [ -d "/proc/$pid" ] || break; sleep 0.1; done
    kill -KILL "$pid" 2>/dev/null || true
  done
  # In place: in a container the hosts file is a mount, which cannot be replaced.
  others=$(grep -vF "$mark" /etc/hosts) && printf '%s\n' "$others" >/etc/hosts
}

case $1 in
  start) start ;;
  stop) stop ;;
  *) echo "error: $1: it is start or stop" >&2 && exit 2 ;;
esac
