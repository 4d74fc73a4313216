"""Mount a file system of limited size on the working directory, if this user may.

Root needs CAP_SYS_ADMIN, other users need user namespaces. Containers often allow neither; the
directory then stays as it is, and `usage` measures its contents instead.
"""

from __future__ import annotations

import ctypes
import os

_LIBC = ctypes.CDLL(None, use_errno=True)
_NEW_MOUNTS, _NEW_USER = 0x00020000, 0x10000000  # unshare flags (linux/sched.h)
_NO_SUID, _NO_DEVICES, _RECURSIVE, _PRIVATE = 1 << 1, 1 << 2, 1 << 14, 1 << 18  # mount flags
_SET_DUMPABLE = 4  # prctl option


def mount_scratch(max_bytes: int, max_files: int) -> bool:
    """Mount a tmpfs on the working directory, visible only to this process and its children.

    Args:
        max_bytes: Capacity in bytes.
        max_files: Maximum number of files and directories.

    Returns:
        Whether the mount was permitted.
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
        _LIBC.prctl(_SET_DUMPABLE, 1, 0, 0, 0)  # lets the user inspect the process's open files
    folder = os.getcwd()
    options = f"size={max_bytes},nr_inodes={max_files + 1},mode=0700".encode()
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
