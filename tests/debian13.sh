#!/usr/bin/env bash
# hpclab's quick tests, the private Slurm's and the gang's on Debian 13, as an ordinary user: Python 3.13, Slurm 24.11, and torch 2.6
# of Debian, the oldest that hpclab takes. What is committed is tested. Needs root and mmdebstrap; leaves nothing behind.
#   bash tests/debian13.sh [arguments of pytest, in place of those tests]
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
root=$(mktemp -d)
trap 'rm -rf --one-file-system "$root"' EXIT
packages=ca-certificates,git,libnss-wrapper,make,munge,python3,python3-torch,python3-venv,slurm-wlm
mmdebstrap --quiet --variant=minbase --include="$packages" trixie "$root"
cp -r /etc/ssl/certs "$root/etc/ssl/"
for file in /etc/resolv.conf /etc/pip.conf; do [ ! -e "$file" ] || cp -L "$file" "$root/etc/"; done
git clone --quiet "$repository" "$root/home/student/hpclab"
chroot "$root" useradd --home-dir /home/student --shell /bin/bash student
chroot "$root" chown -R student: /home/student
# What runs inside ends with this, and its mounts are nobody else's.
unshare --mount --propagation=private --pid --fork --kill-child bash -s -- "$root" "$@" <<'INSIDE'
set -euo pipefail
root=$1; shift
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
# Debian's torch loads UCX, which would print a backtrace of its own for each rank that crashes.
inside() { chroot --userspec=student:student "$root" env -i UCX_HANDLE_ERRORS=none HOME=/home/student LANG=C.UTF-8 PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin bash -c 'cd ~/hpclab && "$@"' - "$@"; }
inside python3 -m venv --system-site-packages .venv # Debian's torch is the CPU's
inside sh -c 'grep -v "^torch" constraints.txt > ../constraints.txt'
inside .venv/bin/python -m pip --quiet install --constraint ../constraints.txt --editable '.[dev]'
inside touch .venv/.ready
if [ $# -gt 0 ]; then
    inside .venv/bin/python -m pytest "$@"
else
    status=0 # of both: the second says how it went also where the first has failed
    inside make --no-print-directory test-quick || status=$?
    inside .venv/bin/python -m pytest -n auto tests/test_gang.py tests/test_gangs.py tests/test_slurm.py || status=$?
    exit "$status"
fi
INSIDE
