"""A hook of mkdocs: formulas of the pages become MathML, which browsers draw without a script of another host."""

import html
import re

from latex2mathml.converter import convert

FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">(?:\\\((?P<inline>.*?)\\\)|\\\[(?P<block>.*?)\\\])</(?P=tag)>', re.DOTALL
)


def on_page_content(text: str, **_: object) -> str:
    """The page's HTML with its formulas converted."""
    return FORMULA.sub(_converted, text)


def _converted(match: re.Match[str]) -> str:
    inline = match["inline"] is not None
    formula = html.unescape(match["inline"] if inline else match["block"])
    return convert(formula.strip(), display="inline" if inline else "block")
