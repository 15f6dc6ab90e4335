"""``--to text``: the prompt template of a text context, for people and for any other tool."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from kvopt.documents.export_record import ExportFacts
from kvopt.export.export_format import ExportFormat, Written

if TYPE_CHECKING:
    from pathlib import Path

    from kvopt.export.source import Source

SNIPPET = """\
import json
from pathlib import Path

from kvopt.task.template import Template

template = Template.from_json(json.loads(Path("template.json").read_text("utf-8")))
prompt = template.fill({values})  # {gives}
print(prompt)
"""


class TextFormat(ExportFormat):
    """A prompt template."""

    takes: ClassVar[tuple[str, ...]] = ("text",)
    rank: ClassVar[int] = 4
    kind: Literal["text"] = "text"

    def write(self, source: Source, place: Path) -> Written:
        """``template.json`` (what ``--context text:FILE`` reads), and the text alone, messages.json or prompt.txt."""
        from kvopt.storage.files import write_json, write_text

        template = source.template
        if template is None:
            raise ValueError("a text context has a template")
        write_json(place / "template.json", template.to_json())
        if template.is_chat:
            plain, gives = "messages.json", "messages for tokenizer.apply_chat_template, or for a chat endpoint"
            write_json(place / plain, template.to_json()["messages"])
        else:
            plain, gives = "prompt.txt", "the prompt's text"
            write_text(place / plain, template.text or "")
        values = dict.fromkeys(template.slots, "…")
        return Written(
            summary=f"A prompt template with the slots {', '.join('{{' + name + '}}' for name in template.slots)}.",
            snippet=SNIPPET.format(values=values, gives=gives),
            library="transformers",
            notes=(
                f"`{plain}` holds the text; a slot is `{{{{name}}}}`, and `\\{{{{name}}}}` is a literal one.",
                "`kvopt score CONFIG --context text:template.json` scores it again.",
            ),
            facts=ExportFacts(slots=list(template.slots)),
        )
