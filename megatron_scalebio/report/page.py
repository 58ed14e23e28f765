"""One self-contained HTML page from a template of this folder: style, script and content policy.

Everything on a page comes from files that a user may have been handed, so jinja2 escapes all of it,
and the page's own content policy lets no other script than page.js run and nothing load.
"""

import base64
import functools
import hashlib
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from megatron_scalebio.formatting import duration, percent, quantity


def render(template: str, **context: Any) -> str:
    """The page as text."""
    script = resources.files("megatron_scalebio.report").joinpath("page.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    style = resources.files("megatron_scalebio.report").joinpath("page.css").read_text()
    return (
        _environment()
        .get_template(template)
        .render(style=Markup(style), script=Markup(script), script_digest=digest, **context)
    )


@functools.cache
def _environment() -> jinja2.Environment:
    """It keeps the templates that it has compiled."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("megatron_scalebio", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "duration": duration, "quantity": quantity}
    return environment
