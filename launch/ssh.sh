#!/usr/bin/env bash
# One training run on machines that ssh reaches without a password, from the repository's root:
#   launch/ssh.sh hosts.txt --config=configs/wmt14.py:en_de_base --workdir=/shared/runs/base \
#     --config.model.dtype=bfloat16
# hosts.txt names a machine a line; the first is the coordinator, and all must reach it by that name. On each, the
# repository lies at DIRECTORY (by default the path it has here) with its .venv, and sees the same workdir.
# Ctrl-C, SIGTERM and the end of the terminal reach the trainers, which save and stop; run the same command again to go on.
set -uo pipefail
[ $# -ge 2 ] || { echo "usage: launch/ssh.sh HOSTFILE --config=FILE --workdir=DIR [train.py's flags]" >&2; exit 2; }

machines=()
while read -r machine _ || [ -n "$machine" ]; do # macOS's bash has no mapfile
  machine=${machine%$'\r'}
  case $machine in '' | '#'*) ;; *) machines+=("$machine") ;; esac
done <"$1"
shift
[ "${#machines[@]}" -gt 0 ] || { echo "launch/ssh.sh: the host file names no machine" >&2; exit 2; }
directory=${DIRECTORY:-$PWD}
coordinator=${machines[0]#*@}:${PORT:-8476}
mark=/tmp/run-$$-$RANDOM

# A trainer writes its pid and then looks for .stop; this writes .stop and then looks for the pid: none is missed.
# shellcheck disable=SC2329  # the traps invoke it
stop() {
  local i
  for i in "${!machines[@]}"; do
    ssh -o BatchMode=yes "${machines[$i]}" \
      "echo $((128 + $1)) >$mark.$i.stop; [ ! -s $mark.$i ] || kill -$1 \$(cat $mark.$i)" </dev/null &
  done
}
trap 'stop 15' TERM
trap 'stop 2' INT
trap 'trap "" HUP; stop 1' HUP

for i in "${!machines[@]}"; do
  flags=$(printf '%q ' "$@" --coordinator="$coordinator" --num_processes="${#machines[@]}" --process_id="$i")
  remote="cd $(printf %q "$directory") && echo \$\$ >$mark.$i && "
  remote+="{ [ ! -e $mark.$i.stop ] || exit \$(cat $mark.$i.stop); } && "
  remote+="exec ${PYTHON:-.venv/bin/python} train.py $flags"
  (
    trap '' HUP # the sessions outlive the terminal until the trainers have saved
    exec ssh -o BatchMode=yes "${machines[$i]}" "bash -c $(printf %q "$remote")" </dev/null 2> >(sed -u "s/^/[$i] /" >&2)
  ) &
  sessions[i]=$!
done

code=0
for i in "${!machines[@]}"; do
  while :; do
    wait "${sessions[$i]}"
    one=$?
    kill -0 "${sessions[$i]}" 2>/dev/null || break
  done
  [ "$one" = 0 ] || code=$one
  ssh -o BatchMode=yes "${machines[$i]}" "rm -f $mark.$i $mark.$i.stop" </dev/null
done
exit "$code"
