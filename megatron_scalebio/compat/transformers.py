"""What of transformers is used under a private name."""

import datetime
from functools import lru_cache


def fix_date(chat_template: str, date: datetime.date) -> None:
    """Makes a chat template that writes today's date write this one, in this process."""
    from transformers.utils import chat_template_utils

    # Compiled once and kept; keyword arguments of `apply_chat_template` can't be functions.
    compiled = chat_template_utils._compile_jinja_template(chat_template)
    compiled.globals["strftime_now"] = date.strftime


@lru_cache
def names_read(chat_template: str) -> frozenset[str]:
    """The names that a chat template reads, such as `messages` and `enable_thinking`."""
    from jinja2 import meta
    from transformers.utils import chat_template_utils

    compiled = chat_template_utils._compile_jinja_template(chat_template)
    return frozenset(meta.find_undeclared_variables(compiled.environment.parse(chat_template)))
