"""A file system of limited size for the working directory, where this user may mount one.

Root may where it has CAP_SYS_ADMIN, others where they may create user namespaces. Containers often
allow neither; then the directory stays as it is, and what lies in it is only measured (`usage`).
"""

from __future__ import annotations

import ctypes
import os

_LIBC = ctypes.CDLL(None, use_errno=True)
_NEW_MOUNTS, _NEW_USER = 0x00020000, 0x10000000  # of unshare, from linux/sched.h
_NO_SUID, _NO_DEVICES, _RECURSIVE, _PRIVATE = 1 << 1, 1 << 2, 1 << 14, 1 << 18  # of mount
_SET_DUMPABLE = 4  # of prctl


def mount_scratch(most_bytes: int, most_files: int) -> bool:
    """Put a tmpfs on the working directory, seen by this process and its children only.

    Args:
        most_bytes: that it holds.
        most_files: that it holds, with directories.

    Returns:
        Whether it was allowed.
    """
    user, group = os.getuid(), os.getgid()
    if _LIBC.unshare(_NEW_MOUNTS):
        if _LIBC.unshare(_NEW_MOUNTS | _NEW_USER):
            return False
        try:
            _write("/proc/self/setgroups", "deny")
            _write("/proc/self/uid_map", f"{user} {user} 1")
            _write("/proc/self/gid_map", f"{group} {group} 1")
        except OSError:
            return False
        _LIBC.prctl(_SET_DUMPABLE, 1, 0, 0, 0)  # its user may still see what it has open
    folder = os.getcwd()
    options = f"size={most_bytes},nr_inodes={most_files + 1},mode=0700".encode()
    flags = _NO_SUID | _NO_DEVICES
    if _LIBC.mount(b"none", b"/", None, _RECURSIVE | _PRIVATE, None):
        return False
    if _LIBC.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, options):
        return False
    os.chdir(folder)
    return True


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
