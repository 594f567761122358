"""Text files that are not UTF-8: what their bytes say, and the command that makes UTF-8 of them.

Deliberately not here: reading the rows; bytes that are not UTF-8 come through the readers as surrogates.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_SHOWN_AROUND = 12
_DECODED = re.compile("[^\x00-\x7f\udc80-\udcff]")
_MARKS = {
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}


def wide_codec(start: bytes) -> str | None:
    """The name of UTF-16 or UTF-32, told by the byte order mark or by an ASCII letter at the start; else None."""
    for mark, codec in _MARKS.items():
        if start.startswith(mark):
            return codec
    zeros = "".join("0" if byte == 0 else "x" for byte in start[:4])
    return {"x000": "utf-32le", "000x": "utf-32be", "x0x0": "utf-16le", "0x0x": "utf-16be"}.get(zeros)


def command(codec: str, name: str) -> str:
    """The shell command that makes UTF-8 of a file of this name."""
    convert = f"iconv -f {codec} -t utf-8"
    packed = name.lower().endswith(".gz")
    return f"gzip -dc OLD | {convert} | gzip > NEW" if packed else f"{convert} OLD > NEW"


def remedy(lines: Iterable[bytes], name: str) -> str:
    """What to do about a file in which some bytes are not UTF-8, by all of its bytes.

    A file in cp1252 (of which Latin-1 has the same letters, and control characters for the quotes and dashes)
    is shown as it would read. A file that is UTF-8 elsewhere is not converted: that would spoil the rest.
    """
    shown, is_mixed, has_utf8 = "", False, False
    for line in lines:
        try:
            has_utf8 = has_utf8 or not line.decode().isascii()
            continue
        except UnicodeDecodeError as error:
            at = error.start
        is_mixed = is_mixed or bool(_DECODED.search(line.decode("utf-8", "surrogateescape")))
        try:
            text = line.decode("cp1252")
        except UnicodeDecodeError:
            return (
                "the file is no text of Western Windows (cp1252) either; find out its encoding, then: "
                + command("ENCODING", name)
            )
        shown = shown or text[max(0, at - _SHOWN_AROUND) : at + _SHOWN_AROUND].strip()
    if is_mixed:
        return "the rest of the text is UTF-8; mend this line"
    if has_utf8:
        return "the other lines are UTF-8; mend this one"
    return (
        f"as text of Western Windows it reads {shown!r}; if that is right: {command('cp1252', name)}, else "
        "find out its encoding"
    )
