"""Names that act as markup, formulas, links or commands in other programs."""

from __future__ import annotations

HOSTILE = [
    "a/b", "$x$", "$\\frac{", "[red]", "[/red]", "[link=http://x]y[/]", "<b>",
    "<script>alert(1)</script>",
    "a|b", "`a`", "![x](http://x)", "[x](javascript:alert(1))", "**b**", "😀", ":smile:", "x" * 200,
    "a\\", "&lt;", "a\nb", "# a", "\x1b[31mred", "\x1b]0;title\x07", "http://example.org", "_x_",
]  # fmt: skip
