"""What of transformers is used under a private name."""

import datetime


def fix_date(chat_template: str, date: datetime.date) -> None:
    """Makes a chat template that writes today's date write this one, in this process."""
    from transformers.utils import chat_template_utils

    # Compiled once and kept; keyword arguments of `apply_chat_template` can't be functions.
    compiled = chat_template_utils._compile_jinja_template(chat_template)
    compiled.globals["strftime_now"] = date.strftime
