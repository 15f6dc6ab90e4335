"""``--to mlx``: the layout of a prompt cache, tensor by tensor; what is refused; and mlx-lm itself, where it is there.

mlx-lm and torch need not be in one environment: ``KVOPT_MLX_PYTHON`` names a Python that has ``mlx[cpu]`` and
``mlx-lm`` (0.32 or later).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from kvopt.base.loading import Base
from kvopt.errors import InputError
from kvopt.export.formats.mlx import rope_settings
from kvopt.export.writing import export
from tests.export.readers import (
    BODIES,
    MLX_PYTHON,
    NEW_TOKENS,
    NO_MLX,
    Kind,
    assert_same_logits,
    module_of,
    our_logits,
    our_text,
    saved,
)
from tests.tasks import make_task
from tests.tiny import tiny_base, tiny_folder

RUN = """
import json, sys
folder, base, bodies, tokens = json.loads(sys.argv[1])
sys.path.insert(0, folder)
import mlx_generate as script
model, tokenizer = script.load_model(base)
logits = [script.logits(model, body).tolist() for body in bodies]
print(json.dumps([logits, [script.generate(model, tokenizer, body, tokens) for body in bodies]]))
"""


def opened(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(str(file), framework="pt") as stored:
        return {name: stored.get_tensor(name) for name in stored.keys()}, stored.metadata()  # noqa: SIM118


@pytest.mark.parametrize("model", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_file_is_a_prompt_cache_as_mlx_lm_lays_it_out(model: str, dtype: str, tmp_path: Path) -> None:
    base = tiny_base(model)
    context: Any = saved(make_task(base, tmp_path / "task", count=4), "kv", tmp_path / "c", 7)
    record = export(tmp_path / "c", "mlx", tmp_path / "out", options={"dtype": dtype})
    tensors, metadata = opened(tmp_path / "out/prompt_cache.safetensors")
    layers, heads, width = base.geometry.layers, base.geometry.kv_heads, base.geometry.head_dim
    assert tensors.keys() == {f"{i}.{part}" for i in range(layers) for part in range(3)}
    for i in range(layers):
        for part in (0, 1):
            stored = tensors[f"{i}.{part}"]
            assert (tuple(stored.shape), stored.dtype) == ((1, heads, 7, width), getattr(torch, dtype))
            for head in range(heads):
                assert torch.equal(stored[0, head], context.states[:, i, part, head].to(stored.dtype))
        count = tensors[f"{i}.2"]
        assert (count.dtype, count.ndim, int(count)) == (torch.int32, 0, 7)
    classes = {f"1.{i}": "KVCache" for i in range(layers)}
    scalars = {f"2.{i + 1}.0": f"{i}.2" for i in range(layers)} | {f"2.{i + 1}.1": "scalar" for i in range(layers)}
    user = {"0.model": base.name, "0.tokenizer_config": metadata["0.tokenizer_config"]}
    assert metadata == user | classes | {"2.0": ""} | scalars
    assert isinstance(json.loads(metadata["0.tokenizer_config"]), dict)
    assert (record["layers"], record["kv_heads"], record["head_dim"]) == (layers, heads, width)


def test_the_name_of_a_conversion_is_what_mlx_lm_will_ask_for(tmp_path: Path) -> None:
    saved(make_task(tiny_base("llama"), tmp_path / "task", count=4), "kv", tmp_path / "c")
    export(tmp_path / "c", "mlx", tmp_path / "out", options={"mlx_model": "someone/tiny-mlx"})
    assert opened(tmp_path / "out/prompt_cache.safetensors")[1]["0.model"] == "someone/tiny-mlx"
    card = (tmp_path / "out/README.md").read_text()
    assert "load_model('someone/tiny-mlx')" in card
    assert "wants the model to be 'someone/tiny-mlx'" in card


def test_a_base_with_sliding_windows_is_refused(tmp_path: Path) -> None:
    saved(make_task(tiny_base("gemma3"), tmp_path / "task", count=4), "kv", tmp_path / "c")
    with pytest.raises(InputError, match=r"layers of sliding_attention, for which mlx-lm keeps more .*--to hf-cache"):
        export(tmp_path / "c", "mlx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_format_or_version_is_refused_by_name(tmp_path: Path) -> None:
    saved(make_task(tiny_base("llama"), tmp_path / "task", count=4), "kv", tmp_path / "c")
    export(tmp_path / "c", "mlx", tmp_path / "out")
    script = module_of(tmp_path / "out/mlx_generate.py")
    tensors, metadata = opened(tmp_path / "out/prompt_cache.safetensors")
    script.check_format(tensors, metadata)
    older = {"0.0": "", "0.1": "", "1.model": "m", "1.tokenizer_config": "{}", "2.0": "KVCache", "2.1": "KVCache"}
    with pytest.raises(ValueError, match=r"c\.safetensors is a prompt cache of mlx-lm before 0\.32"):
        script.check_format({"0.0", "0.1", "1.0", "1.1"}, older, "c.safetensors")
    rotating = metadata | {"1.0": "RotatingKVCache"}
    for names, said in ((tensors, rotating), ({"x"}, metadata), (tensors, {})):
        with pytest.raises(ValueError, match="is no prompt cache of keys and values"):
            script.check_format(names, said)
    script.check_version("0.32.0")
    script.check_version("1.0.1")
    with pytest.raises(ImportError, match=r"mlx-lm 0\.31\.3 reads another format"):
        script.check_version("0.31.3")


@pytest.mark.skipif(MLX_PYTHON is None, reason=NO_MLX)
@pytest.mark.parametrize("model", ["llama", "qwen3"])
@pytest.mark.parametrize("kind", ["kv", "soft"])
def test_mlx_lm_gives_our_logits_and_our_greedy_text(model: str, kind: Kind, tmp_path: Path) -> None:
    base = tiny_base(model)
    context = saved(make_task(base, tmp_path / "task", count=4), kind, tmp_path / "c")
    export(tmp_path / "c", "mlx", tmp_path / "out")
    logits, answers = of_mlx(tmp_path / "out", base.name, BODIES, NEW_TOKENS)
    assert_same_logits([torch.tensor(rows) for rows in logits], our_logits(base, context, BODIES))
    assert answers == our_text(base, context, BODIES)


@pytest.mark.skipif(MLX_PYTHON is None, reason=NO_MLX)
def test_mlx_lm_is_told_the_rope_that_it_does_not_find(tmp_path: Path) -> None:
    """With llama's own default, 10000, the logits would differ."""
    base = with_theta(tmp_path / "base", 300.0)
    context = saved(make_task(base, tmp_path / "task", count=4), "kv", tmp_path / "c")
    export(tmp_path / "c", "mlx", tmp_path / "out")
    logits, answers = of_mlx(tmp_path / "out", base.name, BODIES, NEW_TOKENS)
    assert_same_logits([torch.tensor(rows) for rows in logits], our_logits(base, context, BODIES))
    assert answers == our_text(base, context, BODIES)


def test_the_rope_of_a_config_of_transformers_5_goes_with_the_cache(tmp_path: Path) -> None:
    base = with_theta(tmp_path / "base", 300.0)
    saved(make_task(base, tmp_path / "task", count=4), "kv", tmp_path / "c")
    export(tmp_path / "c", "mlx", tmp_path / "out")
    assert json.loads((tmp_path / "out/mlx.json").read_text()) == {"model_config": {"rope_theta": 300.0}}
    assert "gives mlx-lm rope_theta from `mlx.json`" in (tmp_path / "out/README.md").read_text()
    assert rope_settings({"rope_theta": 5.0, "rope_parameters": {"rope_theta": 5.0}}) == {}
    assert rope_settings({}) == {}
    scaled = {"rope_theta": 5.0, "rope_type": "linear", "factor": 2.0}
    given = rope_settings({"rope_parameters": scaled})
    assert given == {"rope_theta": 5.0, "rope_scaling": {**scaled, "type": "linear"}}


def with_theta(folder: Path, theta: float) -> Base:
    """The tiny llama with another RoPE, in its config.json as transformers 5 writes it."""
    shutil.copytree(tiny_folder("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    assert "rope_theta" not in config
    config["rope_parameters"]["rope_theta"] = theta
    (folder / "config.json").write_text(json.dumps(config))
    return Base.load(str(folder), dtype="float32", device="cpu")


def of_mlx(folder: Path, base: str, bodies: list[list[int]], tokens: int) -> Any:
    """Logits and greedy answers of mlx-lm in its own process."""
    assert MLX_PYTHON is not None
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [MLX_PYTHON, "-c", RUN, json.dumps([str(folder), base, bodies, tokens])],
        capture_output=True, text=True, timeout=600, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
