"""The HTML that all sections share: escaped text, figures, and the page around them."""

import html
from pathlib import Path
from typing import Any

from dmq_jax.reporting import charts

_STYLE = Path(__file__).parent / 'style.css'


def escape(value: Any) -> str:
    """The text of `value`, safe between tags and in quoted attributes."""
    return html.escape(str(value))


def absent(what: str, stage: str) -> str:
    """What a section shows in place of results that the stage `stage` has not made yet."""
    return f'<p class="absent">{what}: the stage <code>{stage}</code> makes them.</p>'


def figure(content: str, caption: str, css: str = '') -> str:
    """A figure with its caption, both HTML; `css` is its class."""
    return f'<figure class="{css}">{content}<figcaption>{caption}</figcaption></figure>'


def document(title: str, body: str) -> str:
    """A whole page, its style included: no other file is needed."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<title>{escape(title)}</title><style>\n{_STYLE.read_text()}{charts.STYLE}</style></head>'
        f'<body><main>{body}</main></body></html>\n'
    )
