# The first process of a machine within the machine, see machine.rs. $1 is a directory for what it writes, $2 its address, $3 the
# addresses of Services.
set -eu

# What is mounted from here on is seen by containers, and by nobody outside.
mount --make-rshared /
mount -t tmpfs tmpfs /run
for dir in etc var; do
    mkdir -p "$1/$dir" "$1/$dir.work"
    mount -t overlay overlay -o "lowerdir=/$dir,upperdir=$1/$dir,workdir=$1/$dir.work" "/$dir"
done

# Layers of containers cannot lie on an overlay.
mkdir -p "$1/containerd" /var/lib/containerd
mount --bind "$1/containerd" /var/lib/containerd

# kubelet insists on these, and would set them for the whole machine.
for setting in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1; do
    file="$1/$(basename "${setting%=*}")"
    echo "${setting#*=}" >"$file"
    mount --bind "$file" "/proc/sys/${setting%=*}"
done

ip link set lo up
# The other end is made outside, and put in here.
until ip address add "$2" dev eth0 2>/dev/null; do sleep 0.05; done
ip link set eth0 up
# kube-proxy turns them into those of pods, but only when there is a route at all. Nothing else is to be reached.
ip route add "$3" dev eth0
echo 1 >/proc/sys/net/ipv4/ip_forward

echo ready

# The first process has to bury the orphans, and ends only by a signal it asked for. With it goes everything in here.
trap 'exit 0' TERM
sleep infinity &
wait
