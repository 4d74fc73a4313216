"""Match regular expressions from users within a time limit."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Self

from loram_ray.errors import LoramError, shown
from loram_ray.utils.trial_process import run_apart

SECONDS = 1
"""CPU time limit in seconds for matching all patterns; matching paths takes microseconds."""
_LONGEST = 10_000
_PLAIN = re.compile(r"[\w.\-^$]*")
_EXAMPLES = tuple(
    f"model.layers.{'1' * 20}.{name}"
    for name in ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj", "a" * 40, "a_" * 20 + "!")
)
"""Typical module paths, and some longer ones."""
# PEFT's rule: the first pattern that the end of a module's path matches.
_PROGRAM = """
import json, re, resource, sys
patterns, names, seconds = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
compiled = [re.compile(rf"(.*\\.)?({pattern})$") for pattern in patterns]
any([pattern.match(name) for pattern in compiled for name in names])
"""
# Reads length-prefixed texts and answers with one byte each; a timer kills it if it takes too long.
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


def match_patterns(patterns: Sequence[str], modules: Sequence[str], name: str) -> Mapping[str, str]:
    """Return the first pattern that matches the end of each module's path, as PEFT does.

    Args:
        patterns: Regular expressions or module names.
        modules: Full paths of modules.
        name: Configuration key of the patterns, for messages.

    Returns:
        The matching pattern by module, without modules that no pattern matches.

    Raises:
        LoramError: A pattern is not a valid regular expression, or takes too long.
    """
    fault = patterns_error(patterns, modules)
    if fault is not None:
        raise LoramError(f"{name} must be {fault}")
    compiled = [(pattern, _compiled(pattern)) for pattern in patterns]
    matches = {}
    for module in modules:
        pattern = next((given for given, ready in compiled if ready.match(module)), None)
        if pattern is not None:
            matches[module] = pattern
    return matches


def patterns_error(patterns: Sequence[str], names: Sequence[str] = ()) -> str | None:
    """Return the rule that patterns break, with the remedy, or None.

    Matching can take exponential time and cannot be interrupted in every thread. Patterns other
    than plain names are therefore tried in a process that can be killed.

    Args:
        patterns: Regular expressions or module names.
        names: Texts to match, besides examples of module paths.
    """
    for pattern in patterns:
        fault = expression_error(pattern)
        if fault is not None:
            return fault
    if all(_PLAIN.fullmatch(pattern) for pattern in patterns):
        return None
    done = run_apart(_PROGRAM, [list(patterns), [*names, *_EXAMPLES], SECONDS])
    if done is not None and not done.returncode:
        return None
    return (
        f"matched within {SECONDS} s, but {shown(patterns[0])} takes longer; use patterns without "
        "nested repetitions"
    )


def expression_error(pattern: str) -> str | None:
    """Return the rule that a regular expression breaks, with the remedy, or None."""
    if len(pattern) > _LONGEST:
        return f"at most {_LONGEST:,} characters long, got {len(pattern):,}; shorten it"
    try:
        _compiled(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return f"a regular expression, got {shown(pattern)} ({error}); fix it"
    return None


class Search:
    """Search texts for a regular expression, in a process that can be killed.

    Use it as a context manager, which ends the process.

    Args:
        pattern: Regular expression.
        name: Configuration key of the pattern, for messages.
        seconds: CPU time limit per text, plus the same again per million characters.
    """

    def __init__(self, pattern: str, name: str, seconds: float = SECONDS) -> None:
        self._pattern, self._name = pattern, name
        command = [sys.executable, "-I", "-S", "-c", _SEARCH, pattern, str(seconds)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def found(self, text: str, place: str) -> bool:
        """Return whether the pattern matches anywhere in a text.

        Args:
            text: Text to search.
            place: Origin of the text, for messages.

        Raises:
            LoramError: The search takes too long.
        """
        process, data = self._process, text.encode("utf-8", "surrogatepass")
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(struct.pack("<Q", len(data)) + data)
        process.stdin.flush()
        answer = process.stdout.read(1)
        if not answer:
            raise LoramError(
                f"{self._name} must be matched within {SECONDS} s per million characters, but "
                f"{shown(self._pattern)} takes longer on a text of {place}; use a pattern without "
                "nested repetitions"
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
