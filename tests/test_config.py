"""Config files are strict: each fault is one line that says where it is and how to fix it."""

from pathlib import Path

import pytest
import yaml

from kvopt.config.contexts import ContextConfig
from kvopt.config.document import Config, load_config
from kvopt.errors import InputError
from kvopt.task.template import Template
from kvopt.task.template_files import configured_template, template_from_file
from tests.jobs import settings


@pytest.fixture
def load(tmp_path):
    """Load the tests' job with changed sections, or a text, with ``--set`` values."""

    def load(text=None, sets=(), **sections):
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump(settings("tiny") | sections) if text is None else text, "utf-8")
        return load_config(path, sets)[0]

    return load


def fault(load, *args, **kwargs):
    with pytest.raises(InputError) as caught:
        load(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_good_config_is_read_with_defaults(load):
    config = load()
    assert config.name == "job"
    assert [c.name for c in config.contexts] == ["kv-8", "kv-best", "soft-6"]
    assert config.contexts[0].learning_rate == 0.005
    assert config.template.scope == "leading"


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"templte": {}}, "unknown key 'templte' (did you mean 'template'?)"),
        ({"model": {"bsae": "x"}}, "unknown key 'model.bsae' (did you mean 'base'?)"),
        ({"data": {"train": "t.jsonl", "limit": {"trian": 3}}}, "'data.limit.trian' (did you mean 'train'?)"),
        ({"contexts": [{"name": "a"}, {"name": "b", "stpes": 2}]}, "'contexts.1.stpes' (did you mean 'steps'?)"),
        (
            {"template": {"messages": [{"role": "user", "contnt": "{{text}}"}]}},
            "unknown key 'template.messages.0.contnt'; and 1 more (did you mean 'content'?)",
        ),
        (
            {"mutations": {"generator": {"kind": "local", "sampels": 2}}},
            "unknown key 'mutations.generator.sampels' (did you mean 'samples'?)",
        ),
        ({"mutations": {"operators": ["lexcal"]}}, "did you mean 'lexical'?"),
        (
            {"score": {"qqqq": 1}},
            "unknown key 'score.qqqq' (known here: batch_size, resamples, select, max_kl, best, race)",
        ),
    ],
)
def test_an_unknown_key_is_named_with_what_was_meant(load, sections, line):
    assert line in fault(load, **sections)


def test_a_misspelt_key_goes_before_the_key_that_is_missing_for_it(load):
    assert "did you mean 'template'?" in fault(load, text="templat: {text: 'a {{b}}'}\ndata: {train: t.jsonl}\n")


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"data": None}, "data: is not a mapping of keys (given: None)"),
        ({"contexts": {"a": 1}}, "contexts: is not a list"),
        ({"contexts": [3]}, "contexts.0: is not a mapping of keys"),
        (
            {"contexts": [{"name": "a", "kind": "kvv"}]},
            "contexts.0.kind: Input should be 'kv' or 'soft' (given: 'kvv')",
        ),
        ({"contexts": [{"name": "a", "init": "templat"}]}, "contexts.0.init: unknown init 'templat'"),
        ({"contexts": [{"name": "a", "init": "text"}]}, "contexts.0.init: init 'text': text:… needs a file"),
        ({"contexts": [{"name": "a", "tokens": 1}]}, "frozen: 1 of 1 slots leaves nothing to train; lower frozen"),
        ({"contexts": [{"name": "a"}, {"name": "a"}]}, "two contexts are named 'a'"),
        ({"contexts": [{"name": "none"}]}, "'none' is the name of a built-in context"),
        (
            {"contexts": [{"kind": "frontier", "tokens": [4, 2]}, {"name": "kv-2"}]},
            "two contexts are named 'kv-2'",
        ),
        ({"contexts": [{"kind": "frontier"}]}, "contexts.0.tokens: is missing"),
        ({"contexts": [{"kind": "frontier", "tokens": [0]}]}, "contexts.0.tokens: a length must be at least 1"),
        ({"contexts": [{"name": "a", "kind": "kv", "optimizer": "muon"}]}, "muon is for soft prompts"),
        (
            {"model": {"dtype": "float16"}, "contexts": [{"name": "b", "steps": 0}, {"name": "a"}]},
            "context 'a' is learned through float16, where small gradients become 0",
        ),
        ({"contexts": [{"name": "m001"}]}, "'m001' is the name of a mutation"),
        ({"contexts": [{"name": "../up"}]}, "contexts.0.name: String should match pattern"),
        (
            {"contexts": [{"name": "a", "init": "context:b"}, {"name": "b"}]},
            "starts from 'b', which must come before it",
        ),
        ({"contexts": [{"name": "a", "init": "context:a"}]}, "starts from 'a', which must come before it"),
        (
            {"mutations": {"generator": {"kind": "lcal"}}},
            "mutations.generator.kind: unknown value 'lcal' (one of 'none',",
        ),
        ({"mutations": {"generator": {}}}, "mutations.generator.kind: is missing"),
        ({"template": {"text": "{{a}}", "file": "b"}}, "template: give exactly one of messages, text and file"),
        ({"template": {}}, "template: give exactly one of messages, text and file (given: none)"),
        ({"name": 5}, "name: is not text (write it in quotes) (given: 5)"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0 (given: -1)"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(load, sections, line):
    assert line in fault(load, **sections)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "is not a mapping of sections"),
        ("[1, 2]", "is not a mapping of sections"),
        ("name: a\nseed: 1\nname: b\n", "job.yaml:3: not valid YAML: 'name' is given twice"),
        ("model:\n  base: a\n  base: b\n", "job.yaml:3: not valid YAML: 'base' is given twice"),
        (
            "contexts:\n- {name: a, steps: 1,\n   steps: 2}\n",
            "job.yaml:3: not valid YAML: 'steps' is given twice",
        ),
        ("? [a]\n: 1\n", "job.yaml:1: not valid YAML: a key must be plain text"),
        ("a: [1", "job.yaml:1: not valid YAML"),
        ("a: \0", "not valid YAML: unacceptable character"),
        ("a: 2024-13-45", "not valid YAML: month must be in 1..12"),
        ("[" * 4000, "not valid YAML: nested too deeply"),
        ("a: !!python/object/apply:os.getcwd []", "not valid YAML: could not determine a constructor"),
    ],
)
def test_a_document_that_is_no_config_is_refused_with_its_line(load, text, line):
    assert line in fault(load, text=text)


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(InputError, match="is not UTF-8 text"):
        load_config(tmp_path / "binary.yaml")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        load_config(tmp_path)
    with pytest.raises(InputError, match=r"no such file .kvopt init"):
        load_config(tmp_path / "missing.yaml")


def test_a_byte_order_mark_is_no_fault(tmp_path):
    (tmp_path / "job.yaml").write_bytes(b"\xef\xbb\xbf" + yaml.safe_dump(settings("tiny")).encode())
    assert load_config(tmp_path / "job.yaml")[0].name == "job"


def test_set_changes_values_and_list_items_by_name_or_position(load):
    sets = ["seed=7", "contexts.kv-8.steps=9", "contexts.1.steps=10", "data.limit.train=5", "model.dtype=bfloat16"]
    config = load(sets=sets)
    assert (config.seed, config.data.limit.train, config.model.dtype) == (7, 5, "bfloat16")
    assert [c.steps for c in config.contexts] == [9, 10, 3]
    assert load(sets=["contexts=[]"]).contexts == []


def test_the_attention_of_transformers_may_be_named_as_before(load):
    assert load().model.attention == load().model.attn_implementation == "auto"
    older = load(model={"attention": "eager"}).model
    assert (older.attention, older.attn_implementation) == ("auto", "eager")
    both = load(model={"attention": "packed", "attn_implementation": "sdpa"}).model
    assert (both.attention, both.attn_implementation) == ("packed", "sdpa")
    line = fault(load, model={"attention": "sdpa", "attn_implementation": "eager"})
    assert "model: attention is auto, packed or padded, not 'sdpa'" in line


def test_set_finds_items_whose_names_hold_dots(load):
    contexts = [{"name": "kv"}, {"name": "kv.1"}, {"name": "kv.1.b"}]
    config = load(contexts=contexts, sets=["contexts.kv.1.steps=3", "contexts.kv.1.b.steps=4"])
    assert [c.steps for c in config.contexts] == [200, 3, 4]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("seed", "--set: 'seed' is not an assignment (write --set a.b=value)"),
        ("=3", "is not an assignment"),
        ("contexts.nope.steps=3", "contexts.nope.steps: no item 'nope'"),
        ("seed.x=2", "seed.x leads into a plain value"),
        ("seed=[", "--set seed:1: not valid YAML"),
        ("contexts.kv-8.stps=3", "unknown key 'contexts.0.stps' (did you mean 'steps'?)"),
    ],
)
def test_a_wrong_set_is_named(load, override, line):
    assert line in fault(load, seed=1, sets=[override])


def test_paths_are_relative_to_the_config_file(tmp_path, monkeypatch):
    folder = tmp_path / "deep"
    (folder / "models" / "tiny").mkdir(parents=True)
    (folder / "prompt.txt").write_text("Sort: {{text}}")
    config = settings("models/tiny") | {"template": {"file": "prompt.txt"}}
    (folder / "job.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    loaded, base_dir = load_config((folder / "job.yaml").relative_to(tmp_path))
    assert base_dir == folder
    assert loaded.model.base == str(folder / "models" / "tiny")
    assert configured_template(loaded.template, base_dir)[0].slots == ("text",)


def test_the_builtin_base_and_hub_names_stay_as_they_are(load, tmp_path):
    (tmp_path / "smollm2-135m").mkdir()
    assert load(model={"base": "smollm2-135m"}).model.base == "smollm2-135m"
    assert load(model={"base": "someone/model"}).model.base == "someone/model"


def test_the_schema_describes_every_section():
    schema = Config.model_json_schema()
    assert set(schema["properties"]) == set(Config.model_fields)
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize("line", ['name: "a\\ud800"', 'template: {text: "Say \\ud800 {{x}}"}', '"\\udc00": 1'])
def test_half_of_a_surrogate_pair_is_one_line(tmp_path: Path, line: str) -> None:
    """YAML and JSON can write it, and no tokenizer takes it."""
    (tmp_path / "c.yaml").write_text(line + "\n", "utf-8")
    with pytest.raises(InputError, match=r"c\.yaml:1: not valid YAML: half of a surrogate pair is not a character"):
        load_config(tmp_path / "c.yaml")


def test_half_of_a_surrogate_pair_in_a_template_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('{"text": "Say \\ud800 {{x}}"}', "utf-8")
    with pytest.raises(InputError, match=r"t\.json: holds half of a surrogate pair"):
        template_from_file(tmp_path / "t.json", Template.from_text("Say {{x}}"))


def test_the_start_of_a_context_is_by_default_the_nearest_of_its_kind() -> None:
    defaults = {"kv": "matched", "soft": "salient"}
    for kind, start in defaults.items():
        assert ContextConfig.model_validate({"name": "a", "kind": kind, "tokens": 8}).start.kind == start
        assert ContextConfig.model_validate({"name": "a", "kind": kind}).start.kind == "template"
        named = ContextConfig.model_validate({"name": "a", "kind": kind, "tokens": 8, "init": "strided"})
        assert named.start.kind == "strided"
    assert ContextConfig.model_validate({"name": "a", "tokens": 8}).start.kind == "matched"
