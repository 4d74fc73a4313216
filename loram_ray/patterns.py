"""Regular expressions from outside, matched within a bounded time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence

from loram_ray.errors import LoramError, shown

SECONDS = 3.0
"""Time in which all patterns must be matched; a match on paths takes microseconds."""
_LONGEST = 10_000
_PLAIN = re.compile(r"[\w.\-^$]*")
# PEFT's rule: the first pattern that the end of a module's path matches.
_PROGRAM = """
import json, re, sys
patterns, names = json.load(sys.stdin)
compiled = [re.compile(rf"(.*\\.)?({pattern})$") for pattern in patterns]
print(json.dumps([next((i for i, p in enumerate(compiled) if p.match(n)), None) for n in names]))
"""


def matched(patterns: Sequence[str], modules: Sequence[str], name: str) -> Mapping[str, str]:
    """The first pattern that matches the end of each module's path, by PEFT's rule.

    Python's expressions cannot be interrupted in every thread and may take longer than anyone
    lives, so patterns that are more than names are matched in a process that can be ended.

    Args:
        patterns: regular expressions, or module names.
        modules: full paths of modules.
        name: where the patterns stand, for messages.

    Returns:
        The pattern of each module that one of them matches.

    Raises:
        LoramError: a pattern is no regular expression, or takes too long.
    """
    for pattern in patterns:
        if len(pattern) > _LONGEST:
            raise LoramError(
                f"{name} must hold patterns of at most {_LONGEST:,} characters, got "
                f"{len(pattern):,}; shorten it"
            )
        try:
            re.compile(f"(.*\\.)?({pattern})$")
        except (re.error, RecursionError, OverflowError) as error:
            raise LoramError(
                f"{name} must hold regular expressions, got {shown(pattern)} ({error}); fix it"
            ) from error
    if all(_PLAIN.fullmatch(pattern) for pattern in patterns):
        return _first(patterns, modules)
    asked = json.dumps([list(patterns), list(modules)])
    command = [sys.executable, "-I", "-c", _PROGRAM]
    try:
        done = subprocess.run(
            command, input=asked, capture_output=True, text=True, timeout=SECONDS, check=True
        )
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        raise LoramError(
            f"{name} must be matched within {SECONDS:g} s, {shown(patterns[0])} takes longer; "
            "write patterns without nested repetitions"
        ) from error
    found: list[int | None] = json.loads(done.stdout)
    pairs = zip(modules, found, strict=True)
    return {module: patterns[number] for module, number in pairs if number is not None}


def _first(patterns: Sequence[str], modules: Sequence[str]) -> dict[str, str]:
    compiled = [(pattern, re.compile(rf"(.*\.)?({pattern})$")) for pattern in patterns]
    found = {}
    for module in modules:
        pattern = next((given for given, ready in compiled if ready.match(module)), None)
        if pattern is not None:
            found[module] = pattern
    return found
