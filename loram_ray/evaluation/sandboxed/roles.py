"""Roles of the two processes of a trial: one runs the program, the other tests it and decides."""

from __future__ import annotations

import ast
import builtins
import json
import os
import sys
import traceback
import types
from typing import Any, NoReturn

from .exchange import CALLBACKS, OPERATIONS, Channel, Peer

_read, _write, _exit = os.read, os.write, os._exit
_LEFT = "it exited before its end"


def run_program(reading: int, writing: int) -> NoReturn:
    """Run a program and serve its tests until they end.

    Args:
        reading: File descriptor of the tests' requests.
        writing: File descriptor of the replies.
    """
    module = _main_module()
    operations = dict(OPERATIONS)
    peer = Peer(Channel(reading, writing), module.__dict__, operations, True, lambda _: _exit(1))

    def load(source: str, shared: list[str]) -> str | None:
        peer.shared = frozenset(shared)
        return _load(source, module.__dict__)

    operations["load"] = load
    operations["get"] = lambda name: _named(name, module.__dict__)
    peer.serve_forever()
    _exit(0)


def _load(source: str, namespace: dict[str, Any]) -> str | None:
    """Run a program to its end; return the reason if it does not get there."""
    path = os.path.abspath("program.py")
    with open(path, "w", encoding="utf-8", errors="surrogatepass") as file:
        file.write(source)
    namespace["__file__"] = path
    sys.argv = [path]
    spare = bytearray(2**20)  # freed to report an exhausted memory
    try:
        exec(compile(source, path, "exec"), namespace)  # runs the untrusted program
    except SystemExit:
        return _LEFT
    except BaseException as error:
        del spare
        return _reason(error)
    return None


def _named(name: str, namespace: dict[str, Any]) -> Any:
    if name in namespace:
        return namespace[name]
    raise NameError(f"name {name!r} is not defined")


def run_tests(reading: int, writing: int, verdict: int) -> NoReturn:
    """Run a program and test it, write the verdict, and wait until the input ends.

    The job is read from file descriptor 0 as one line of JSON: ``program``, and ``tests``, which is
    null or has ``prompt``, ``source`` and ``entry_point``.

    Args:
        reading: File descriptor of the program's replies.
        writing: File descriptor of the requests.
        verdict: File descriptor for the verdict, written as one line of JSON.
    """
    job = json.loads(_line(0))
    module = _main_module()

    def end(reason: str | None, code: int = 0) -> NoReturn:
        line = json.dumps({"passed": reason is None, "reason": reason or ""}) + "\n"
        _write(verdict, line.encode("ascii"))
        while _read(0, 1):  # keeps the program alive until its files are measured
            pass
        _exit(code)

    def broken(reason: str) -> NoReturn:
        end(reason, 1)

    peer = Peer(Channel(reading, writing), module.__dict__, CALLBACKS, False, broken)
    try:
        end(_tested(peer, job["program"], job["tests"]))
    except SystemExit:
        end(_LEFT)
    except BaseException as error:
        end(_reason(error))


def _tested(peer: Peer, program: str, tests: dict[str, str] | None) -> str | None:
    namespace = peer.namespace
    if tests is None:
        return _text(peer.request("load", program, []))
    entry = ast.walk(ast.parse(tests["entry_point"].strip(), mode="eval"))
    names = {node.id for node in entry if isinstance(node, ast.Name)} - set(dir(builtins))
    prompt, is_whole = _parsed_prompt(tests["prompt"])
    exec(compile(prompt, "prompt.py", "exec"), namespace)
    if prompt.body and not (is_whole and _is_complete(prompt.body[-1])):
        prompt.body.pop()  # the program completes it
    classes = {node.name for node in prompt.body if isinstance(node, ast.ClassDef)}
    peer.shared = frozenset(classes - names)
    failed = _text(peer.request("load", program, sorted(peer.shared)))
    if failed is not None:
        return failed
    for name in names:
        namespace[name] = peer.request("get", name)
    namespace.pop("check", None)  # the tests define it
    exec(compile(tests["source"], "tests.py", "exec"), namespace)
    return None


def _text(reason: object) -> str | None:
    return None if reason is None else str(reason)


def _parsed_prompt(prompt: str) -> tuple[ast.Module, bool]:
    """Parse the longest valid part of a prompt; return it and whether it is the whole prompt."""
    lines = prompt.splitlines(keepends=True)
    for count in range(len(lines), 0, -1):
        try:
            return ast.parse("".join(lines[:count])), count == len(lines)
        except (SyntaxError, ValueError):
            continue
    return ast.Module([], []), False


def _is_complete(node: ast.AST) -> bool:
    """Whether a definition ends with more than a docstring."""
    while isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        node = node.body[-1]
    return not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def _main_module() -> types.ModuleType:
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    return module


def _line(descriptor: int) -> bytes:
    pieces: list[bytes] = []
    while not pieces or not pieces[-1].endswith(b"\n"):
        piece = _read(descriptor, 2**20)
        if not piece:
            break
        pieces.append(piece)
    return b"".join(pieces)


def _reason(error: BaseException) -> str:
    lines = traceback.format_exception_only(error)
    return lines[-1].strip()[:200] or type(error).__name__
