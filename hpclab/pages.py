"""HTML from templates: what is put into one is escaped, unless it is HTML already; and the one style of whole pages."""

from collections.abc import Iterable
from functools import cache
from typing import Any

from hpclab.language import language

PAGE = """<!doctype html>
<html lang="{{ language }}">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
img { max-width: 100%; }
table { border-collapse: collapse; }
th, td { text-align: left; padding: .25rem .75rem; border-bottom: 1px solid #ddd; }
</style>
<h1>{{ title }}</h1>
{{ body | safe }}
"""
HEADING = "<h2>{{ text }}</h2>"


def html(template: str, **values: Any) -> str:
    """Fill a Jinja template with values; each is escaped, unless it has ``__html__``, as what this returns has.

    Examples
    --------
    >>> html("<p>{{ one }}, {{ other }}</p>", one="<b>", other=html("<b>{{ x }}</b>", x=1))
    Markup('<p>&lt;b&gt;, <b>1</b></p>')
    """
    return _compiled(template).make_module(values).__html__()


class Said:
    """What a notebook shows as a paragraph of whole words: what is printed there is broken within words."""

    def _repr_html_(self) -> str:
        return html("<p>{{ text }}</p>", text=str(self))


class Prose(Said, str):
    """Text that shows itself as a paragraph."""

    def __repr__(self) -> str:
        return str(self)


class Code(str):
    """Text that a page shows in letters of one width."""

    def __html__(self) -> str:
        return html("<code>{{ text }}</code>", text=str(self))


@cache
def _compiled(template: str) -> Any:
    from jinja2 import Environment  # here, since who only prints needs none

    return Environment(autoescape=True, keep_trailing_newline=True).from_string(template)


def page(title: str, parts: Iterable[str]) -> str:
    """A page of HTML, with its one style.

    Parameters
    ----------
    title : str
    parts : iterable of str
        Each of them HTML.
    """
    return html(PAGE, language=language(), title=title, body="\n".join(parts))
