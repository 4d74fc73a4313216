"""Check the encoding of text files: UTF-8 with LF or CRLF line endings."""

from __future__ import annotations

import codecs

from loram_ray.errors import LoramError

BYTE_ORDER_MARK = "\ufeff"
_MARKS = {  # UTF-32 first, as its mark starts with that of UTF-16
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
_NUL_SHARE = 0.1


def refuse_other_encodings(head: bytes, path: str) -> None:
    """Refuse a file that is not line-based UTF-8 text, judging by its first bytes.

    Args:
        head: First bytes of the file.
        path: Path of the file for error messages.

    Raises:
        LoramError: If the file is UTF-16, UTF-32 or binary, or its lines end in a lone CR.
    """
    for encoding, marks in _MARKS.items():
        if head.startswith(marks):
            raise LoramError(
                f"{path} must be UTF-8 text, but begins with the byte order mark of {encoding}; "
                f"convert it: iconv -f {encoding} -t UTF-8"
            )
    if head.count(0) > _NUL_SHARE * len(head):
        raise LoramError(
            f"{path} must be UTF-8 text, but begins with NUL bytes, like UTF-16 and UTF-32; "
            "convert it: iconv -f UTF-16LE -t UTF-8"
        )
    if b"\r" in head[:-1] and b"\n" not in head:
        raise LoramError(
            f"{path} must have lines that end in LF or CRLF, but they end in CR; convert it: tr "
            "'\\r' '\\n'"
        )
