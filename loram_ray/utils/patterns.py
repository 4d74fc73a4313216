"""Regular expressions from outside, matched within a bounded time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence

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
        if len(pattern) > _LONGEST:
            return f"patterns of at most {_LONGEST:,} characters, got {len(pattern):,}; shorten it"
        try:
            _compiled(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            return f"regular expressions, got {shown(pattern)} ({error}); fix it"
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


def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")
