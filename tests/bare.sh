#!/bin/sh
# bare.sh - README's two commands in a new Debian that has nothing but git: `make test-bare`. Needs root and debootstrap.
cd "$(dirname "$0")/.." || exit 1
if [ "$(id -u)" != 0 ] || ! command -v debootstrap >/dev/null 2>&1; then
    echo "make test-bare needs root and debootstrap (apt-get install debootstrap)"
    exit 1
fi
root=$(pwd)/build/bare
if [ ! -f "$root.tar" ]; then
    rm -rf "$root"
    debootstrap --variant=minbase --include=git,ca-certificates bookworm "$root" >build/bare.log 2>&1 ||
        { tail build/bare.log; exit 1; }
    tar -C "$root" -cf "$root.tar" .
fi

unpack() { # the bare system, this machine's package sources, and the repository as a clone has it
    rm -rf "$root" && mkdir -p "$root/moe" && tar -C "$root" -xf "$root.tar" || return 1
    cp /etc/resolv.conf /etc/hosts "$root/etc/"
    rm -f "$root/etc/apt/sources.list"
    for name in sources.list sources.list.d apt.conf.d; do
        if [ -e "/etc/apt/$name" ]; then cp -r "/etc/apt/$name" "$root/etc/apt/"; fi
    done
    git ls-files -co --exclude-standard | tar -cf - -T - | tar -C "$root/moe" -xf -
}

passed=0
failed=0
for command in "sh examples/demo.sh" "sh tests/run.sh"; do
    echo "==== $command"
    unpack || exit 1
    if chroot "$root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root sh -c \
        "! command -v cc && ! command -v make && cd /moe && $command" </dev/null; then
        passed=$((passed + 1))
    else
        echo "FAILED: $command"
        failed=$((failed + 1))
    fi
done
rm -rf "$root"
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
