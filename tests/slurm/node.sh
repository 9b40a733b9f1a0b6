#!/usr/bin/env bash
# Switch on one node of the cluster: FOLDER FIRST_THREE_OCTETS NUMBER. Called again with `inside`, this is its first
# process, in its own namespaces: killing it is like pulling the plug.
set -euo pipefail
folder=$1 net=$2 number=$3 name=n$3

if [ "${4:-}" != inside ]; then
    setsid unshare --pid --net --uts --ipc --mount --fork --kill-child --mount-proc \
        bash "$0" "$folder" "$net" "$number" inside < /dev/null > "$folder/log/$name.out" 2>&1 &
    parent=$!
    until child=$(< "/proc/$parent/task/$parent/children") && [ -n "$child" ] &&
        [ "$(readlink "/proc/${child% }/ns/net")" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.01; done
    ip link add "node$number" type veth peer name eth0 netns "${child% }"
    ip link set "node$number" master bridge up
    echo "${child% }" > "$folder/$name.pid"
    exit
fi

hostname "$name"
ip link set lo up
until ip link show eth0 > /dev/null 2>&1; do sleep 0.01; done
ip addr add "$net.$((10 + number))/24" dev eth0
ip link set eth0 up
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
slurmd -D -N "$name" &
while :; do wait; sleep 0.2; done  # a node outlives its slurmd
