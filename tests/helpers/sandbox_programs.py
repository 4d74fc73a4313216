"""Programs, hostile and honest, with the verdict that each must get.

``python tests/helpers/sandbox_programs.py`` runs them all and prints the verdicts as JSON, so that
a test can run them as another user. ``measured`` runs them without permission to mount file
systems. ``solutions`` runs HumanEval's problems, read from standard input.
"""

# ruff: noqa: E501 - a program in a line is read more easily than one in pieces

from __future__ import annotations

import importlib.util
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from loram_ray.evaluation import sandbox
from loram_ray.evaluation.sandbox import Limits, Tests, run_program

LIMITS = Limits(seconds=20.0, memory_mb=512, files_mb=4)
PROMPT = 'def f(x: list[int]) -> list[int]:\n    """Sort."""\n'
SORTS = "def check(candidate):\n    assert candidate([3, 1, 2]) == [1, 2, 3]\n    assert candidate([]) == []\n"


@dataclass(frozen=True)
class Program:
    """A program and its expected verdict.

    Attributes:
        name: Name of the test.
        source: Complete source; its first definition of ``f`` belongs to the prompt.
        passes: The expected verdict.
        reason: Part of the expected reason if the program must not pass.
        test: ``check`` and its dependencies; None runs the program without tests.
        prompt: Part of the prompt that the tests may use.
        entry_point: Name of the tested function.
    """

    name: str
    source: str
    passes: bool
    reason: str = ""
    test: str | None = SORTS
    prompt: str = PROMPT
    entry_point: str = "f"

    def run(self, limits: Limits = LIMITS) -> tuple[bool, str]:
        tests = None
        if self.test is not None:
            source = f"{self.test}\ncheck({self.entry_point})\n"
            tests = Tests(self.prompt, source, self.entry_point)
        verdict = run_program(self.source, limits, tests)
        return verdict.passed, verdict.reason


def forged(name: str, source: str, **more: str) -> Program:
    """Create a program whose ``f`` is wrong and which tries to pass nevertheless."""
    prompt = more.get("prompt", PROMPT)
    return Program(name, f"{prompt}    return None\n\n{source}", False, **more)


def alone(name: str, source: str, passes: bool, reason: str = "") -> Program:
    """Create a program without tests."""
    return Program(name, source, passes, reason, test=None)


_EVERY_DESCRIPTOR = """
import os
def shout(data):
    for descriptor in range(64):
        try: os.write(descriptor, data)
        except OSError: pass
"""
_FORGED_REPLIES = """
import struct, json
def frame(value):
    data = json.dumps(value).encode()
    return struct.pack('=Q', len(data)) + data
"""

FORGERIES = [
    forged("exits at once", "import os; os._exit(0)", reason="exited before its end"),
    forged("raises SystemExit", "raise SystemExit(0)", reason="exited before its end"),
    forged("exits when called", "def f(x):\n    import os; os._exit(0)", reason="exited before"),
    forged("leaves when called", "def f(x):\n    raise SystemExit(0)", reason="exited before"),
    forged("aborts when called", "def f(x):\n    import os; os.abort()", reason="killed by signal"),
    forged(
        "answers what equals everything",
        "class E:\n    def __eq__(self, other): return True\ndef f(x): return E()",
        reason="AssertionError",
    ),
    forged(
        "answers a list that equals everything",
        "class E(list):\n    def __eq__(self, other): return True\ndef f(x): return E()",
        reason="AssertionError",
    ),
    forged(
        "answers mock.ANY",
        "from unittest import mock\ndef f(x): return mock.ANY",
        reason="AssertionError",
    ),
    forged(
        "answers what says it is a list",
        "class E:\n    __class__ = list\n    def __eq__(self, other): return True\ndef f(x): return E()",
        reason="AssertionError",
    ),
    forged(
        "answers a number near every other",
        "class E(float):\n    def __sub__(self, o): return 0.0\n    __rsub__ = __sub__\n"
        "def f(x): return E(7)",
        test="def check(candidate):\n    assert abs(candidate(2) - 1.5) < 1e-6\n",
        reason="AssertionError",
    ),
    forged(
        "answers an object that is near every number",
        "class E:\n    def __sub__(self, o): return 0.0\n    __rsub__ = __sub__\ndef f(x): return E()",
        test="def check(candidate):\n    assert abs(candidate(2) - 1.5) < 1e-6\n",
        reason="TypeError",
    ),
    forged(
        "answers what holds everything",
        "class E:\n    def __contains__(self, o): return True\n    def __iter__(self): return iter([])\n"
        "def f(x): return E()",
        test="def check(candidate):\n    assert 2 in candidate([2])\n",
        reason="AssertionError",
    ),
    forged("defines check", "def check(candidate): pass", reason="AssertionError"),
    forged(
        "defines check where there is none",
        "def check(candidate): pass",
        test="",
        reason="NameError: name 'check' is not defined",
    ),
    forged(
        "replaces AssertionError and others",
        "import builtins\nbuiltins.AssertionError = type('A', (Exception,), {})\n"
        "builtins.__build_class__ = builtins.exec = builtins.compile = lambda *a, **k: None\n"
        "__builtins__ = {}",
        reason="AssertionError",
    ),
    forged(
        "replaces unittest's assertions",
        "import unittest\nunittest.TestCase.assertEqual = lambda *a: None",
        test="import unittest\ndef check(candidate):\n"
        "    unittest.TestCase().assertEqual(candidate([2, 1]), [1, 2])\n",
        reason="AssertionError",
    ),
    forged(
        "plants modules for the tests to import",
        "for name in ('unittest', 'math', 'helper'):\n"
        "    open(name + '.py', 'w').write('import os; os._exit(0)')\n",
        test="import unittest, math\n" + SORTS,
        reason="AssertionError",
    ),
    forged(
        "replaces what the prompt defines",
        "def double(x): return None\ndef f(x): return None",
        prompt="def double(x):\n    return 2 * x\n\n" + PROMPT,
        test="def check(candidate):\n    assert candidate(2) == double(2)\n",
        reason="AssertionError",
    ),
    forged(
        "replaces a method of what it answers",
        "def f(x):\n    p = P()\n    p.same = lambda other: True\n    return p",
        prompt="class P:\n    x = 0\n    def same(self, other): return self.x == other\n\n"
        + PROMPT,
        test="def check(candidate):\n    assert candidate(1).same(1)\n",
        reason="AssertionError",
    ),
    forged(
        "reads constants of all frames and writes them",
        _EVERY_DESCRIPTOR
        + "import sys, gc, types\nframe = sys._getframe()\nfound = []\nwhile frame:\n"
        "    found += frame.f_code.co_consts; found += frame.f_locals.values(); frame = frame.f_back\n"
        "found += [o for o in gc.get_objects() if isinstance(o, (str, bytes))]\n"
        "for one in found:\n"
        "    if isinstance(one, str): one = one.encode(errors='replace')\n"
        "    if isinstance(one, bytes): shout(one)\n"
        "os._exit(0)",
    ),
    forged(
        "takes answers from the tests' text",
        "import gc, sys, re\ntexts = []\n"
        "for o in gc.get_objects():\n"
        "    if isinstance(o, dict): texts += [v for v in list(o.values()) if isinstance(v, str)]\n"
        "frame = sys._getframe()\nwhile frame: texts += map(str, frame.f_locals.values()); frame = frame.f_back\n"
        "known = [m for t in texts for m in re.findall(r'candidate[(](.*?)[)] == (.*)', t)]\n"
        "known += [m for m in re.findall(r'candidate[(](.*?)[)] == (.*)', sys.stdin.read())]\n"
        "import os\n"
        "def f(x):\n    return next(eval(a) for q, a in known if eval(q) == x)",
        reason="StopIteration",
    ),
    forged("writes to every descriptor", _EVERY_DESCRIPTOR + "shout(b'passed\\n' * 9)"),
    forged(
        "writes replies to every descriptor",
        _EVERY_DESCRIPTOR
        + _FORGED_REPLIES
        + "for _ in range(9): shout(frame(['done', '', '', [], [None], []]))\nos._exit(0)",
    ),
    forged(
        "writes verdicts to every descriptor",
        _EVERY_DESCRIPTOR + 'shout(b\'{"passed": true, "reason": ""}\\n\')\nos._exit(0)',
    ),
    forged(
        "answers to every descriptor from a thread",
        _EVERY_DESCRIPTOR + _FORGED_REPLIES + "import threading, time\n"
        "def again():\n    while True: shout(frame(['done', '', '', [], [None], []])); time.sleep(0.001)\n"
        "threading.Thread(target=again).start()",
    ),
    forged(
        "asks the tests for their globals",
        "def f(x):\n    try: x.__globals__['check'] = print\n    except BaseException: pass\n"
        "    try: x.__code__ = (lambda: None).__code__\n    except BaseException: pass\n",
        test="def check(candidate):\n    candidate(lambda: 1)\n    assert False\n",
        reason="AssertionError",
    ),
    forged(
        "replaces what replies use",
        "import os, json, operator\nos.write = os.read = json.dumps = json.loads = operator.eq = print",
        reason="AssertionError",
    ),
    forged(
        "traces",
        "import sys, threading\ndef t(frame, event, arg):\n    frame.f_trace_opcodes = True\n    return t\n"
        "sys.settrace(t); sys.setprofile(t); threading.settrace(t)",
        reason="AssertionError",
    ),
    forged(
        "patches list's comparison in memory",
        "import ctypes\nc = ctypes.CFUNCTYPE(ctypes.py_object, ctypes.py_object, ctypes.py_object,"
        " ctypes.c_int)(lambda a, b, o: True)\n"
        "ctypes.c_void_p.from_address(id(list) + 200).value = ctypes.cast(c, ctypes.c_void_p).value\n"
        "def f(x): return [0]",
        reason="AssertionError",
    ),
    forged(
        "has an atexit handler",
        "import atexit, os\natexit.register(os._exit, 0)\n1 / 0",
        reason="Zero",
    ),
    forged(
        "closes every descriptor", "import os\nos.closerange(0, 64)", reason="exited before its end"
    ),
    forged("forks", "import os\nif os.fork() == 0: print('passed')", reason="PermissionError"),
    forged("kills its parent", "import os\nos.kill(os.getppid(), 9)", reason="PermissionError"),
    forged("stops its tests", "import os\nos.kill(os.getpid() + 1, 19)", reason="PermissionError"),
    forged(
        "reads the memory of others",
        "import os\nopen(f'/proc/{os.getppid()}/mem', 'rb').read()",
        reason="PermissionError",
    ),
    forged("leaves its session", "import os\nos.setsid()", reason="PermissionError"),
    forged(
        "outlives its parent",
        "import ctypes\nassert ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) == 0",
        reason="AssertionError",
    ),
]

_FALSE = "\nraise AssertionError('it got here')\n"
FORGED_ENDS = [
    alone(f"{p.name}, without tests", f"{p.source}{_FALSE}", False)
    for p in FORGERIES
    if any(
        word in p.name
        for word in ("exit", "raises", "reads", "writes", "thread", "atexit", "closes")
    )
]

_HIDES = "import os, mmap\nkept = []\n"
_LONG_PATH = "for _ in range(20): os.mkdir('d' * 250); os.chdir('d' * 250)\n"
GREEDY = [
    alone(
        "keeps unlinked files",
        _HIDES + "for _ in range(8):\n    f = open('a', 'wb'); os.unlink('a')\n"
        "    f.write(bytes(3 * 10**6)); f.flush(); kept.append(f)",
        False,
        "files exceeded",
    ),
    alone(
        "makes files without a name",
        _HIDES + "os.open('.', os.O_TMPFILE | os.O_RDWR)",
        False,
        "Operation not supported",
    ),
    alone(
        "maps unlinked files",
        _HIDES + "for _ in range(8):\n    f = open('a', 'w+b'); os.unlink('a')\n"
        "    f.write(bytes(3 * 10**6)); f.flush(); kept.append(mmap.mmap(f.fileno(), 4096)); f.close()",
        False,
        "files exceeded",
    ),
    alone(
        "makes an unreadable folder", "import os\nos.mkdir('d', 0o300)", False, "PermissionError"
    ),
    alone("masks its folders", "import os\nos.umask(0o777)\n", False, "OSError"),
    alone(
        "fills folders deeper than a path is long",
        _HIDES + _LONG_PATH + "for i in range(8): open(str(i), 'wb').write(bytes(3 * 10**6))",
        False,
        "files exceeded",
    ),
    alone(
        "reserves space beyond a file's end",
        "import ctypes, os\nf = os.open('a', os.O_CREAT | os.O_RDWR)\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "assert libc.fallocate(f, 1, ctypes.c_long(0), ctypes.c_long(10**8)) == 0",
        False,
        "AssertionError",
    ),
    alone(
        "starts many threads",
        "import threading, time\nthreading.stack_size(2**18)\n"
        "for _ in range(200): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        "time.sleep(60)",
        False,
        "more than 64 threads",
    ),
    alone("prints without end", "while True: print('x' * 1000)", False, "printed more than"),
    alone(
        "takes all memory", "x = []\nwhile True: x.append(bytearray(10**6))", False, "MemoryError"
    ),
]

_POINT = (
    "from dataclasses import dataclass\n\n@dataclass\nclass Point:\n    x: int\n    y: int = 0\n"
    "    def norm(self): return abs(self.x) + abs(self.y)\n\n"
)
_NODE = (
    "class Node:\n    def __init__(self, value, next=None): self.value, self.next = value, next\n\n"
)


def honest(name: str, source: str, test: str, prompt: str = "", entry_point: str = "f") -> Program:
    """Create a program that satisfies its tests."""
    test = "def check(candidate):\n" + "".join(f"    {line}\n" for line in test.splitlines())
    return Program(name, prompt + source, True, "", test, prompt, entry_point)


HONEST = [
    Program("sorts", PROMPT + "    return sorted(x)", True),
    honest("sorts in place", "def f(x): x.sort()", "x = [2, 1]\ncandidate(x)\nassert x == [1, 2]"),
    honest(
        "answers its argument",
        "def f(x):\n    x['a'] = x\n    return x",
        "x = {}\nassert candidate(x) is x and x['a'] is x",
    ),
    honest(
        "answers data of every kind",
        "from decimal import Decimal\nfrom datetime import date, timedelta\nfrom fractions import Fraction\n"
        "from collections import Counter, deque, defaultdict, OrderedDict\n"
        "def f(): return [None, True, 2**100, -0.5, 'é\\ud800', b'\\xff', 1j, (1, (2,)), {1, 2}, frozenset([3]),"
        " {(1, 2): [3]}, range(3), Decimal('1.1'), Fraction(1, 3), date(2024, 2, 29), timedelta(1),"
        " Counter('aab'), deque([1]), defaultdict(int, a=1), OrderedDict(a=1), int, ..., float('inf')]",
        "from decimal import Decimal\nfrom datetime import date, timedelta\nfrom fractions import Fraction\n"
        "from collections import Counter, deque, defaultdict, OrderedDict\n"
        "want = [None, True, 2**100, -0.5, 'é\\ud800', b'\\xff', 1j, (1, (2,)), {1, 2}, frozenset([3]),"
        " {(1, 2): [3]}, range(3), Decimal('1.1'), Fraction(1, 3), date(2024, 2, 29), timedelta(1),"
        " Counter('aab'), deque([1]), defaultdict(int, a=1), OrderedDict(a=1), int, ..., float('inf')]\n"
        "got = candidate()\nassert got == want\nassert [type(v) for v in got] == [type(v) for v in want]",
    ),
    honest(
        "answers lists that are nested deeply",
        "def f(n):\n    x = []\n    for _ in range(n): x = [x]\n    return x",
        "x, n = candidate(5000), 0\nwhile x: x, n = x[0], n + 1\nassert n == 5000",
    ),
    honest("answers nan", "def f(): return float('nan')", "assert candidate() != candidate()"),
    honest(
        "raises what is expected",
        "class Bad(ValueError): pass\ndef f(x): raise Bad('no', x)",
        "try: candidate(3)\nexcept ValueError as e: assert e.args == ('no', 3)\nelse: assert False",
    ),
    honest("takes names and defaults", "def f(a, *b, c=1, **d): return [a, b, c, d]",
           "assert candidate(1, 2, c=3, d=4) == [1, (2,), 3, {'d': 4}]"),
    honest("is a generator", "def f(n):\n    for i in range(n): yield i",
           "assert list(candidate(3)) == [0, 1, 2]\nassert sum(candidate(4)) == 6"),
    honest("takes iterators", "def f(x): return [2 * i for i in x]",
           "assert candidate(iter([1, 2])) == [2, 4]\nassert candidate(i for i in 'a') == ['aa']"),
    honest("takes and answers functions", "def f(g, n): return lambda x: g(x) + n",
           "assert candidate(lambda x: 2 * x, 1)(4) == 9\nassert candidate(abs, 1)(-4) == 5"),
    honest("keeps state", "class f:\n    def __init__(self): self.n = 0\n"
           "    def add(self, k):\n        self.n += k\n        return self\n    def __len__(self): return self.n",
           "a = candidate()\nassert a.add(2).add(3).n == 5 and len(a) == 5\na.n = 1\nassert a.n == 1"),
    honest(
        "completes a class",
        "class Solution:\n    def double(self, x): return 2 * x\n",
        "assert candidate(4) == 8",
        entry_point="Solution().double",
    ),
    honest("uses a class of the prompt", "def f(p): return Point(p.y, p.x)",
           "assert candidate(Point(1, 2)) == Point(2, 1)\nassert candidate(Point(3)).norm() == 3", _POINT),
    honest("links nodes of the prompt", "def f(n):\n    while n.next: n = n.next\n    n.next = Node(9)\n",
           "n = Node(1, Node(2))\ncandidate(n)\nassert n.next.next.value == 9", _NODE),
    honest("uses a named tuple", "from collections import namedtuple\nP = namedtuple('P', 'a b')\n"
           "def f(): return P(1, 2)", "p = candidate()\nassert p == (1, 2) and p.b == 2"),
    honest("is captured", "def f(): print('hello')",
           "import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()) as out: candidate()\n"
           "assert out.getvalue() == 'hello\\n'"),
    honest("prints much", "def f():\n    print('é' * 250_000)\n    return 1", "assert candidate() == 1"),
    alone("prints much before its end", "print('é' * 250_000)", True),
    alone(
        "uses threads",
        "from concurrent.futures import ThreadPoolExecutor\nimport threading\n"
        "assert list(ThreadPoolExecutor(20).map(abs, range(-99, 0)))[0] == 99\n"
        "meet = threading.Barrier(31)\n"
        "for _ in range(30): threading.Thread(target=meet.wait).start()\nmeet.wait(10)",
        True,
    ),
    alone("leaves a thread running", "import threading, time\n"
          "threading.Thread(target=time.sleep, args=(600,)).start()", True),
    alone("recurses", "import sys\nsys.setrecursionlimit(20000)\ndef f(n): return n and 1 + f(n - 1)\n"
          "assert f(15000) == 15000", True),
    alone("reads its own source", "import inspect\ndef f(): return 1\n"
          "assert 'return 1' in inspect.getsource(f) and 'inspect' in open(__file__).read()", True),
    alone("has a main guard", "import sys\nran = False\nif __name__ == '__main__': ran = True\n"
          "assert ran and sys.modules['__main__'].ran and len(sys.argv) == 1", True),
    alone("pickles and resolves annotations", "from __future__ import annotations\nimport pickle, typing\n"
          "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: typing.ClassVar[int] = 1\n    y: int = 2\n"
          "assert pickle.loads(pickle.dumps(A(3))) == A(3) and typing.get_type_hints(A)['y'] is int", True),
    alone("has no input", "try: input()\nexcept EOFError: pass\nimport sys\nassert sys.stdin.read() == ''", True),
    alone("uses temporary files", "import tempfile, os\nwith tempfile.TemporaryFile() as f: f.write(b'x')\n"
          "with tempfile.NamedTemporaryFile() as f: f.write(b'x')\n"
          "with tempfile.TemporaryDirectory() as d: open(d + '/a', 'w').write('x')\n", True),
    alone("writes again and again", "for _ in range(20):\n    open('a', 'wb').write(bytes(3 * 10**6))", True),
    alone("uses most of its memory", "x = bytearray(400 * 10**6)\nx[::4096] = b'x' * len(x[::4096])", True),
    alone("sleeps", "import time\ntime.sleep(0.5)", True),
    alone("has no other process, and copes", "import subprocess\n"
          "try: subprocess.run(['true'])\nexcept PermissionError: pass", True),
    alone("exits where it does not get to", "import sys\ndef main(): exit(0); quit(); sys.exit(0)", True),
]  # fmt: skip
if importlib.util.find_spec("numpy"):
    HONEST.append(
        honest(
            "uses NumPy",
            "import numpy as np\ndef f(x): return np.sort(x), np.float64(x.sum()), x @ x",
            "import numpy as np\na, s, d = candidate(np.array([2.0, 1.0]))\n"
            "assert (a == np.array([1.0, 2.0])).all() and s == 3.0 and d == 5.0",
        )
    )

PROGRAMS = [*FORGERIES, *FORGED_ENDS, *GREEDY, *HONEST]


def run_all(programs: list[Program] = PROGRAMS) -> dict[str, tuple[bool, str]]:
    """Return the verdicts by name."""
    with ThreadPoolExecutor(4) as pool:
        return dict(zip([p.name for p in programs], pool.map(Program.run, programs), strict=True))


def wrong(verdicts: dict[str, tuple[bool, str]]) -> dict[str, tuple[bool, str]]:
    """Return the verdicts that differ from the expected ones."""
    return {
        p.name: verdicts[p.name]
        for p in PROGRAMS
        if p.name in verdicts
        and (verdicts[p.name][0] != p.passes or p.reason not in verdicts[p.name][1])
    }


def failing(problems: list[dict[str, str]]) -> list[str]:
    """Return the ids of HumanEval's problems that get a wrong verdict.

    A problem's own solution must pass, and a body that does nothing must not.
    """

    def is_wrong(problem: dict[str, str]) -> bool:
        ending = f"{problem['test']}\ncheck({problem['entry_point']})\n"
        tests = Tests(problem["prompt"], ending, problem["entry_point"])
        verdicts = [
            run_program(f"{problem['prompt']}{body}\n", tests=tests).passed
            for body in (problem["canonical_solution"], "    return None")
        ]
        return verdicts != [True, False]

    with ThreadPoolExecutor(2) as pool:
        found = pool.map(is_wrong, problems)
        return [p["task_id"] for p, one in zip(problems, found, strict=True) if one]


if __name__ == "__main__":
    if sys.argv[1:] == ["solutions"]:
        json.dump({"user": os.getuid(), "failing": failing(json.load(sys.stdin))}, sys.stdout)
    else:
        sandbox.MAY_MOUNT = sys.argv[1:] != ["measured"]
        json.dump({"user": os.getuid(), "verdicts": run_all()}, sys.stdout)
