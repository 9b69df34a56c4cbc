#!/usr/bin/env bash
# Runs one run as N processes on this machine, its GPUs (or CPU devices) split among them.
# Use: bash launch/local.sh N --config=configs/FILE.py --workdir=FOLDER [further arguments]
# GPUs: those in CUDA_VISIBLE_DEVICES, or all; without any, each process has CPU_DEVICES (1) of them.
# PYTHON (.venv, else python3), PORT (a free one), MODULE (dmq_jax.main): what runs, where they meet.
# Ends with the status of the first process that fails; 75 means stopped and saved: run it again.
set -euo pipefail
if [ $# -lt 2 ] || ! [ "$1" -ge 1 ] 2>/dev/null; then
    echo "Error: $0 $*: expected a number of processes, then the arguments of dmq_jax.main" >&2
    exit 2
fi
count=$1
shift
root=$(cd "$(dirname "$0")/.." && pwd)
python=$root/.venv/bin/python
[ -x "$python" ] || python=python3
python=${PYTHON:-$python}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
free_port='import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
port=${PORT:-$("$python" -c "$free_port")}

gpus=()
if [ "${JAX_PLATFORMS:-}" != cpu ]; then
    if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
        IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
    elif command -v nvidia-smi >/dev/null; then
        mapfile -t gpus < <(nvidia-smi --query-gpu=index --format=csv,noheader)
    fi
fi
if [ ${#gpus[@]} -gt 0 ] && [ $((${#gpus[@]} % count)) -ne 0 ]; then
    echo "Error: ${#gpus[@]} GPUs cannot be split evenly among $count processes" >&2
    exit 2
fi

pids=()
stop() {
    for pid in "${pids[@]}"; do kill -s "$1" "$pid" 2>/dev/null || true; done
}
# A scheduler or Ctrl-C signals this script; the run saves and stops when its processes hear of it
# (of SIGTERM: a shell starts what runs beside it with SIGINT ignored). Asked twice, it does not wait.
asked=
trap 'trap "stop KILL" TERM INT; asked=1; stop TERM' TERM INT
for ((id = 0; id < count; id++)); do
    devices=()
    if [ ${#gpus[@]} -gt 0 ]; then
        each=$((${#gpus[@]} / count))
        devices=("CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${gpus[*]:id * each:each}")")
    else
        flags="${XLA_FLAGS:-} --xla_force_host_platform_device_count=${CPU_DEVICES:-1}"
        devices=(JAX_PLATFORMS=cpu "XLA_FLAGS=$flags")
    fi
    env "${devices[@]}" "$python" -m "${MODULE:-dmq_jax.main}" "$@" \
        --coordinator="127.0.0.1:$port" --num_processes="$count" --process_id="$id" &
    pids+=($!)
    # Without all of them none has begun: those that heard the signal end by it.
    [ -z "$asked" ] || { kill "$!"; break; }
done

# By looking, not by wait -n, which misses those that a signal ended before it was called (bash 5.2).
exec {silence}<> <(:)
status=0
while [ ${#pids[@]} -gt 0 ]; do
    for i in "${!pids[@]}"; do
        ! kill -0 "${pids[i]}" 2>/dev/null || continue
        code=0
        wait "${pids[i]}" || code=$?
        unset "pids[i]"
        # Ended by a signal to stop that came before it listened: nothing is lost.
        [ "$code" -ne 143 ] || [ -z "$asked" ] || code=75
        # 69, and 134 of jax itself: another process is gone, of which that one's own status says more.
        if [[ $code != 0 && $status =~ ^(0|69|134)$ ]]; then
            status=$code
            ended=$i
        fi
    done
    # Told also where the others have noticed and ended themselves before this look.
    if [[ $count -gt 1 && ! $status =~ ^(0|2|69|75)$ && -z ${told:-} ]]; then
        told=1
        echo "Error: process $ended of $count ended with status $status: the others are stopped" >&2
        stop KILL
    fi
    [ ${#pids[@]} -eq 0 ] || read -rt 0.1 <&"$silence" || true
done
exit "$status"
