"""The config reference names every key, and the one in docs/ is the present one."""

from pathlib import Path

from kvopt.config.document import Config
from kvopt.config.reference_page import reference

DOCS = Path(__file__).resolve().parents[1] / "docs" / "config.md"


def test_every_key_of_the_config_is_named_with_its_type():
    text = reference()
    for definition in Config.model_json_schema()["$defs"].values():
        for key in definition.get("properties", {}):
            assert f"| `{key}` | " in text
    assert (
        "| `learning_rate` | number > 0 | `0.005` | peak learning rate; muon's steps are as large as adamw's with it |"
        in text
    )
    assert "with `kind: endpoint`" in text


def test_every_key_has_a_meaning():
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    unexplained = [row for row in rows if row.endswith("|  |") and "| `kind` |" not in row]
    assert unexplained == []


def test_the_page_in_docs_is_the_present_one():
    assert DOCS.read_text("utf-8") == reference(), "kvopt config --reference > docs/config.md"
