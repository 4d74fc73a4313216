"""Confine this process irrevocably, then run a program and its tests: the inside of `sandbox`.

It is started by path, as ``python -I -S -B sandbox_child.py SETTINGS``, with the job on standard
input. It imports nothing of this package but `sandboxed`, since the program can reach everything
imported here. It forks twice: the program runs in one child and its tests in the other, and only
the latter can write the verdict; this process waits for both. The kernel, not Python, enforces the
following:

- Landlock (Linux 5.13): files outside the working directory and the readable paths cannot be
  opened, and only files in the working directory can be written, created, renamed or removed.
- seccomp: no sockets, no other processes, no signals, no changes of modes or owners, no raised
  limits, and no way to hide files from `usage`.
- Death signals: a child ends with its parent, and this process with the evaluating process.
- Capabilities are dropped, so limits and modes apply to root as well.
- rlimits: memory, processor time, file size, open files, no core files.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import site
import struct
import sys
import time
from collections.abc import Callable
from typing import NoReturn

_LIBC = ctypes.CDLL(None, use_errno=True)
_DEATH_SIGNAL, _NO_NEW_PRIVILEGES, _SECCOMP = 1, 38, 22  # prctl options (linux/prctl.h)
_NAMES_ONLY = (15, 16, 0x53564D41)  # PR_SET_NAME, PR_GET_NAME, PR_SET_VMA
_FILTER_MODE = 2
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on all architectures
_CAPABILITIES_VERSION = 0x20080522
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000  # seccomp return values
_EPERM, _ENOSYS, _EOPNOTSUPP = 1, 38, 95
_THREAD = 0x00010F00  # clone flags of a thread
_TMPFILE = 0x00400000  # open flag
_OWNERS = 0o700
_M_ARENA_MAX = -8  # mallopt parameter (malloc.h)

# Landlock access rights by the ABI version that introduced them.
_EXECUTE, _WRITE, _READ, _LIST = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
_OF_FILES = _EXECUTE | _WRITE | _READ | 1 << 14 | 1 << 15
_READABLE = _EXECUTE | _READ | _LIST

# Refused system calls, with their numbers on x86-64 and AArch64.
_REFUSED = {
    "x86_64": {
        "socket": 41, "socketpair": 53, "connect": 42, "bind": 49, "listen": 50, "accept": 43,
        "accept4": 288, "fork": 57, "vfork": 58, "execve": 59, "execveat": 322, "kill": 62,
        "tkill": 200, "tgkill": 234, "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297,
        "pidfd_open": 434, "pidfd_send_signal": 424, "pidfd_getfd": 438, "ptrace": 101,
        "process_vm_readv": 310, "process_vm_writev": 311, "process_madvise": 440,
        "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "mount": 165,
        "umount2": 166, "pivot_root": 155, "chroot": 161, "fsopen": 430, "open_tree": 428,
        "move_mount": 429, "mount_setattr": 442, "unshare": 272, "setns": 308, "bpf": 321,
        "perf_event_open": 298, "userfaultfd": 323, "keyctl": 250, "add_key": 248,
        "request_key": 249, "kexec_load": 246, "reboot": 169, "init_module": 175,
        "finit_module": 313, "delete_module": 176, "swapon": 167, "swapoff": 168,
        "sethostname": 170, "setdomainname": 171, "settimeofday": 164, "clock_settime": 227,
        "adjtimex": 159, "clock_adjtime": 305, "acct": 163, "quotactl": 179, "syslog": 103,
        "name_to_handle_at": 303, "open_by_handle_at": 304, "memfd_create": 319,
        "memfd_secret": 447, "shmget": 29, "shmat": 30, "shmctl": 31, "msgget": 68, "msgsnd": 69,
        "semget": 64, "semop": 65, "mq_open": 240, "setrlimit": 160, "setpriority": 141,
        "sched_setscheduler": 144, "sched_setparam": 142, "sched_setattr": 314, "ioprio_set": 251,
        "sched_setaffinity": 203, "migrate_pages": 256, "move_pages": 279, "chmod": 90,
        "fchmod": 91, "fchmodat": 268, "fchmodat2": 452, "chown": 92, "fchown": 93, "lchown": 94,
        "fchownat": 260, "utime": 132, "utimes": 235, "futimesat": 261, "utimensat": 280,
        "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190, "removexattr": 197,
        "lremovexattr": 198, "fremovexattr": 199, "truncate": 76, "personality": 135, "iopl": 172,
        "ioperm": 173, "sync": 162, "syncfs": 306, "fanotify_init": 300, "inotify_init": 253,
        "inotify_init1": 294, "setsid": 112, "setpgid": 109,
    },
    "aarch64": {
        "socket": 198, "socketpair": 199, "connect": 203, "bind": 200, "listen": 201, "accept": 202,
        "accept4": 242, "execve": 221, "execveat": 281, "kill": 129, "tkill": 130, "tgkill": 131,
        "rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240, "pidfd_open": 434,
        "pidfd_send_signal": 424, "pidfd_getfd": 438, "ptrace": 117, "process_vm_readv": 270,
        "process_vm_writev": 271, "process_madvise": 440, "io_uring_setup": 425,
        "io_uring_enter": 426, "io_uring_register": 427, "mount": 40, "umount2": 39,
        "pivot_root": 41, "chroot": 51, "fsopen": 430, "open_tree": 428, "move_mount": 429,
        "mount_setattr": 442, "unshare": 97, "setns": 268, "bpf": 280, "perf_event_open": 241,
        "userfaultfd": 282, "keyctl": 219, "add_key": 217, "request_key": 218, "kexec_load": 104,
        "reboot": 142, "init_module": 105, "finit_module": 273, "delete_module": 106, "swapon": 224,
        "swapoff": 225, "sethostname": 161, "setdomainname": 162, "settimeofday": 170,
        "clock_settime": 112, "adjtimex": 171, "clock_adjtime": 266, "acct": 89, "quotactl": 60,
        "syslog": 116, "name_to_handle_at": 264, "open_by_handle_at": 265, "memfd_create": 279,
        "memfd_secret": 447, "shmget": 194, "shmat": 196, "shmctl": 195, "msgget": 186,
        "msgsnd": 189, "semget": 190, "semop": 193, "mq_open": 180, "setrlimit": 164,
        "setpriority": 140, "sched_setscheduler": 119, "sched_setparam": 118, "sched_setattr": 274,
        "ioprio_set": 30, "sched_setaffinity": 122, "migrate_pages": 238, "move_pages": 239,
        "fchmod": 52, "fchmodat": 53, "fchmodat2": 452, "fchown": 55, "fchownat": 54,
        "utimensat": 88, "setxattr": 5, "lsetxattr": 6, "fsetxattr": 7, "removexattr": 14,
        "lremovexattr": 15, "fremovexattr": 16, "truncate": 45, "personality": 92, "sync": 81,
        "syncfs": 267, "fanotify_init": 262, "inotify_init1": 26, "setsid": 157,
        "setpgid": 154,
    },
}  # fmt: skip
_CLONE = {"x86_64": 56, "aarch64": 220}
_LIMITS = {"x86_64": 302, "aarch64": 261}  # prlimit64, which may read limits but not set them
_FCNTL = {"x86_64": 72, "aarch64": 25}
_SIGNALLING = (8, 10, 15)  # F_SETOWN, F_SETSIG, F_SETOWN_EX
_CLONE3, _OPENAT2, _CLOSE_RANGE = 435, 437, 436
_FALLOCATE = {"x86_64": 285, "aarch64": 47}
_PRCTL = {"x86_64": 157, "aarch64": 167}
_OPENS = {"x86_64": {2: 1, 257: 2}, "aarch64": {56: 2}}  # open, openat: index of the flags
_MKDIRS = {"x86_64": {83: 1, 258: 2}, "aarch64": {34: 2}}  # mkdir, mkdirat: index of the mode
_UMASK = {"x86_64": 95, "aarch64": 166}
_KIND = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32 = 0x40000000


def _argument(number: int) -> int:
    """Return the offset of the lower half of a call's argument in struct seccomp_data."""
    return 16 + 8 * number


def _checked(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def _give_up_capabilities() -> None:
    header = struct.pack("=II", _CAPABILITIES_VERSION, 0)
    _checked(_LIBC.capset(header, bytes(24)), "capset")


def _confine_files(readable: list[str]) -> None:
    """Restrict file access with Landlock to readable paths and the working directory."""
    version = _checked(_LIBC.syscall(_CREATE_RULESET, None, 0, 1), "Landlock")
    handled = _RIGHTS[max(known for known in _RIGHTS if known <= version)]
    attribute = struct.pack("=Q", handled)
    if version >= 4:
        attribute += struct.pack("=Q", 3)  # TCP: bind and connect
    if version >= 6:
        attribute += struct.pack("=Q", 3)  # abstract sockets and signals to other processes
    rules = _checked(_LIBC.syscall(_CREATE_RULESET, attribute, len(attribute), 0), "Landlock")
    for path, rights in [(path, _READABLE) for path in readable] + [(".", handled)]:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue  # a missing path needs no rule
        allowed = handled & (rights if os.path.isdir(path) else rights & _OF_FILES)
        if path.startswith("/dev/"):
            allowed |= handled & _WRITE
        rule = struct.pack("=Qi", allowed, place)
        _checked(_LIBC.syscall(_ADD_RULE, rules, 1, rule, 0), f"Landlock for {path}")
        os.close(place)
    _checked(_LIBC.syscall(_RESTRICT_SELF, rules, 0), "Landlock")
    os.close(rules)


class _Filter:
    """A seccomp BPF program, to which each method appends instructions.

    Attributes:
        code: The instructions.
    """

    def __init__(self) -> None:
        self.code: list[bytes] = []

    def _append(self, operation: int, if_true: int, if_false: int, value: int) -> None:
        self.code.append(struct.pack("=HBBI", operation, if_true, if_false, value))

    def load(self, place: int) -> None:
        """Load a word of struct seccomp_data."""
        self._append(0x20, 0, 0, place)

    def keep_bits(self, mask: int) -> None:
        """Clear the bits of the loaded word that are not in a mask."""
        self._append(0x54, 0, 0, mask)

    def answer(self, value: int) -> None:
        """Return a value."""
        self._append(0x06, 0, 0, value)

    def if_equal_skip(self, value: int, count: int) -> None:
        """Skip instructions if the loaded word has a value."""
        self._append(0x15, count, 0, value)

    def unless_equal_skip(self, value: int, count: int) -> None:
        """Skip instructions unless the loaded word has a value."""
        self._append(0x15, 0, count, value)

    def unless_at_least_skip(self, value: int, count: int) -> None:
        """Skip instructions unless the loaded word is at least a value."""
        self._append(0x35, 0, count, value)

    def refuse(self, number: int, error: int) -> None:
        """Refuse a call, whose number is loaded, with an error."""
        self.unless_equal_skip(number, 1)
        self.answer(_ERRNO | error)

    def when_masked(
        self, number: int, argument: int, mask: int, value: int, error: int = _EPERM
    ) -> None:
        """Allow a call only if its masked argument has a given value."""
        self.unless_equal_skip(number, 5)
        self.load(_argument(argument))
        self.keep_bits(mask)
        self.unless_equal_skip(value, 1)
        self.answer(_ALLOW)
        self.answer(_ERRNO | error)

    def when_among(self, number: int, argument: int, values: tuple[int, ...], others: bool) -> None:
        """Allow, or with ``others`` refuse, a call whose argument is among some values."""
        self.unless_equal_skip(number, 2 * len(values) + 2)
        self.load(_argument(argument))
        for value in values:
            self.unless_equal_skip(value, 1)
            self.answer(_ERRNO | _EPERM if others else _ALLOW)
        self.answer(_ALLOW if others else _ERRNO | _EPERM)

    def when_null(self, number: int, argument: int) -> None:
        """Allow a call only if a pointer, of two words, is null."""
        self.unless_equal_skip(number, 6)
        self.load(_argument(argument))
        self.unless_equal_skip(0, 3)
        self.load(_argument(argument) + 4)
        self.unless_equal_skip(0, 1)
        self.answer(_ALLOW)
        self.answer(_ERRNO | _EPERM)


def _filter_of(machine: str) -> list[bytes]:
    """Return the filter on call numbers, and on the arguments of a few calls."""
    calls = _Filter()
    calls.load(4)
    calls.if_equal_skip(_KIND[machine], 1)
    calls.answer(_KILL)
    calls.load(0)
    calls.unless_at_least_skip(_X32, 1)  # x32 calls of x86-64
    calls.answer(_KILL)
    for number in _REFUSED[machine].values():
        calls.refuse(number, _EPERM)
    for number in (_CLONE3, _OPENAT2, _CLOSE_RANGE):  # not needed, or with unreadable flags
        calls.refuse(number, _ENOSYS)
    calls.refuse(_FALLOCATE[machine], _EOPNOTSUPP)  # bypasses the file size limit
    calls.when_null(_LIMITS[machine], 2)  # address of the new limits
    calls.when_among(_FCNTL[machine], 1, _SIGNALLING, others=True)
    calls.when_among(_PRCTL[machine], 0, _NAMES_ONLY, others=False)
    calls.when_masked(_CLONE[machine], 0, _THREAD, _THREAD)
    for number, flags in _OPENS[machine].items():
        calls.when_masked(number, flags, _TMPFILE, 0, _EOPNOTSUPP)
    for number, mode in _MKDIRS[machine].items():
        calls.when_masked(number, mode, _OWNERS, _OWNERS)
    calls.when_masked(_UMASK[machine], 0, _OWNERS, 0)
    calls.answer(_ALLOW)
    return calls.code


def _confine_calls() -> None:
    """Install the seccomp filter of this machine."""
    code = _filter_of(os.uname().machine)
    instructions = ctypes.create_string_buffer(b"".join(code))
    program = struct.pack("HxxxxxxP", len(code), ctypes.addressof(instructions))
    _checked(_LIBC.prctl(_SECCOMP, _FILTER_MODE, program, 0, 0), "seccomp")


def _limit(limits: dict[str, int]) -> None:
    """Set rlimits; `usage` counts threads, since RLIMIT_NPROC counts all processes of a user."""
    for name in ("CORE", "MEMLOCK", "MSGQUEUE"):
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}", resource.RLIMIT_CORE), (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (limits["memory"],) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (limits["seconds"],) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits["file"],) * 2)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits["files"],) * 2)
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        _LIBC.setenv(name.encode(), b"1", 1)  # otherwise NumPy starts a thread per core
    if hasattr(_LIBC, "mallopt"):  # otherwise each thread reserves 64 MB of address space
        _LIBC.mallopt(_M_ARENA_MAX, 1)


def _end_with(parent: int) -> None:
    """Make the kernel kill this process when its parent ends."""
    _checked(_LIBC.prctl(_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0), "death signal")
    if os.getppid() != parent:
        os._exit(1)


def _fork(role: Callable[..., NoReturn], *arguments: int, keeps_input: bool = False) -> int:
    """Run a role in a confined child that keeps only the given file descriptors."""
    parent = os.getpid()
    child = os.fork()
    if child:
        return child
    try:
        _end_with(parent)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if not keeps_input:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for descriptor in range(3, 64):
            if descriptor not in arguments:
                with contextlib.suppress(OSError):
                    os.close(descriptor)
        _confine_calls()
        role(*arguments)
    finally:
        os._exit(1)


def _main() -> None:
    settings = json.loads(sys.argv[1])
    _end_with(settings["parent"])
    sys.path.append(settings["inside"])  # last, so that it shadows no standard module
    from sandboxed.roles import run_program, run_tests  # type: ignore[import-not-found]
    from sandboxed.scratch import mount_scratch  # type: ignore[import-not-found]

    sys.path[-1:] = settings["packages"]
    for name in [name for name in sys.modules if name.partition(".")[0] == "sandboxed"]:
        del sys.modules[name]
    site.setquit()
    scratch = settings["scratch"]
    is_mounted = bool(scratch) and mount_scratch(*scratch)
    _end_with(settings["parent"])  # set again, since new credentials reset it
    _checked(_LIBC.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0), "no_new_privs")
    _limit(settings)
    _give_up_capabilities()
    _confine_files(settings["readable"])

    children: list[int] = []

    def stop(*_: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        for child in children:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child, 0)
        os._exit(0)

    signal.signal(signal.SIGTERM, stop)
    verdict = settings["verdict"]
    (answers, answering), (requests, requesting) = os.pipe(), os.pipe()
    children.append(_fork(run_program, requests, answering))
    children.append(_fork(run_tests, answers, requesting, verdict, keeps_input=True))
    for descriptor in (answers, answering, requests, requesting):
        os.close(descriptor)
    program, tests = children
    line = {"program": program, "tests": tests, "mounted": is_mounted}
    os.write(verdict, (json.dumps(line) + "\n").encode())
    _, status = os.waitpid(tests, 0)
    children.remove(tests)
    ended, patience = (
        0,
        50 if os.waitstatus_to_exitcode(status) else 1,
    )  # nonzero: the program ended first
    while not ended and patience:
        ended, status = os.waitpid(program, os.WNOHANG)
        patience -= 1
        if not ended and patience:
            time.sleep(0.02)
    if ended:
        children.remove(program)
        line = {"signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0}
        os.write(verdict, (json.dumps(line) + "\n").encode())
    stop()


if __name__ == "__main__":
    _main()
