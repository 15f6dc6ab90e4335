"""A chat template in which a request names its context: ``"chat_template_kwargs": {"kvopt": "kv-64"}``.

The template writes the context's placeholders as text that is tokenized into their ids, then the user's message, which
goes on where the context ends, then what the base's own template has between a message and its answer. Requests that
name no context are rendered by the base's own template.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from .stored_context import StoredContext

TEMPLATE = """\
{{%- set kvopt_contexts = {contexts} -%}}
{{%- if kvopt is defined and kvopt is not none -%}}
{{%- if kvopt not in kvopt_contexts -%}}
{{{{- raise_exception("no context " ~ kvopt ~ " here: this server has " ~ (kvopt_contexts | join(", "))) -}}}}
{{%- endif -%}}
{{%- if messages | length != 1 or messages[0]["role"] != "user" -%}}
{{{{- raise_exception("with a context, messages is one user message, which goes on where the context ends") -}}}}
{{%- endif -%}}
{{%- set kvopt_body = messages[0]["content"] -%}}
{{%- if kvopt_body is not string -%}}
{{%- set kvopt_body = kvopt_body | map(attribute="text") | join -%}}
{{%- endif -%}}
{{{{- kvopt_contexts[kvopt][0] ~ kvopt_body ~ kvopt_contexts[kvopt][1] -}}}}
{{%- else %}}{{{{ "" }}}}{original}{{% endif %}}"""

NONE = '{{ raise_exception("the model has no chat template: name a context with chat_template_kwargs") }}'


def chat_template(contexts: Sequence[StoredContext], original: str | None) -> str:
    """A chat template for the contexts of one server.

    Args:
        contexts: all of one base.
        original: the base's own template; None where it has none.

    Raises:
        ValueError: a context that cannot be asked for in text; it says why.
    """
    texts = {}
    for context in contexts:
        if context.placeholder_text is None or context.chat is None:
            raise ValueError(f"{context.name} cannot be named in a chat: {context.no_chat or 'export it anew'}")
        texts[context.name] = [context.placeholder_text + context.chat["before"], context.chat["after"]]
    other = NONE if original is None else original.removesuffix("\n")
    return TEMPLATE.format(contexts=json.dumps(texts, ensure_ascii=False), original=other)
