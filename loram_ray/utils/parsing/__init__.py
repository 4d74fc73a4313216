"""Read untrusted text, JSON and YAML with bounds.

All files that others wrote are read here. A reader opens regular files only, limits size, depth and
expansion before it spends time or memory, and rejects what later steps cannot handle: duplicate
keys, non-finite numbers and invalid Unicode. Each error is a `LoramError` of one line that names
the file, the rule and the remedy. Values are validated by the models in ``parsing.documents``,
which needs pydantic.
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
