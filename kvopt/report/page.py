"""One self-contained HTML file of a report: markup, style, script, pictures and data, with nothing fetched.

Everything that comes from data, models and templates is escaped; a content security policy lets no script run but the
page's own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from kvopt.report.choice import number, shown_interval, signed
from kvopt.report.reading import RunFiles
from kvopt.report.study_words import interval_of, path_words, words_of_explained
from kvopt.report.tables import build_text, changed_words, duration, interval_text
from kvopt.report.views import Page, run_view, several_view
from kvopt.report.worddiff import diff

CONTROL = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
SURROGATE = re.compile("[\ud800-\udfff]")


def render(report: dict[str, Any], runs: Sequence[RunFiles]) -> str:
    """The page of :func:`kvopt.report.contents.document` for the runs that it was made of."""
    script, style = _source("report.js"), _source("report.css")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    view: Page = run_view(runs[0], report["runs"][0]) if len(runs) == 1 else several_view(runs, report)
    html = (
        _environment()
        .get_template("report.html.j2")
        .render(
            page=view,
            report=report,
            data=htmlsafe_json_dumps(report, dumps=_compact),
            script=Markup(script),
            style=Markup(style),
            script_sha256=digest,
        )
    )
    return SURROGATE.sub("\ufffd", html)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("kvopt.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    environment.filters |= {
        "number": number,
        "interval": interval_text,
        "build": build_text,
        "duration": duration,
        "percent": lambda value, digits=1: "–" if value is None else f"{value:.{digits}%}",
        "bytes": _bytes,
        "count": lambda value: f"{value:,}".replace(",", "\u202f"),
        "value": _value,
        "diff": diff,
        "heat": heat,
        "token": token_markup,
        "signed": signed,
        "shown": shown_interval,
        "path": path_words,
        "explained": words_of_explained,
        "interval_of": interval_of,
        "changed": changed_words,
        "plural": lambda count, word: f"{count} {word}" if count == 1 else f"{count} {word}s",
    }
    return environment


def _source(name: str) -> str:
    return (resources.files("kvopt.report") / "templates" / name).read_text("utf-8")


def _compact(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False, **options)


def _visible(value: Any) -> Any:
    """Control characters as their pictures, so that they are seen and the file stays valid."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return value.translate(CONTROL)
    return value


def heat(kl: float) -> int:
    """Depth of colour in percent: 0 up to 0.001 nats, 100 from 3 nats, logarithmic between."""
    low, high = math.log10(1e-3), math.log10(3)
    return 0 if kl <= 1e-3 else round(min((math.log10(kl) - low) / (high - low), 1.0) * 100)


def token_markup(token: str) -> Markup:
    """A token with its spaces and line breaks made visible."""
    shown = _visible(token.replace("\n", "⏎").replace("\t", "⇥"))
    lead, tail = len(shown) - len(shown.lstrip(" ")), len(shown) - len(shown.rstrip(" "))
    if lead == len(shown):
        tail = 0
    core = shown[lead : len(shown) - tail]
    space = Markup('<span class="space">{}</span>')
    return Markup("<code>{}{}{}</code>").format(space.format("·" * lead), core, space.format("·" * tail))


def _bytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _value(value: Any) -> str:
    """A config value or hash as one line."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value, ensure_ascii=False)
