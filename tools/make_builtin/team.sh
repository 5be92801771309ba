#!/bin/sh
# Runs one training as N single-threaded processes: team.sh N SCRIPT [OPTIONS]. For busy CPU cores; needs no GPU.
# Each process gets its own session, because Linux shares the cores among sessions first (sched_autogroup).
n=$1
script=$2
shift 2
rank=1
while [ "$rank" -lt "$n" ]; do
    setsid "${PYTHON:-python}" "$(dirname "$0")/$script" --threads 1 --team "$n" --rank "$rank" "$@" &
    rank=$((rank + 1))
done
setsid -w "${PYTHON:-python}" "$(dirname "$0")/$script" --threads 1 --team "$n" --rank 0 "$@"
wait
