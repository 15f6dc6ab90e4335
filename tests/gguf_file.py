"""A GGUF file of a tiny model, written as converters write one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from tests.tiny import CHATML, tiny_tokenizer


def write_gguf(path: Path, model: PreTrainedModel, extra: Mapping[str, np.ndarray] = {}) -> None:
    """A Llama; ``extra`` tensors by name."""
    from gguf import GGUFWriter

    words, config = tiny_tokenizer("chatml"), model.config
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    names = [name for name, _ in sorted(words.get_vocab().items(), key=lambda pair: pair[1])]
    merges = json.loads(words.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(names)
    writer.add_token_types([3 if name.startswith("<|") else 1 for name in names])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_eos_token_id(words.eos_token_id)
    writer.add_chat_template(CHATML)
    state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}

    def interleaved(tensor: np.ndarray, heads: int) -> np.ndarray:
        return np.ascontiguousarray(tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape))

    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    parts = {"attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj"}
    parts |= {"ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    parts |= {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    for i in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{i}.", f"blk.{i}."
        query, key = (state[f"{ours}self_attn.{name}_proj.weight"] for name in "qk")
        writer.add_tensor(f"{theirs}attn_q.weight", interleaved(query, config.num_attention_heads))
        writer.add_tensor(f"{theirs}attn_k.weight", interleaved(key, config.num_key_value_heads))
        for name, part in parts.items():
            if f"{ours}{part}.weight" in state:
                writer.add_tensor(f"{theirs}{name}.weight", state[f"{ours}{part}.weight"])
    for name, tensor in extra.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
