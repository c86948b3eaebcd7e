#!/bin/bash
# Two hosts on one machine: network namespaces joined by a pair of virtual cards. One rank on each trains over gloo,
# the cable is cut in the middle of the run, and one host resumes alone.
#
#   two_hosts.sh FOLDER [key=value ...]               exit code 77: this machine does not permit namespaces
#   HOSTFILE=1 two_hosts.sh FOLDER [key=value ...]    both start by DeepSpeed's hostfile and train to the end instead
set -u
folder=$(mkdir -p "$1" && cd "$1" && pwd)
shift
root=$(cd "$(dirname "$0")/../.." && pwd)
one=sycoca-one-$$ two=sycoca-two-$$
python=${PYTHON:-python}

cleanup() {
  for host in $one $two; do
    ip netns pids $host 2>/dev/null | xargs -r kill -9 2>/dev/null
    ip netns delete $host 2>/dev/null
  done
}
trap cleanup EXIT

if ! { ip netns add $one && ip netns add $two && ip link add one-$$ netns $one type veth peer name two-$$ netns $two; } \
    2>"$folder/refused.txt"; then
  echo "network namespaces are not permitted here: $(head -1 "$folder/refused.txt")"
  exit 77
fi
for pair in "$one one-$$ 10.77.0.1" "$two two-$$ 10.77.0.2"; do
  read -r host card address <<<"$pair"
  ip -n $host link set lo up
  ip -n $host address add $address/24 dev $card
  ip -n $host link set $card up
done

# host rank world card -- options of the command
rank() {
  local host=$1 number=$2 world=$3 card=$4
  shift 4
  ip netns exec $host env RANK=$number LOCAL_RANK=0 WORLD_SIZE=$world LOCAL_WORLD_SIZE=1 MASTER_ADDR=10.77.0.1 \
    MASTER_PORT=29500 GLOO_SOCKET_IFNAME=$card PYTHONUNBUFFERED=1 \
    $python train/pretrain.py --config ds_zero2.json --run-dir "$folder/run" "$@"
}

cd "$root"
if [ -n "${HOSTFILE:-}" ]; then
  printf '10.77.0.1 slots=1\n10.77.0.2 slots=1\n' >"$folder/hosts"
  launch() {
    local host=$1 number=$2 card=$3
    shift 3
    ip netns exec $host env GLOO_SOCKET_IFNAME=$card deepspeed --hostfile "$folder/hosts" --no_ssh --node_rank $number \
      --master_addr 10.77.0.1 train/pretrain.py --config ds_zero2.json --run-dir "$folder/run" "$@"
  }
  launch $one 0 one-$$ "$@" >"$folder/one.txt" 2>&1 &
  first=$!
  launch $two 1 two-$$ "$@" >"$folder/two.txt" 2>&1
  code_two=$?
  wait $first
  echo "hostfile: one ended with $?, two with $code_two"
  exit
fi
rank $one 0 2 one-$$ steps=100000 save_every=5 timeout_s=10 "$@" >"$folder/one.txt" 2>&1 &
first=$!
rank $two 1 2 two-$$ steps=100000 save_every=5 timeout_s=10 "$@" >"$folder/two.txt" 2>&1 &
second=$!
for _ in $(seq 600); do
  ls "$folder"/run/checkpoints/step_* >/dev/null 2>&1 && break
  kill -0 $first $second 2>/dev/null || break
  sleep 0.1
done
ip -n $two link set two-$$ down
cut=$(date +%s)
echo "cut"
wait $first
code_one=$?
wait $second
code_two=$?
echo "one ended with $code_one, two with $code_two, $(($(date +%s) - cut)) s after the cut"
newest=$(ls "$folder/run/checkpoints" | grep -E '^step_[0-9]{8}$' | tail -1 | sed 's/step_0*//')
rank $one 0 1 lo --resume --reshape steps=$((newest + 2)) save_every=5 "$@" >"$folder/alone.txt" 2>&1
echo "alone from step $newest: ended with $?"
