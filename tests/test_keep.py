"""Inline marks protect literals and never reach a prompt."""

import pytest

from kvopt.errors import InputError
from kvopt.mutate.mutation import read_mutations
from kvopt.task.template import Template
from kvopt.task.template_files import take_marks, template_from_file
from tests.jobs import run_job, write_job


def test_marks_are_taken_out_and_their_literals_returned():
    template = Template.from_text(
        "Please answer in {{keep:one short line}}. {{keep:Stay calm}}: {{q}} {{keep:one short line}}"
    )
    plain, kept = take_marks(template)
    assert plain.text == "Please answer in one short line. Stay calm: {{q}} one short line"
    assert kept == ("one short line", "Stay calm")


def test_a_template_without_marks_is_the_same_object():
    template = Template.from_text("Say {{q}} {keep:this}")
    assert take_marks(template) == (template, ())
    assert take_marks(template)[0] is template


def test_an_empty_mark_is_refused():
    with pytest.raises(InputError, match="marks nothing"):
        take_marks(Template.from_text("Say {{keep: }} {{q}}"))


def test_text_contexts_of_files_lose_their_marks(tmp_path):
    file = tmp_path / "other.txt"
    file.write_text("Be {{keep:brief}}. {{q}}", "utf-8")
    assert template_from_file(file, Template.from_text("Say {{q}}")).text == "Be brief. {{q}}"


def test_no_mutation_of_a_run_changes_what_is_marked(tmp_path):
    message = "Answer in one short line. Do not explain the answer. Read the request twice."
    marked = message.replace("Do not explain", "{{keep:Do not explain}}")

    def mutations(system, place):
        def change(config):
            config["template"]["messages"][0]["content"] = system
            config["mutations"] |= {"count": 6, "operators": ["lexical"], "max_attempts": 200}
            config["contexts"] = []

        run_job(write_job(place, change), place / "out")
        return [m.template.messages[0].content for m in read_mutations(place / "out" / "mutations.jsonl") if m.accepted]

    free, kept = mutations(message, tmp_path / "free"), mutations(marked, tmp_path / "kept")
    assert any("Do not explain" not in text for text in free)
    assert kept
    assert all("Do not explain" in text for text in kept)
    assert all("keep:" not in text for text in kept)
