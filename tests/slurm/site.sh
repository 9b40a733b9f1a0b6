#!/usr/bin/env bash
# The machine room of a throw-away cluster: FOLDER FIRST_THREE_OCTETS NODES GPUS. This is the first process in its own
# process, network, host name and mount namespaces. When it ends, so do the daemons, the nodes and their networks.
set -euo pipefail
folder=$1 net=$2 nodes=$3 gpus=$4
here=$(cd "$(dirname "$0")" && pwd)
hostname login
ip link set lo up
ip link add bridge type bridge
ip addr add "$net.1/24" dev bridge
ip link set bridge up

# Names are resolved from this file only: a lookup that waits for a server would delay every connection of torch.
echo "127.0.0.1 localhost" > "$folder/hosts"
echo "$net.1 login" >> "$folder/hosts"
for number in $(seq "$nodes"); do echo "$net.$((10 + number)) n$number" >> "$folder/hosts"; done
echo "hosts: files" > "$folder/nsswitch.conf"
echo "nameserver 127.0.0.1" > "$folder/resolv.conf"
for name in hosts nsswitch.conf resolv.conf; do
    touch "/etc/$name" 2> /dev/null || true
    mount --bind "$folder/$name" "/etc/$name"
done

mkdir -p "$folder"/{state,spool,log,dev,munge}
chmod 711 "$folder/munge"
for number in $(seq 0 $((gpus - 1))); do mknod -m 666 "$folder/dev/gpu$number" c 1 3; done  # Slurm only checks them
(umask 077 && head -c 128 /dev/urandom > "$folder/munge/key")
munged --foreground --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/munge/pid" \
    --log-file="$folder/log/munged" --seed-file="$folder/munge/seed" &
until [ -S "$folder/munge/socket" ]; do sleep 0.02; done
slurmctld -D > "$folder/log/slurmctld.out" 2>&1 &
for number in $(seq "$nodes"); do bash "$here/node.sh" "$folder" "$net" "$number"; done
touch "$folder/ready"
while :; do wait; sleep 0.2; done  # reap the remaining processes of nodes that are gone
