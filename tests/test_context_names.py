"""The one grammar of context names, and looking contexts up by it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvopt.config.document import load_config
from kvopt.config.names import ORDERS, ContextName, unknown_context
from kvopt.contexts import KVContext, TextContext
from kvopt.errors import InputError
from kvopt.run.run import Run
from tests.jobs import run_job, write_job


@pytest.mark.parametrize(
    ("spec", "form", "argument"),
    [
        ("original", "original", ""),
        ("none", "none", ""),
        ("text:a/b c.txt", "text", "a/b c.txt"),
        ("text:C:/x.txt", "text", "C:/x.txt"),
        ("mutations:m.jsonl", "mutations", "m.jsonl"),
        ("mutation:m001", "mutation", "m001"),
        ("m031", "mutation", "m031"),
        ("context:kv", "context", "kv"),
        ("runs/a#kv-64", "of-run", "kv-64"),
        ("runs/a#b#m001", "of-run", "m001"),
        ("kv-64", "plain", "kv-64"),
        ("m1", "plain", "m1"),
        ("folder/of/theirs", "plain", "folder/of/theirs"),
        ("#kv", "plain", "#kv"),
        ("original-2", "plain", "original-2"),
    ],
)
def test_every_form_is_taken_apart(spec: str, form: str, argument: str) -> None:
    name = ContextName.parse(spec, "here")
    assert (name.form, name.argument, name.spec) == (form, argument, spec)


@pytest.mark.parametrize("order", ORDERS)
def test_counted_names_hold_order_and_number(order: str) -> None:
    name = ContextName.parse(f"{order}-mutations:12", "here")
    assert (name.form, name.order, name.count) == ("counted", order, 12)


def test_the_run_of_a_name_is_all_before_the_last_mark() -> None:
    assert ContextName.parse("runs/a#b#m001", "here").run == "runs/a#b"


@pytest.mark.parametrize("spec", ["text:", "mutations:", "mutation:", "context:"])
def test_a_name_that_names_nothing_is_refused(spec: str) -> None:
    with pytest.raises(InputError, match=r"here: .* names nothing"):
        ContextName.parse(spec, "here")


def test_the_error_for_an_unknown_context_lists_names_once_and_forms() -> None:
    line = str(unknown_context("kw", "here", ["original", "kv", "kv"], ("text", "plain")))
    assert line == "here: no context 'kw' (known: original, kv; or text:FILE, a context folder)"


def test_contexts_of_another_run_are_found_by_its_folder(tmp_path: Path) -> None:
    job = write_job(tmp_path / "job")
    run_job(job, tmp_path / "first")
    config, base_dir = load_config(job)
    with Run(config, base_dir, tmp_path / "second", say=lambda line: None, bars=False).opened() as run:
        (learned,) = run.stored_contexts(f"{tmp_path / 'first'}#kv-8")
        (mutation,) = run.stored_contexts(f"{tmp_path / 'first'}#m001")
        assert isinstance(learned, KVContext)
        assert isinstance(mutation, TextContext)
        assert run.score(mutation).kl_forward.mean > 0
        with pytest.raises(InputError, match="has no context 'm999'"):
            run.stored_contexts(f"{tmp_path / 'first'}#m999")
        with pytest.raises(InputError, match=r"is not learned yet .*kvopt optimize"):
            run.stored_contexts("kv-8")
        with pytest.raises(InputError, match=r"--context: no context 'best-mutations:2'"):
            run.stored_contexts("best-mutations:2")
