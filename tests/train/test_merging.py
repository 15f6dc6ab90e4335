"""LiNeS and soups, checked against the updates that PEFT itself applies."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

from kvopt.errors import InputError
from kvopt.train.merging import weight_files
from kvopt.train.merging.lines import depth_scale, scale_adapter, scaled
from kvopt.train.merging.lora_adapter import average, read_adapter, truncate, write_adapter
from kvopt.train.merging.soup import average_tensors, greedy_soup
from kvopt.train.merging.weight_files import StoredWeights, write_weights
from kvopt.train.student import layer_of
from tests.tiny import tiny_model

LAYERS = 3


def adapter_folder(folder, seed, rank=2, targets=("q_proj", "v_proj"), **options):
    """A LoRA adapter with random factors, as PEFT writes it."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=6, target_modules=list(targets), task_type="CAUSAL_LM", **options)
    model = get_peft_model(tiny_model("llama", 60), config)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def merged_weights(folder):
    """The base's weights with the adapter's update added by PEFT."""
    model = PeftModel.from_pretrained(tiny_model("llama", 60), str(folder))
    return dict(model.merge_and_unload().state_dict())


def written(adapter, folder):
    folder.mkdir()
    write_adapter(adapter, folder)
    return folder


def updates(folder):
    base = tiny_model("llama", 60).state_dict()
    return {name: value - base[name] for name, value in merged_weights(folder).items()}


def assert_close(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.11.self_attn.q_proj.weight", 11),
        ("base_model.model.model.layers.2.mlp.experts.7.up_proj", 2),
        ("transformer.h.0.attn.c_attn.weight", 0),
        ("model.embed_tokens.weight", None),
        ("lm_head.weight", None),
        ("model.layers2.weight", None),
    ],
)
def test_the_layer_is_the_first_number_in_a_name(name, layer):
    assert layer_of(name) == layer


def test_the_scale_rises_with_depth_and_has_a_place_for_what_is_outside_the_layers():
    scales = [depth_scale(f"model.layers.{i}.x", 5, 0.2, 0.8) for i in range(5)]
    assert scales == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert depth_scale("model.embed_tokens.weight", 5, 0.2, 0.8) == 0.2
    assert depth_scale("lm_head.weight", 5, 0.2, 0.8) == depth_scale("model.norm.weight", 5, 0.2, 0.8) == 1.0


def test_a_layer_that_the_model_does_not_have_is_refused():
    with pytest.raises(ValueError, match=r"layer 5 of a model with 5"):
        depth_scale("model.layers.5.x", 5, 0.2, 0.8)


@pytest.mark.parametrize("rslora", [False, True])
def test_lines_scales_the_update_that_peft_applies(tmp_path, rslora):
    folder = adapter_folder(tmp_path / "a", 1, use_rslora=rslora)
    scaled = written(scale_adapter(read_adapter(folder), LAYERS, 0.3, 0.5), tmp_path / "b")
    expected = {
        name: value * depth_scale(name, LAYERS, 0.3, 0.5) if bool(value.any()) else value
        for name, value in updates(folder).items()
    }
    assert_close(updates(scaled), expected)


def test_lines_on_full_weights_moves_between_base_and_student():
    base = {"embed": torch.zeros(2), "layers.0.w": torch.zeros(2), "layers.2.w": torch.ones(2)}
    student = {name: value + 4 for name, value in base.items()}
    moved = [scaled(name, student[name], base[name], LAYERS, 0.25, 0.5) for name in base]
    assert [tensor.tolist() for tensor in moved] == [[1, 1], [1, 1], [4, 4]]
    assert all(torch.equal(scaled(name, student[name], base[name], LAYERS, 1.0, 0.0), student[name]) for name in base)


def test_a_soup_of_adapters_is_the_mean_of_their_products_and_not_of_their_factors(tmp_path):
    folders = [adapter_folder(tmp_path / str(i), i, rank, use_rslora=i == 1) for i, rank in enumerate((2, 3, 2))]
    soup = average([read_adapter(folder) for folder in folders], [1 / 3] * 3)
    assert soup.config["r"] == 7
    single = [updates(folder) for folder in folders]
    expected = {name: sum(update[name] for update in single) / 3 for name in single[0]}
    assert_close(updates(written(soup, tmp_path / "soup")), expected)


def test_a_soup_counts_a_module_that_only_some_students_have_as_zero_in_the_others(tmp_path):
    folders = [adapter_folder(tmp_path / "a", 0), adapter_folder(tmp_path / "b", 1, 3, ("v_proj", "o_proj"))]
    soup = average([read_adapter(folder) for folder in folders], [0.25, 0.75])
    a, b = (updates(folder) for folder in folders)
    assert_close(updates(written(soup, tmp_path / "soup")), {name: 0.25 * a[name] + 0.75 * b[name] for name in a})


def test_truncation_is_the_best_of_its_rank_and_says_what_it_loses(tmp_path):
    soup = average([read_adapter(adapter_folder(tmp_path / str(i), i, 3)) for i in range(2)], [0.5, 0.5])
    small, lost = truncate(soup, 2)
    tails = whole = difference = 0.0
    for name, factors in soup.modules.items():
        sizes = torch.linalg.svdvals(factors.product())
        tails, whole = tails + float(sizes[2:].square().sum()), whole + float(sizes.square().sum())
        difference += float((factors.product() - small.modules[name].product()).square().sum())
    assert lost == pytest.approx((tails / whole) ** 0.5)
    assert difference == pytest.approx(tails, rel=1e-5)
    assert small.config["r"] == 2
    assert 0.1 < lost < 1


def test_truncation_to_the_rank_that_is_there_loses_nothing(tmp_path):
    adapter = read_adapter(adapter_folder(tmp_path / "a", 1, 3))
    same, lost = truncate(adapter, 5)
    assert lost < 1e-7
    for name, factors in adapter.modules.items():
        torch.testing.assert_close(same.modules[name].product(), factors.product(), atol=1e-7, rtol=1e-6)


def test_a_mean_is_computed_in_float64_and_kept_in_the_first_ones_dtype():
    halves = [torch.tensor([1.0, 2.0]).bfloat16(), torch.tensor([5.0, 0.0]), torch.tensor([0.0, 4.0])]
    assert average_tensors(halves).tolist() == [2.0, 2.0]
    assert average_tensors(halves).dtype == torch.bfloat16
    large = [torch.tensor([1e8]), torch.tensor([1.0]), torch.tensor([-1e8])]
    assert average_tensors(large).item() == pytest.approx(1 / 3)
    assert average_tensors([torch.tensor(3), torch.tensor(4)]) == 3


def model_folder(place, tensors, **more):
    place.mkdir()
    save_file(tensors, place / "model.safetensors")
    for name, text in {"config.json": "{}", **more}.items():
        (place / name).write_text(text)
    return place


def test_full_weights_are_written_in_files_of_a_size_with_their_index(tmp_path, monkeypatch):
    monkeypatch.setattr(weight_files, "SHARD_BYTES", 40)
    tensors = {"a": torch.arange(8.0), "b": torch.ones(4).bfloat16(), "c": torch.arange(3), "d": torch.zeros(2)}
    stored = StoredWeights.of(model_folder(tmp_path / "old", tensors, **{"kvopt.txt": "kept"}))
    assert {name: stored.size(name) for name in stored} == {"a": 32, "b": 8, "c": 24, "d": 8}
    place = tmp_path / "new"
    place.mkdir()
    write_weights(stored, lambda name: stored[name] * 2, place)
    assert sorted(path.name for path in place.iterdir()) == [
        "config.json", "kvopt.txt", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]  # fmt: skip
    index = json.loads((place / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 72
    assert [index["weight_map"][name][6:11] for name in "abcd"] == ["00001", "00001", "00002", "00002"]
    again = StoredWeights.of(place)
    assert all(
        torch.equal(again[name], tensors[name] * 2) and again[name].dtype == tensors[name].dtype for name in again
    )


def test_a_base_whose_files_name_their_weights_otherwise_is_found_or_refused(tmp_path):
    student = StoredWeights.of(model_folder(tmp_path / "s", {"model.layers.0.w": torch.ones(2), "norm": torch.ones(1)}))
    bare = {"layers.0.w": torch.zeros(2), "norm": torch.zeros(3)}
    assert student.like("model.layers.0.w", bare).tolist() == [0, 0]
    with pytest.raises(InputError, match="norm has no counterpart in the base's files"):
        student.like("norm", bare)


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_weights_that_cannot_be_read_are_one_line(tmp_path, damage):
    folder = model_folder(tmp_path / "s", {"w": torch.ones(2)})
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-3]) if damage == "cut" else file.unlink()
    with pytest.raises(InputError, match="damaged or truncated" if damage == "cut" else "has no safetensors files"):
        StoredWeights.of(folder)


def test_no_weights_that_are_not_finite_are_written(tmp_path):
    stored = StoredWeights.of(model_folder(tmp_path / "s", {"w": torch.ones(2)}))
    (tmp_path / "new").mkdir()
    with pytest.raises(InputError, match="w has values that are not finite"):
        write_weights(stored, lambda name: stored[name] / 0, tmp_path / "new")


@pytest.mark.parametrize("higher", [False, True])
def test_the_greedy_soup_starts_from_the_best_and_keeps_what_does_not_make_it_worse(higher):
    losses = {(0,): 3.0, (1,): 1.0, (2,): 2.0, (3,): 2.5, (1, 2): 1.0, (1, 2, 3): 1.5, (1, 2, 0): 0.5}
    sign = -1 if higher else 1
    found = greedy_soup(4, lambda members: sign * losses[tuple(members)], higher_is_better=higher)
    assert found.members == (1, 2, 0)
    assert found.value == sign * 0.5
    assert [tuple(t["members"]) for t in found.tried] == [(0,), (1,), (2,), (3,), (1, 2), (1, 2, 3), (1, 2, 0)]


def test_an_adapter_with_more_than_products_is_refused(tmp_path):
    folder = adapter_folder(tmp_path / "a", 0, use_dora=True)
    with pytest.raises(InputError, match=r"lora_magnitude_vector.*without DoRA"):
        read_adapter(folder)


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"has no adapter_config\.json"):
        read_adapter(tmp_path)


def test_values_that_are_not_finite_are_not_written(tmp_path):
    adapter = deepcopy(read_adapter(adapter_folder(tmp_path / "a", 0)))
    next(iter(adapter.modules.values())).up[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        write_adapter(adapter, tmp_path)
