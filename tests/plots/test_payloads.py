"""Hostile text through everything that shows data, in a real browser: shown as text, nothing runs."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import warnings
from pathlib import Path

import nbformat
import pytest

from dpo_kit import config, dataset, notebook, plots
from dpo_kit.preferences import PairStore
from dpo_kit.tools import listing
from dpo_kit.view import tables
from dpo_kit.view.html import paragraph, table
from tests.test_notebook import Letters, store_of
from tests.test_runs import finished
from tests.view.test_tables import run, with_samples  # noqa: F401

BROWSER = next(
    (found for name in ("chromium", "google-chrome", "chromium-browser") if (found := shutil.which(name))), ""
)
RUN = "document.body.setAttribute('data-ran','1')"
PAYLOADS = [
    f"<script>{RUN}</script>",
    f"<SCRIPT>{RUN}</SCRIPT>",
    f"<scr<script>ipt>{RUN}</scr</script>ipt>",
    f'<img src=x onerror="{RUN}">',
    f"<img src=x onerror={RUN}>",
    f'<img/src="x"/onerror="{RUN}"/>',
    f'<svg onload="{RUN}"></svg>',
    f"<svg><script>{RUN}</script></svg>",
    f"<svg><animate onbegin={RUN} attributeName=x dur=1s>",
    f'<body onload="{RUN}">',
    f'<iframe srcdoc="<script>parent.{RUN}</script>"></iframe>',
    f'<iframe src="javascript:parent.{RUN}"></iframe>',
    f'<a href="javascript:{RUN}" autofocus onfocus="{RUN}">x</a>',
    f'<input autofocus onfocus="{RUN}">',
    f'<details open ontoggle="{RUN}">x</details>',
    f'<video><source onerror="{RUN}"></video>',
    f'<audio src=x onerror="{RUN}"></audio>',
    f'<object data="javascript:{RUN}"></object>',
    f'<embed src="javascript:{RUN}">',
    f'<marquee onstart="{RUN}">x</marquee>',
    f'<style>@keyframes x{{}}</style><b style="animation-name:x" onanimationstart="{RUN}">x</b>',
    f'<form><button formaction="javascript:{RUN}" autofocus onfocus="{RUN}">x</button></form>',
    f'<math><mtext><img src=x onerror="{RUN}"></mtext></math>',
    f'<noscript><p title="</noscript><img src=x onerror={RUN}>"></noscript>',
    f'<template><script>{RUN}</script></template><img src=x onerror="{RUN}">',
    f'"><script>{RUN}</script>',
    f"'><img src=x onerror={RUN}>",
    f'" onmouseover="{RUN}" autofocus onfocus="{RUN}" x="',
    f"--><script>{RUN}</script><!--",
    f"</title></textarea></style></script><script>{RUN}</script>",
    f"]]><script>{RUN}</script>",
    f"&lt;script&gt;{RUN}&lt;/script&gt;",
    f"\u202e<script>{RUN}</script>",
    f"<ſcript>{RUN}</ſcript><script>{RUN}</script>",
    f"${{{RUN}}}{{{{{RUN}}}}}$${RUN}$$",
    f"\\u003cscript\\u003e{RUN}\\u003c/script\\u003e",
]


def in_browser(folder: Path, body: str) -> str:
    """The page's DOM after its scripts have run."""
    page = folder / "page.html"
    page.write_text(f"<!doctype html><meta charset=utf-8><body>{body}</body>", encoding="utf-8")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000", "--dump-dom"]
    profile = f"--user-data-dir={folder / 'profile'}"
    done = subprocess.run(
        [BROWSER, *options, profile, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


def ran(dom: str) -> bool:
    """Whether a payload has left its mark on the page's body."""
    return re.search(r"<body[^>]*data-ran", dom) is not None


needs_browser = pytest.mark.skipif(not BROWSER, reason="no chromium")


def test_there_are_enough_payloads():
    assert len(set(PAYLOADS)) >= 30


@needs_browser
@pytest.mark.parametrize("payload", [PAYLOADS[0], PAYLOADS[3], PAYLOADS[6]])
def test_the_browser_would_run_them(tmp_path, payload):
    assert ran(in_browser(tmp_path, payload))


def markup(shown: object) -> str:
    return shown._repr_html_()


def built(folder: Path) -> PairStore:
    """Pairs from a file whose name, rows and bad rows are payloads."""
    path = folder / f"{PAYLOADS[4]}.jsonl"
    rows = [{"chosen": f"{p} yes", "rejected": f"{p} no"} for p in PAYLOADS]
    bad = [{"chosen": p, "rejected": None} for p in PAYLOADS[:5]] + [{"chosen": p} for p in PAYLOADS[5:10]]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *bad]))
    tree = {
        "actor": {"path": "tiny-random"},
        "ref": {"path": "tiny-random"},
        "train_dataset": {"path": str(path), "bad_rows": "quarantine"},
        "cluster": {"fileroot": str(folder / "runs")},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dataset.build(config.from_tree(tree))


@pytest.fixture
def pages(tmp_path, monkeypatch, run, fakes):  # noqa: F811
    """Every view of data with every payload in it, by name."""
    monkeypatch.setattr(tables, "tokenizer_of", lambda store: Letters())
    texts = [(f"Q: {payload} yes", f"Q: {payload} no {payload}") for payload in PAYLOADS]
    store = store_of(tmp_path / "store", texts, context=0)
    samples = [
        {"index": i, "prompt": p, "reference": p, "policy": p + "!", "chosen": p, "rejected": p}
        for i, p in enumerate(PAYLOADS)
    ]
    with_samples(run, samples)
    names = [payload.replace("/", "|").replace("\\", "|")[:80] for payload in PAYLOADS]
    ended = finished(fakes, names[3], "failed", message=PAYLOADS[3], samples=PAYLOADS[0])
    lines = [{"step": 1, "dpo/loss": 0.6, "dpo/chosen_reward": 0.1, "dpo/rejected_reward": 0.0}] * 2
    figures = [plots.rewards([(payload, lines)]) for payload in PAYLOADS]
    return {
        "pairs": markup(notebook.pairs(store, count=len(PAYLOADS))),
        "samples": markup(tables.samples_table(run, count=len(PAYLOADS))),
        "a run": markup(ended),
        "lists of runs": f"<pre>{html.escape(listing.list_table(fakes.fileroot))}</pre>",
        "tables": "".join(markup(table([p, "b"], [[p, 1]], caption=p)) for p in PAYLOADS),
        "a report on data": markup(notebook.data_report(built(tmp_path))),
        "paragraphs": "".join(markup(paragraph(p)) for p in PAYLOADS),
        "charts": figures[0].to_html(full_html=False, include_plotlyjs=True)
        + "".join(figure.to_html(full_html=False, include_plotlyjs=False) for figure in figures[1:]),
    }


@needs_browser
def test_nothing_runs_and_all_is_shown(tmp_path, pages):
    for name, body in pages.items():
        assert not ran(in_browser(tmp_path, body)), name
    for name in ("pairs", "samples", "tables", "paragraphs"):
        text = html.unescape(re.sub(r"<[^>]*>", "", pages[name]))
        assert text.count("setAttribute") >= len(PAYLOADS), name


@needs_browser
def test_an_exported_notebook_shows_text_and_runs_nothing(tmp_path, pages):
    """What `make demo` shares: outputs of every kind, through nbconvert."""
    from nbconvert import HTMLExporter

    html = [nbformat.v4.new_output("display_data", {"text/html": body}) for body in pages.values()]
    texts = [
        nbformat.v4.new_output("stream", name="stdout", text="\n".join(PAYLOADS)),
        nbformat.v4.new_output("display_data", {"text/plain": "\n".join(PAYLOADS)}),
        nbformat.v4.new_output("error", ename="E", evalue=PAYLOADS[0], traceback=PAYLOADS),
    ]
    cells = [nbformat.v4.new_code_cell("\n".join(PAYLOADS), outputs=[*html, *texts])]
    body, _ = HTMLExporter().from_notebook_node(nbformat.v4.new_notebook(cells=cells))
    assert not ran(in_browser(tmp_path, body))
    assert body.count("setAttribute") > 5 * len(PAYLOADS)
