"""Regular expressions from outside, matched within a bounded time."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Self

from loram_ray.errors import LoramError, shown

SECONDS = 1
"""CPU time in which all patterns must be matched; a match on paths takes microseconds."""
_WALL_SECONDS = 60.0
_LONGEST = 10_000
_PLAIN = re.compile(r"[\w.\-^$]*")
_EXAMPLES = tuple(
    f"model.layers.{'1' * 20}.{name}"
    for name in ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj", "a" * 40, "a_" * 20 + "!")
)
"""Paths like those of modules, some longer."""
# PEFT's rule: the first pattern that the end of a module's path matches.
_PROGRAM = """
import json, re, resource, sys
patterns, names, seconds = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
compiled = [re.compile(rf"(.*\\.)?({pattern})$") for pattern in patterns]
any([pattern.match(name) for pattern in compiled for name in names])
"""
# Texts come with their lengths; a byte goes back. A process that computes for too long is ended.
_SEARCH = """
import re, signal, struct, sys
pattern, seconds = re.compile(sys.argv[1]), float(sys.argv[2])
while head := sys.stdin.buffer.read(8):
    text = sys.stdin.buffer.read(*struct.unpack("<Q", head)).decode("utf-8", "surrogatepass")
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds + seconds * len(text) / 1e6)
    found = pattern.search(text)
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    sys.stdout.buffer.write(b"1" if found else b"0")
    sys.stdout.buffer.flush()
"""


def matched(patterns: Sequence[str], modules: Sequence[str], name: str) -> Mapping[str, str]:
    """The first pattern that matches the end of each module's path, by PEFT's rule.

    Args:
        patterns: regular expressions, or module names.
        modules: full paths of modules.
        name: where the patterns stand, for messages.

    Returns:
        The pattern of each module that one of them matches.

    Raises:
        LoramError: a pattern is no regular expression, or takes too long.
    """
    fault = fault_of_patterns(patterns, modules)
    if fault is not None:
        raise LoramError(f"{name} must be {fault}")
    compiled = [(pattern, _compiled(pattern)) for pattern in patterns]
    found = {}
    for module in modules:
        pattern = next((given for given, ready in compiled if ready.match(module)), None)
        if pattern is not None:
            found[module] = pattern
    return found


def fault_of_patterns(patterns: Sequence[str], names: Sequence[str] = ()) -> str | None:
    """Return what patterns must be and these are not, with the remedy, or None.

    Python's expressions cannot be interrupted in every thread and may take longer than anyone
    lives, so patterns that are more than names are tried in a process that can be ended.

    Args:
        patterns: regular expressions, or module names.
        names: what they will be matched against, besides examples of modules' paths.
    """
    for pattern in patterns:
        fault = fault_of_expression(pattern)
        if fault is not None:
            return fault
    if all(_PLAIN.fullmatch(pattern) for pattern in patterns):
        return None
    asked = json.dumps([list(patterns), [*names, *_EXAMPLES], SECONDS])
    command = [sys.executable, "-I", "-c", _PROGRAM]
    try:
        done = subprocess.run(
            command, input=asked.encode(), capture_output=True, timeout=_WALL_SECONDS
        )
    except subprocess.TimeoutExpired:
        pass
    else:
        if not done.returncode:
            return None
    return (
        f"matched within {SECONDS} s, {shown(patterns[0])} takes longer; write patterns without "
        "nested repetitions"
    )


def fault_of_expression(pattern: str) -> str | None:
    """Return what a pattern must be and this one is not, with the remedy, or None."""
    if len(pattern) > _LONGEST:
        return f"at most {_LONGEST:,} characters long, got {len(pattern):,}; shorten it"
    try:
        _compiled(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return f"a regular expression, got {shown(pattern)} ({error}); fix it"
    return None


class Search:
    """A regular expression that is looked for in texts, in a process that can be ended.

    Use it as a context manager, which ends the process.

    Args:
        pattern: a regular expression.
        name: where it stands, for messages.
        seconds: CPU time for a text, and as much again for each million characters.
    """

    def __init__(self, pattern: str, name: str, seconds: float = SECONDS) -> None:
        self._pattern, self._name = pattern, name
        command = [sys.executable, "-I", "-S", "-c", _SEARCH, pattern, str(seconds)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def found(self, text: str, place: str) -> bool:
        """Whether the pattern is found in a text.

        Args:
            text: any.
            place: where the text is from, for messages.

        Raises:
            LoramError: it takes too long.
        """
        process, data = self._process, text.encode("utf-8", "surrogatepass")
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(struct.pack("<Q", len(data)) + data)
        process.stdin.flush()
        answer = process.stdout.read(1)
        if not answer:
            raise LoramError(
                f"{self._name} must be matched within {SECONDS} s per million characters, "
                f"{shown(self._pattern)} takes longer on a text of {place}; write a pattern "
                "without nested repetitions"
            )
        return answer == b"1"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")
