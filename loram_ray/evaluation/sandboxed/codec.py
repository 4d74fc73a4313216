"""Encode Python values as JSON between two processes, one of which is not trusted.

Plain data travels by value: the receiver rebuilds it from its own types, so neither code nor an
overridden ``__eq__`` comes with it. Other objects stay where they are, and the receiver gets a
handle. Containers are stored in a flat table and refer to each other by position, which preserves
aliases and cycles and needs no recursion at any depth.
"""

from __future__ import annotations

import builtins
import importlib
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

_LARGEST_INT = 2**63  # larger ones are sent in hexadecimal, parsed in linear time
_MISSING = object()
_ITEMS = {"list": list, "set": set, "deque": deque, "tuple": tuple, "frozenset": frozenset}
_PAIRS = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter, "defaultdict": defaultdict}
_ORDER = (
    "object",
    "list",
    "deque",
    "bytearray",
    "set",
    *_PAIRS,
)  # hashed containers are filled last
_SINGLETONS = {"Ellipsis": Ellipsis, "NotImplemented": NotImplemented}
_CLASSES = {name: kind for name, kind in vars(builtins).items() if isinstance(kind, type)}
_NAMES = {kind: name for name, kind in _CLASSES.items()}

# Standard library types that are rebuilt from plain arguments.
_ARGUMENTS: dict[tuple[str, str], Callable[[Any], tuple[Any, ...]]] = {
    ("decimal", "Decimal"): lambda v: (str(v),),
    ("fractions", "Fraction"): lambda v: (v.numerator, v.denominator),
    ("datetime", "timedelta"): lambda v: (v.days, v.seconds, v.microseconds),
    ("datetime", "timezone"): lambda v: (v.utcoffset(None),),
    ("datetime", "date"): lambda v: (v.year, v.month, v.day),
    ("datetime", "time"): lambda v: (v.hour, v.minute, v.second, v.microsecond, v.tzinfo),
    ("datetime", "datetime"): lambda v: (
        v.year, v.month, v.day, v.hour, v.minute, v.second, v.microsecond, v.tzinfo,
    ),
    ("uuid", "UUID"): lambda v: (str(v),),
    ("pathlib", "PosixPath"): lambda v: (str(v),),
    ("pathlib", "PurePosixPath"): lambda v: (str(v),),
}  # fmt: skip

# Functions that extract the plain value from an instance of a subclass.
_PLAIN: dict[type, Callable[[Any], Any]] = {
    int: int.__pos__, float: float.__pos__, complex: complex.__pos__, str: str.__str__,
    bytes: lambda v: b"".join([v]), tuple: lambda v: tuple.__getitem__(v, slice(None)),
    list: lambda v: list.__getitem__(v, slice(None)), dict: dict.copy,
    set: lambda v: set(set.__iter__(v)), frozenset: lambda v: frozenset(frozenset.__iter__(v)),
}  # fmt: skip

Slot = Any  # JSON: an atom, [position in the table], or {"int": hexadecimal}


def plain_base(value: Any) -> type | None:
    """Return the builtin data type that a value's class derives from, or None."""
    return next((base for base in _PLAIN if issubclass(type(value), base)), None)


class Codec:
    """Encode and decode values; subclasses define how other objects travel.

    Attributes:
        namespace: Globals of the code that runs in this process.
        shared: Names of classes that both processes define; their instances travel by value.
        trusted: Whether the other process is trusted; if so, functions of modules are looked up by
            name.
    """

    def __init__(self, namespace: dict[str, Any], trusted: bool) -> None:
        self.namespace, self.trusted = namespace, trusted
        self.shared: frozenset[str] = frozenset()

    def number_of(self, value: Any) -> int | None:
        """Return the handle's number if the value stands for an object of the other process."""
        raise NotImplementedError

    def export(self, value: Any) -> int:
        """Return a number by which the other process can refer to an object of this one."""
        raise NotImplementedError

    def exported(self, number: int) -> Any:
        """Return the object of this process with the given number."""
        raise NotImplementedError

    def remote(self, number: int, base: Any) -> Any:
        """Return a stand-in for an object of the other process.

        Args:
            number: Number of the object.
            base: Plain value inside the object, if its class derives from a data type.
        """
        raise NotImplementedError

    # ---- encoding

    def encode(
        self, roots: Iterable[Any], known: Sequence[Any] = ()
    ) -> tuple[list[Slot], list[Any], list[Any]]:
        """Encode values as JSON.

        Args:
            roots: Values to encode.
            known: Objects from a table of the other process; they keep their positions, and their
                current contents are sent back.

        Returns:
            A slot for each root, the table, and the objects of its rows.
        """
        objects = list(known)
        places = {id(value): place for place, value in enumerate(objects)}

        def slot(value: Any) -> Slot:
            kind = type(value)
            if kind.__module__ == "numpy" and getattr(value, "shape", None) == ():
                value = value.item() if hasattr(value, "item") else value
                kind = type(value)
            if value is None or kind is bool or kind is str or kind is float:
                return value
            if kind is int:
                return value if abs(value) < _LARGEST_INT else {"int": hex(value)}
            if id(value) not in places:
                places[id(value)] = len(objects)
                objects.append(value)
            return [places[id(value)]]

        slots = [slot(root) for root in roots]
        table: list[Any] = []
        while len(table) < len(objects):
            table.append(self._row(objects[len(table)], slot))
        return slots, table, objects

    def _row(self, value: Any, slot: Callable[[Any], Slot]) -> list[Any]:
        kind = type(value)
        name = kind.__name__
        if _ITEMS.get(name) is kind:
            size = slot(value.maxlen) if kind is deque else None
            return [name, [slot(item) for item in value], size]
        if _PAIRS.get(name) is kind:
            factory = slot(value.default_factory) if kind is defaultdict else None
            return [name, [[slot(key), slot(item)] for key, item in value.items()], factory]
        if kind is bytes or kind is bytearray:
            return [name, value.decode("latin-1")]
        if kind is complex:
            return [name, value.real, value.imag]
        if kind is range or kind is slice:
            return [name, slot(value.start), slot(value.stop), slot(value.step)]
        for singleton, known in _SINGLETONS.items():
            if value is known:
                return ["singleton", singleton]
        number = self.number_of(value)
        if number is not None:
            return ["yours", number]
        if isinstance(value, type) and value in _NAMES:
            return ["class", _NAMES[value]]
        return self._row_of_library(value, slot) or self._row_of_object(value, slot)

    def _row_of_library(self, value: Any, slot: Callable[[Any], Slot]) -> list[Any] | None:
        kind = type(value)
        where = (kind.__module__, kind.__qualname__)
        if where in _ARGUMENTS and getattr(sys.modules.get(where[0]), where[1], None) is kind:
            return ["made", *where, [slot(argument) for argument in _ARGUMENTS[where](value)]]
        if where == ("numpy", "ndarray") and value.dtype.kind in "biufcSU":
            data = value.tobytes().decode("latin-1")
            return ["array", value.dtype.str, list(value.shape), data]
        if self.trusted or not callable(value):
            return None
        module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
        known = isinstance(module, str) and module.partition(".")[0] in sys.stdlib_module_names
        if known and module != "__main__" and isinstance(name, str):
            is_found = getattr(sys.modules.get(str(module)), name, None) is value
            return ["global", module, name] if is_found else None
        return None

    def _row_of_object(self, value: Any, slot: Callable[[Any], Slot]) -> list[Any]:
        kind = type(value)
        name, base = kind.__name__, plain_base(value)
        plain = slot(_PLAIN[base](value)) if base else None
        if name in self.shared and self.namespace.get(name) is kind:
            if "_member_map_" in vars(kind):  # an Enum
                return ["member", name, value._name_]
            return ["object", name, [[key, slot(item)] for key, item in _state(value)], plain]
        return ["handle", self.export(value), plain, base is not None]

    # ---- decoding

    def decode(
        self, slots: Iterable[Slot], table: Sequence[Any], known: Sequence[Any] = ()
    ) -> tuple[list[Any], list[Any]]:
        """Decode the result of `encode`.

        Args:
            slots: Slots of the roots.
            table: Rows of the table; those of ``known`` come first.
            known: Objects of this process that the table updates in place.

        Returns:
            The roots, and the objects of the table's rows.

        Raises:
            Exception: Of any kind, if the message does not come from `encode`.
        """
        objects = [*known, *[self._shell(row) for row in table[len(known) :]]]

        def value(slot: Slot) -> Any:
            if type(slot) is list:
                place = slot[0]
                if objects[place] is _MISSING:
                    objects[place] = self._made(table[place], value)
                return objects[place]
            return int(slot["int"], 16) if type(slot) is dict else slot

        for place in range(len(objects)):
            value([place])
        rows = [row for row in enumerate(table) if row[1][0] in _ORDER]
        for place, row in sorted(rows, key=lambda one: _ORDER.index(one[1][0])):
            self._fill(objects[place], row, value)
        return [value(slot) for slot in slots], objects

    def _shell(self, row: list[Any]) -> Any:
        """Return an empty container, to which others can refer before it is filled."""
        name = row[0]
        if name == "deque":
            return deque(maxlen=row[2])
        if name == "bytearray":
            return bytearray()
        if name == "object" and row[3] is None and row[1] in self.shared:
            return object.__new__(self.namespace[row[1]])
        mutable = {"list": list, "set": set, **_PAIRS}
        return mutable[name]() if name in mutable else _MISSING

    def _made(self, row: list[Any], value: Callable[[Slot], Any]) -> Any:
        name = row[0]
        if name in ("tuple", "frozenset"):
            return _ITEMS[name](value(item) for item in row[1])
        if name == "bytes":
            return row[1].encode("latin-1")
        if name in ("complex", "range"):
            return _CLASSES[name](*(value(part) for part in row[1:]))
        if name == "slice":
            return slice(*(value(part) for part in row[1:]))
        if name == "singleton":
            return _SINGLETONS[row[1]]
        if name == "class":
            return _CLASSES[row[1]]
        if name == "made" and (row[1], row[2]) in _ARGUMENTS:
            kind = getattr(importlib.import_module(row[1]), row[2])
            return kind(*(value(argument) for argument in row[3]))
        if name == "array":
            numpy = importlib.import_module("numpy")
            flat = numpy.frombuffer(row[3].encode("latin-1"), numpy.dtype(row[1]))
            return flat.reshape(row[2]).copy()
        if name == "global" and self.trusted:
            return getattr(importlib.import_module(row[1]), row[2])
        if name == "member" and row[1] in self.shared:
            return self.namespace[row[1]]._member_map_[row[2]]
        if name == "object" and row[1] in self.shared:
            plain = value(row[3])
            base = plain_base(plain)
            assert base is not None
            return base.__new__(self.namespace[row[1]], plain)  # type: ignore[call-overload]
        if name == "handle":
            return self.remote(row[1], value(row[2]) if row[3] else _MISSING)
        if name == "yours":
            return self.exported(row[1])
        raise ValueError(f"unknown kind of value {name!r}")

    def _fill(self, target: Any, row: list[Any], value: Callable[[Slot], Any]) -> None:
        name, kind = row[0], type(target)
        if name == "object":
            if kind.__name__ == row[1] and self.namespace.get(row[1]) is kind:
                for key, item in row[2]:
                    if not callable(getattr(kind, key, None)):  # keep the receiver's methods
                        object.__setattr__(target, key, value(item))
        elif kind.__name__ != name:
            return
        elif name == "bytearray":
            target[:] = row[1].encode("latin-1")
        elif name in _PAIRS:
            target.clear()
            if name == "defaultdict":
                target.default_factory = value(row[2])
            for key, item in row[1]:
                target[value(key)] = value(item)
        else:
            items = [value(item) for item in row[1]]
            target.clear()
            (target.update if name == "set" else target.extend)(items)


def has_base(base: Any) -> bool:
    """Whether `Codec.remote` was given a plain value."""
    return base is not _MISSING


def _state(value: Any) -> list[tuple[str, Any]]:
    slots = [
        name
        for kind in type(value).__mro__
        for name in _names(vars(kind).get("__slots__", ()))
        if name not in ("__dict__", "__weakref__") and hasattr(value, name)
    ]
    return [
        *getattr(value, "__dict__", {}).items(),
        *((name, getattr(value, name)) for name in slots),
    ]


def _names(slots: Any) -> Iterable[str]:
    return (slots,) if isinstance(slots, str) else slots
