# Clears away what a machine leaves on its host, see janitor.rs. $1 is the first process of the machine, $2 the link to it, $3 the
# directory for its files.

# The end of input says that the machine is not needed any more, or that whoever needed it is gone.
read -r _

while [ -d "/proc/$1" ]; do sleep 0.05; done
# The kernel would do it, too, when the last connection into the machine has timed out.
ip link delete "$2" 2>/dev/null
# Of version 2 there is one hierarchy, of version 1 there are several. A cgroup that is in use is not removed.
for pods in /sys/fs/cgroup/k8s.io /sys/fs/cgroup/*/k8s.io; do
    [ -d "$pods" ] && find "$pods" -depth -type d -exec rmdir {} \; 2>/dev/null
done
rm -rf "$3"
