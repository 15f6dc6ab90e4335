"""``--to text``: the prompt template of a text context, for people and for any other tool; and a soft prompt whose
slots are the embeddings of real tokens, as the text that these tokens spell.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from kvopt.documents.export_record import ExportFacts
from kvopt.errors import InputError, counted
from kvopt.export.export_format import ExportFormat, Written, base_lines, ids_lines

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from kvopt.export.source import Source

SNIPPET = """\
import json
from pathlib import Path

from kvopt.task.template import Template

template = Template.from_json(json.loads(Path("template.json").read_text("utf-8")))
prompt = template.fill({values})  # {gives}
print(prompt)
"""

TOKENS_SNIPPET = """\
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

{base}
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base).eval()
{ids}
prompt = json.loads(Path("ids.json").read_text("utf-8")) + ids
answer = model.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)
print(tokenizer.decode(answer[0][len(prompt):], skip_special_tokens=True))
"""
OF_ITS_NORM = 0.01
"""How far a slot may be from a token's embedding: bfloat16 rounds by a third of it."""


class TextFormat(ExportFormat):
    """A prompt template, or the text of a soft prompt that is made of real tokens."""

    takes: ClassVar[tuple[str, ...]] = ("text", "soft")
    rank: ClassVar[int] = 4
    kind: Literal["text"] = "text"

    def write(self, source: Source, place: Path) -> Written:
        """``template.json`` (what ``--context text:FILE`` reads), and the text alone, messages.json or prompt.txt; of a
        soft prompt ``prompt.txt`` and ``ids.json``. Raises InputError for a soft prompt with other slots.
        """
        if source.kind == "soft":
            return _tokens(source, place)
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


def _tokens(source: Source, place: Path) -> Written:
    from kvopt.base.loading import load_tokenizer
    from kvopt.config.model import ModelConfig
    from kvopt.storage.files import write_json, write_text

    ids = token_ids(source)
    tokenizer, _ = load_tokenizer(ModelConfig(base=source.base_name))
    text = tokenizer.decode(ids)
    again = list(tokenizer.encode(text, add_special_tokens=False))
    write_text(place / "prompt.txt", text)
    write_json(place / "ids.json", ids)
    notes = ["The text stands for everything before the first slot, chat marks included."]
    if again != ids:
        notes.append(
            f"The text tokenizes into {len(again)} other ids, so its KL is another: feed `ids.json`, or score the text"
            " with `kvopt score CONFIG --context text:FILE`."
        )
    return Written(
        summary=f"The {counted(len(ids), 'token')} that a soft prompt's slots are, and the text that they spell.",
        snippet=TOKENS_SNIPPET.format(base=base_lines(source.base_name), ids=ids_lines(source)),
        library="transformers",
        notes=tuple(notes),
    )


def token_ids(source: Source) -> list[int]:
    """The token of each slot of a soft prompt.

    Raises:
        InputError: a slot is not a token's embedding, to 1 % of its norm.
    """
    import torch

    slots: Tensor = source.tensor
    base = source.base
    table = base.embed(torch.arange(base.model.get_input_embeddings().weight.shape[0])).float()
    distances, ids = torch.cdist(slots, table, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
    moved = int((distances > OF_ITS_NORM * slots.norm(dim=1)).sum())
    if moved:
        raise InputError(
            f"{moved} of {counted(len(slots), 'slot')} are not the embedding of a token: they were trained",
            where=source.name,
            fix="use --to prompt-embeds, peft or vllm; init: salient or extract:N with steps: 0 stays text",
        )
    return [int(token) for token in ids]
