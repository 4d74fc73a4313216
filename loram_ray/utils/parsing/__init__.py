"""Text, JSON and YAML from outside: one reader each, which bounds what it reads.

Files that others wrote are read here and nowhere else. A reader opens regular files only, bounds
size, depth and expansion before it spends time or memory, and refuses what a later step could not
handle: duplicate keys, numbers that are not finite, text that is not Unicode. Every refusal is a
`LoramError` of one line that names the file, the rule and the remedy. Values are checked by models
of ``parsing.documents``, which needs pydantic.
"""

from loram_ray.utils.parsing.json_text import parse_json, read_json
from loram_ray.utils.parsing.text import (
    is_unicode,
    named,
    read_bytes,
    read_text,
    shown_reason,
)
from loram_ray.utils.parsing.yaml_text import comment_in, parse_yaml, read_yaml

__all__ = [
    "comment_in",
    "is_unicode",
    "named",
    "parse_json",
    "parse_yaml",
    "read_bytes",
    "read_json",
    "read_text",
    "read_yaml",
    "shown_reason",
]
