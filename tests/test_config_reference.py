"""The config reference names every key."""

from kvopt.config import Config
from kvopt.config_reference import reference


def test_every_key_of_the_config_is_named_with_its_type():
    text = reference()
    for definition in Config.model_json_schema()["$defs"].values():
        for key in definition.get("properties", {}):
            assert f"| `{key}` | " in text
    assert "| `learning_rate` | number > 0 | `0.005` | peak learning rate of AdamW |" in text
    assert "with `kind: endpoint`" in text
