"""Exchange calls between the tests' and the program's process: requests and replies over two pipes.

Both sides are a `Peer`. The program's side executes every request. The tests' side sees the program
as an object (`Remote`), and allows it to call back only functions, containers and public attributes
of objects that the tests passed to it.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import json
import operator
import os
import struct
import sys
import threading
import types
from collections.abc import Callable
from typing import Any, NoReturn

from .codec import Codec, has_base, plain_base

_MAX_MESSAGE = 2**26
# Keep references, since the program may replace the modules' functions.
_read, _write, _random = os.read, os.write, os.urandom
_loads, _dumps = json.loads, json.dumps

OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda function, *arguments, **named: function(*arguments, **named),
    "getattr": getattr,
    "setattr": setattr,
    "getitem": operator.getitem,
    "setitem": operator.setitem,
    "delitem": operator.delitem,
    "iter": iter,
    "next": next,
    "len": len,
    "bool": bool,
    "str": str,
    "repr": repr,
    "eq": operator.eq,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
}
_READING = ("iter", "next", "len", "bool", "str", "repr", "getitem", "setitem", "delitem")
CALLBACKS = {name: OPERATIONS[name] for name in ("call", "getattr", "setattr", *_READING)}


class BrokenExchangeError(Exception):
    """The other process is gone, or wrote an invalid message."""


class Channel:
    """Transfer length-prefixed JSON messages over two pipes."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing = reading, writing

    def send(self, message: Any) -> None:
        """Write a message.

        Raises:
            BrokenExchangeError: If the other process is gone.
        """
        data = _dumps(message, separators=(",", ":")).encode("ascii")
        data = struct.pack("=Q", len(data)) + data
        try:
            while data:
                data = data[_write(self._writing, data) :]
        except OSError as error:
            raise BrokenExchangeError("it exited before its end") from error

    def receive(self) -> Any:
        """Wait for a message.

        Raises:
            BrokenExchangeError: If the other process is gone, or the message is invalid.
        """
        (length,) = struct.unpack("=Q", self._exactly(8))
        if length > _MAX_MESSAGE:
            raise BrokenExchangeError("its answer is too large")
        try:
            return _loads(self._exactly(length))
        except (ValueError, RecursionError) as error:
            raise BrokenExchangeError("it wrote an invalid message") from error

    def _exactly(self, length: int) -> bytes:
        pieces, missing = [], length
        while missing:
            piece = _read(self._reading, min(missing, 2**20))
            if not piece:
                raise BrokenExchangeError("it exited before its end")
            pieces.append(piece)
            missing -= len(piece)
        return b"".join(pieces)


class Peer(Codec):
    """One side of the exchange.

    Args:
        channel: Channel to the other process.
        namespace: Globals of the code that runs in this process.
        operations: Operations that the other process may request.
        trusted: Whether the other process is trusted; an untrusted one may only use objects it was
            given.
        broken: Function to call if the exchange cannot continue; it must not return.
    """

    def __init__(
        self,
        channel: Channel,
        namespace: dict[str, Any],
        operations: dict[str, Callable[..., Any]],
        trusted: bool,
        broken: Callable[[str], NoReturn],
    ) -> None:
        super().__init__(namespace, trusted)
        self.operations = operations
        self._channel, self._broken = channel, broken
        self._lock = threading.RLock()
        self._exports: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._remotes: dict[int, Remote] = {}
        self._stdout = sys.stdout

    # ---- objects

    def number_of(self, value: Any) -> int | None:
        """Return the handle's number if the value stands for an object of the other process."""
        if type(value) is Remote:
            return _of(value)[1]
        return type(value)._number if isinstance(value, _WithBase) else None

    def export(self, value: Any) -> int:
        """Return a number by which the other process can refer to an object of this one."""
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._exports)
            self._exports.append(value)
        return self._numbers[id(value)]

    def exported(self, number: int) -> Any:
        """Return the object of this process with the given number."""
        return self._exports[number]

    def remote(self, number: int, base: Any) -> Any:
        """Return a stand-in for an object of the other process."""
        if number not in self._remotes:
            self._remotes[number] = Remote(self, number)
        if not has_base(base):
            return self._remotes[number]
        return _with_base(self._remotes[number], number, base)

    # ---- requests

    def request(self, operation: str, *arguments: Any, **named: Any) -> Any:
        """Execute an operation in the other process.

        Raises:
            BaseException: The exception raised there, as the nearest class known here.
        """
        with self._lock:
            try:
                slots, table, objects = self.encode([*arguments, *named.values()])
                captured, nonce = sys.stdout is not self._stdout, _random(16).hex()
                self._channel.send(["do", nonce, operation, slots, list(named), table, captured])
                while (message := self._channel.receive())[0] == "do":
                    self.serve(message)
                kind, answered, text, names, slots, table = message
                if answered != nonce:
                    raise ValueError("a reply to another request")
                if captured and text:
                    sys.stdout.write(str(text))
                values, _ = self.decode(slots, table, objects)
                if kind == "done":
                    return values[0]
                if kind == "raised":
                    raised = self._exception(names, values)
            except BrokenExchangeError as error:
                self._broken(str(error))
            except Exception:  # an invalid message may raise anything
                self._broken("it wrote an invalid message")
        raise raised

    def _exception(self, names: list[str], values: list[Any]) -> BaseException:
        for name in names:
            kind = self.namespace.get(name) if name in self.shared else None
            kind = kind or getattr(builtins, str(name), None)
            if isinstance(kind, type) and issubclass(kind, BaseException):
                try:
                    return kind(*values)
                except TypeError:
                    continue
        return Exception(*values)

    def serve(self, message: Any) -> None:
        """Execute a request of the other process and send the result.

        Raises:
            BrokenExchangeError: If the other process is gone.
        """
        _, nonce, operation, slots, names, table, captured = message
        values, objects = self.decode(slots, table)
        positional, named = values[: len(values) - len(names)], values[len(values) - len(names) :]
        output = io.StringIO()
        try:
            if not self.trusted:
                self._allow(operation, positional)
            with contextlib.redirect_stdout(output) if captured else contextlib.nullcontext():
                result = self.operations[operation](
                    *positional, **dict(zip(names, named, strict=True))
                )
            reply = ["done", nonce, output.getvalue(), [], *self.encode([result], objects)[:2]]
        except BaseException as error:
            mro = [kind.__name__ for kind in type(error).__mro__]
            reply = ["raised", nonce, output.getvalue(), mro, *self.encode(error.args, objects)[:2]]
        self._channel.send(reply)

    def serve_forever(self) -> None:
        """Execute requests until the other process is gone."""
        with self._lock, contextlib.suppress(BrokenExchangeError):
            while True:
                self.serve(self._channel.receive())

    def _allow(self, operation: str, arguments: list[Any]) -> None:
        """Restrict an untrusted program to the objects it was given.

        Raises:
            AttributeError: If it requests anything else.
        """
        target, rest = arguments[0], arguments[1:]
        allowed = operation in self.operations and id(target) in self._numbers
        if allowed and operation == "call":
            function = getattr(target, "__func__", target)
            allowed = isinstance(function, types.FunctionType)
            allowed = allowed and function.__globals__ is self.namespace
        elif allowed and operation in ("getattr", "setattr"):
            name, kind = rest[0], type(target)
            allowed = type(name) is str and not name.startswith("_")
            allowed = allowed and self.namespace.get(kind.__name__) is kind
        if not allowed:
            raise AttributeError("the tests did not provide this")


def _of(remote: Any) -> tuple[Peer, int]:
    where: tuple[Peer, int] = object.__getattribute__(remote, "_where")
    return where


def _forward(operation: str) -> Callable[..., Any]:
    def method(self: Any, *arguments: Any, **named: Any) -> Any:
        return _of(self)[0].request(operation, self, *arguments, **named)

    return method


def _between(operation: str) -> Callable[..., Any]:
    """Return an operator method for two objects of the program; plain data is not passed to it."""

    def method(self: Any, other: Any) -> Any:
        if type(other) is not Remote:
            return NotImplemented
        return _of(self)[0].request(operation, self, other)

    return method


class Remote:
    """Stand-in for an object of the other process.

    It never equals plain data, and its operators receive none: otherwise an object whose ``__eq__``
    or ``__sub__`` always suits would pass any test.
    """

    __slots__ = ("_where",)

    def __init__(self, peer: Peer, number: int) -> None:
        object.__setattr__(self, "_where", (peer, number))

    __call__ = _forward("call")
    __getattr__ = _forward("getattr")
    __setattr__ = _forward("setattr")
    __getitem__ = _forward("getitem")
    __setitem__ = _forward("setitem")
    __delitem__ = _forward("delitem")
    __iter__ = _forward("iter")
    __next__ = _forward("next")
    __len__ = _forward("len")
    __bool__ = _forward("bool")
    __str__ = _forward("str")
    __repr__ = _forward("repr")
    __hash__ = object.__hash__
    __lt__, __le__ = _between("lt"), _between("le")
    __gt__, __ge__ = _between("gt"), _between("ge")
    __add__, __sub__, __mul__ = _between("add"), _between("sub"), _between("mul")

    def __eq__(self, other: object) -> Any:
        if other is self:
            return True
        return _of(self)[0].request("eq", self, other) if type(other) is Remote else NotImplemented


class _WithBase:
    """Marker base of the classes that `_with_base` creates."""

    _number: int


def _with_base(remote: Remote, number: int, base: Any) -> Any:
    """Return plain data with the attributes of an object of the other process.

    Comparison and arithmetic are those of the plain data; attributes, such as a named tuple's
    fields, are requested.
    """
    kind = plain_base(base)
    assert kind is not None
    members = {"__getattr__": lambda _, name: getattr(remote, name), "_number": number}
    made = type(kind.__name__, (_WithBase, kind), members)
    return made(base)
