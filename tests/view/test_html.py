"""HTML fragments: nothing that is data can become markup, and every fragment has a plain text twin."""

from __future__ import annotations

import html.parser

import pytest

from dpo_kit.view import html as view_html

NASTY = "<script>alert('x')</script><img src=x onerror=alert(1)> & \"quoted\" \u202eabc\x1b[31m"


class Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def tags_of(fragment: view_html.Html) -> Tags:
    parser = Tags()
    parser.feed(fragment._repr_html_())
    parser.close()
    assert parser.open == []
    return parser


@pytest.mark.parametrize(
    "fragment",
    [
        view_html.paragraph(NASTY),
        view_html.preformatted(NASTY),
        view_html.marked([(NASTY, view_html.SHARED), (NASTY, "")]),
        view_html.legend([(NASTY, view_html.CHOSEN)]),
        view_html.card(NASTY, view_html.paragraph(NASTY)),
        view_html.table([NASTY, "b"], [[NASTY, 1]], caption=NASTY),
        view_html.columns(view_html.paragraph(NASTY), view_html.stack(view_html.paragraph(NASTY))),
    ],
)
def test_data_never_becomes_markup(fragment):
    parser = tags_of(fragment)
    assert not {"script", "img"} & set(parser.tags)
    assert set(parser.attributes) <= {"class", "style"}
    assert fragment.text


def test_escape_shows_what_would_hide():
    assert view_html.escape("a\u202eb\x1b") == "a[U+202E]b[U+001B]"
    assert view_html.escape("a\tb\nc") == "a\tb\nc"
    assert view_html.escape("👩\u200d🚀 ü") == "👩\u200d🚀 ü"
    assert view_html.escape("\ud800") == "[U+D800]"


def test_rounding_noise_has_no_sign():
    assert [view_html.signed(v) for v in (-1e-14, 1e-14, -0.0004, -0.0006)] == [
        "+0.000",
        "+0.000",
        "+0.000",
        "-0.001",
    ]
    assert view_html.signed(-1.004, 2) == "-1.00"


def test_no_math_in_prices():
    assert "mathjax_ignore" in view_html.paragraph("$5 or $10")._repr_html_()
    assert "tex2jax_ignore" in view_html.paragraph("$5 or $10")._repr_html_()


def test_colours_inherit_from_the_page():
    markup = (
        view_html.table(["a"], [["b"]])._repr_html_()
        + view_html.marked([("x", view_html.SHARED)])._repr_html_()
    )
    assert "#" not in markup.replace("&#", "")
    assert "white;" not in markup
    assert "black" not in markup


def test_table_sets_numbers_right_and_has_a_text_twin():
    table = view_html.table(["what", "n", "share"], [["a b", 7, "3.0 %"], ["long name", 1200, "12.5 %"]])
    assert table._repr_html_().count("text-align:right") == 6
    assert table.text.split("\n") == [
        "what          n   share",
        "a b           7   3.0 %",
        "long name  1200  12.5 %",
    ]
    assert repr(table) == table.text


def test_table_takes_fragments_as_cells():
    table = view_html.table(["a"], [[view_html.marked([("<b>", view_html.CHOSEN)])]])
    assert "&lt;b&gt;" in table.markup
    assert "&amp;lt;" not in table.markup
