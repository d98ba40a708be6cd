#!/bin/sh
# The guest's first and only process: makes the machine usable, runs the tests, ends the machine.
# What goes to the second serial port is what the host reads; the kernel has the first for itself.

# Whatever the host did not supply itself.
/bin/busybox --install -s /bin 2>/dev/null
export PATH=/sbin:/bin:/usr/sbin:/usr/bin HOME=/root TMPDIR=/tmp RUST_BACKTRACE=1
export MESH_TEST_ARTIFACTS=/tmp/artifacts

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
# Not a mount: the checkout, whose folders are copied to where they are on the host, may lie below /tmp.
mkdir -p /tmp
mount -t tmpfs tmpfs /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mount -t debugfs debugfs /sys/kernel/debug
mount -t tracefs tracefs /sys/kernel/tracing
mkdir -p /run/netns
ln -s /proc/self/fd /dev/fd

stty -F /dev/ttyS1 raw -echo
exec >/dev/ttyS1 2>&1

echo "nodemesh-guest: up, Linux $(uname -r)"
if grep -q nodemesh.probe /proc/cmdline; then
    sleep 1; poweroff -f
fi

# Numbered in the order of their dependencies.
for module in /modules/*.ko; do
    insmod "$module" || echo "nodemesh-guest: cannot load $module"
done

ip link set lo up
sysctl -q -w kernel.panic_on_oops=1
ulimit -n 65536

/bin/sh /run-tests.sh

# What failed tests left, through the third serial port; bounded, since that port is slow.
if [ -n "$(ls -A "$MESH_TEST_ARTIFACTS" 2>/dev/null)" ]; then
    stty -F /dev/ttyS2 raw -echo
    tar -c -z -C "$MESH_TEST_ARTIFACTS" . | head -c 8000000 >/dev/ttyS2
fi

echo "nodemesh-guest: down"
sync
sleep 1
poweroff -f
