"""Small HTML for notebooks: one escape helper, tables, cards, marked text.

Everything that shows data goes through `escape`; a cell of a table that is not already an `Html` fragment
is escaped by the table. Colours are translucent and text inherits its colour, so that a fragment reads the
same on a light and on a dark page; every fragment also has a plain text twin for terminals and for nbval.

Deliberately not here: what to show (`notebook`), charts (`plots`), any dependency but IPython where it shows.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LINE = "rgba(127,127,127,.35)"
CHOSEN = "rgba(0,114,178,.22)"
REJECTED = "rgba(213,94,0,.22)"
SHARED = "rgba(127,127,127,.28)"

# Answers hold prices; without these classes MathJax (3/4, and 2 in nbconvert) sets "$5 or $10" as a formula.
_OUTER = 'class="dpo-kit mathjax_ignore tex2jax_ignore" style="margin:.4em 0;line-height:1.4"'
_SHORT_CELL = 24  # characters; shorter ones are not broken over lines
_CELL = f"padding:.3em .7em;border-bottom:1px solid {LINE};vertical-align:top"


@dataclass(frozen=True)
class Html:
    """A fragment that shows as HTML in a notebook and as `text` everywhere else."""

    markup: str
    text: str = ""

    def _repr_html_(self) -> str:
        return f"<div {_OUTER}>{self.markup}</div>"

    def __repr__(self) -> str:
        return self.text or "(shown in a notebook)"


def escape(value: object) -> str:
    """Any value as inert HTML text.

    Markup characters and quotes become entities. Control and direction characters, which could hide or
    reorder what is shown, become visible code points.
    """
    return html.escape(visible(str(value)), quote=True)


def visible(text: str) -> str:
    """Text with its control and direction characters as visible code points: `[U+001B]`; line breaks and tabs stay."""
    if text.isascii() and text.replace("\n", "").replace("\t", "").isprintable():
        return text
    return "".join(_visible(c) for c in text)


def _visible(character: str) -> str:
    if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs"):
        return character
    if character in "\u200c\u200d":  # joiners: ordinary in many scripts and in emoji
        return character
    return f"[U+{ord(character):04X}]"


def signed(value: float, digits: int = 3) -> str:
    """A number with its sign; what rounds to zero is `+0.000`, so that rounding noise cannot turn the sign."""
    return f"{round(value, digits) + 0.0:+.{digits}f}"


def paragraph(text: object) -> Html:
    """One line of escaped text."""
    return Html(f'<div style="margin:.3em 0">{escape(text)}</div>', str(text))


def notice(level: str, text: object) -> Html:
    """One escaped line with a bar at its side: `bad` in vermillion, anything else in orange."""
    colour = "#D55E00" if level == "bad" else "#E69F00"
    style = f"margin:.3em 0;padding:.1em .6em;border-left:4px solid {colour}"
    return Html(f'<div style="{style}"><b>{escape(level)}</b> {escape(text)}</div>', f"{level}: {text}")


def preformatted(text: object) -> Html:
    """Escaped text with its own line breaks, in the page's fixed-width face."""
    style = "margin:.3em 0;white-space:pre-wrap;font-family:monospace;background:transparent;color:inherit"
    return Html(f'<pre style="{style}">{escape(text)}</pre>', str(text))


def marked(pieces: Sequence[tuple[object, str]]) -> Html:
    """Text in pieces, each over its own translucent background ("" for none), line breaks kept."""
    spans = [_span(text, background) for text, background in pieces]
    body = f'<div style="white-space:pre-wrap;overflow-wrap:anywhere">{"".join(spans)}</div>'
    return Html(body, "".join(str(text) for text, _ in pieces))


def _span(text: object, background: str) -> str:
    if not background:
        return f"<span>{escape(text)}</span>"
    style = f"background:{background};border-radius:2px;color:inherit"
    return f'<span style="{style}">{escape(text)}</span>'


def legend(entries: Sequence[tuple[str, str]]) -> Html:
    """What each background means: (meaning, background) pairs."""
    chips = " &nbsp; ".join(_span(f" {meaning} ", background) for meaning, background in entries)
    style = "font-size:.9em;margin:.2em 0"
    return Html(f'<div style="{style}">{chips}</div>', ", ".join(meaning for meaning, _ in entries))


def card(title: object, *parts: Html) -> Html:
    """A framed block with a title; `parts` follow each other."""
    style = f"border:1px solid {LINE};border-radius:4px;padding:.5em .8em;margin:.5em 0"
    head = f'<div style="font-weight:600;margin-bottom:.3em">{escape(title)}</div>'
    markup = f'<div style="{style}">{head}{"".join(p.markup for p in parts)}</div>'
    return Html(markup, "\n".join([str(title), *(p.text for p in parts if p.text)]))


def stack(*parts: Html) -> Html:
    """Fragments below each other."""
    return Html("".join(p.markup for p in parts), "\n".join(p.text for p in parts if p.text))


def columns(*parts: Html) -> Html:
    """Fragments beside each other in equal widths, wrapping on a narrow page."""
    style = "flex:1 1 20em;min-width:0"
    cells = "".join(f'<div style="{style}">{part.markup}</div>' for part in parts)
    markup = f'<div style="display:flex;flex-wrap:wrap;gap:.8em">{cells}</div>'
    return Html(markup, "\n".join(p.text for p in parts if p.text))


def table(
    header: Sequence[str], rows: Iterable[Sequence[object]], *, caption: str = "", widths: Sequence[int] = ()
) -> Html:
    """A table; columns whose cells are all numbers (units allowed) are set to the right.

    Args:
        header: one title a column.
        rows: cells; an `Html` cell is taken as it is, anything else is escaped.
        caption: one line above.
        widths: of each column in percent, for columns of long text; by default the page decides.
    """
    body = [list(row) for row in rows]
    for row in body:
        assert len(row) == len(header), (len(row), len(header))
    right = [bool(body) and all(_is_number(row[c]) for row in body) for c in range(len(header))]
    styles = [f"text-align:{'right' if r else 'left'}" for r in right]
    heads = [f"{style};width:{w}%" for style, w in zip(styles, widths, strict=True)] if widths else styles
    head = "".join(_cell("th", title, style) for title, style in zip(header, heads, strict=True))
    lines = ["".join(_cell("td", v, s) for v, s in zip(row, styles, strict=True)) for row in body]
    top = f'<caption style="text-align:left;padding:.2em 0">{escape(caption)}</caption>' if caption else ""
    full = ";width:100%" if widths else ""
    style = f"border-collapse:collapse;background:transparent;color:inherit{full}"
    markup = (
        f'<table style="{style}">{top}<thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(f'<tr>{line}</tr>' for line in lines)}</tbody></table>"
    )
    return Html(markup, plain_table(header, body, caption=caption, right=right))


def _cell(tag: str, value: object, style: str) -> str:
    content = value.markup if isinstance(value, Html) else escape(value)
    weight = "font-weight:600;" if tag == "th" else ""
    short = tag == "td" and len(content) <= _SHORT_CELL
    white = "nowrap" if short else "pre-line;overflow-wrap:anywhere" if tag == "td" else "normal"
    return f'<{tag} style="{_CELL};{weight}white-space:{white};{style}">{content}</{tag}>'


def _is_number(value: object) -> bool:
    text = value.text if isinstance(value, Html) else str(value)
    number = re.match(r"^[-+−]?\d[\d,.]*(e[-+]?\d+)?\s*[%\w/]{0,8}$", text)
    return text.strip() in ("", "-") or number is not None


def replace_output(fragment: Html) -> None:
    """Shows a fragment in place of all that this notebook cell has put out so far."""
    from IPython.display import clear_output
    from IPython.display import display as show

    clear_output(wait=True)
    show(fragment)


def plain_table(
    header: Sequence[str], rows: Sequence[Sequence[object]], *, caption: str = "", right: Sequence[bool] = ()
) -> str:
    """The same table as aligned plain text; only the first line of a cell is kept, long ones are cut."""
    cells = [[str(v) for v in header], *([_first_line(v) for v in row] for row in rows)]
    widths = [max(len(row[c]) for row in cells) for c in range(len(header))]
    sides = list(right) or [False] * len(header)

    def line(row: Sequence[str]) -> str:
        fitted = [t.rjust(w) if r else t.ljust(w) for t, w, r in zip(row, widths, sides, strict=True)]
        return "  ".join(fitted).rstrip()

    return "\n".join([*([caption] if caption else []), *(line(row) for row in cells)])


def _first_line(value: object, limit: int = 60) -> str:
    text = (value.text if isinstance(value, Html) else str(value)).strip().split("\n", 1)[0]
    return text if len(text) <= limit else text[: limit - 1] + "…"
