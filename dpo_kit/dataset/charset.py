"""Text files that are not UTF-8: what their bytes say, and the command that makes UTF-8 of them.

Deliberately not here: reading the rows; bytes that are not UTF-8 come through the readers as surrogates.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_SHOWN_AROUND = 12
_DECODED, _STRAY = re.compile("[^\x00-\x7f\udc80-\udcff]"), re.compile("[\udc80-\udcff]")
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
    shown, is_cp1252, is_utf8_elsewhere = "", True, False
    for line in lines:
        try:
            is_utf8_elsewhere |= not line.decode().isascii()
            continue
        except UnicodeDecodeError as error:
            at = error.start
        text = line.decode("utf-8", "surrogateescape")
        # In Chinese or Japanese encodings a few pairs of bytes are UTF-8 by chance.
        is_utf8_elsewhere |= len(_DECODED.findall(text)) >= len(_STRAY.findall(text))
        try:
            read = line.decode("cp1252")
            shown = shown or read[max(0, at - _SHOWN_AROUND) : at + _SHOWN_AROUND].strip()
        except UnicodeDecodeError:
            is_cp1252 = False
    if is_utf8_elsewhere:
        return "elsewhere the file is UTF-8, so do not convert it as a whole: mend what is not"
    if not is_cp1252:
        return f"nor Western Windows (cp1252); find out its encoding, then: {command('ENCODING', name)}"
    return (
        f"as Western Windows (cp1252) it reads {shown!r}; if that is right: {command('cp1252', name)}, else "
        "find out its encoding"
    )
