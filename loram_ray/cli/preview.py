"""loram train --preview: shows the tokens of the first examples instead of training."""

from __future__ import annotations

import sys
from typing import Any

from loram_ray.cli.tables import console, print_json
from loram_ray.finetuning.preview import Preview, preview
from loram_ray.utils.printing import plain


def show_examples(section: Any, examples: int, as_json: bool) -> None:
    """Print the tokens of examples and which of them carry loss; unusable rows go to stderr."""
    shown = []
    for row in preview(section, examples):
        if isinstance(row, Preview):
            shown.append(row)
        else:
            print(plain(f"loram: unusable row: {row}"), file=sys.stderr)
    if as_json:
        print_json([row.as_json() for row in shown])
        return
    out = console(120)
    for row in shown:
        out.print(row.as_text(), soft_wrap=not sys.stdout.isatty())
