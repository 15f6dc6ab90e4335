"""Adapters that PEFT itself trains for a step, as others would bring them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import CartridgeConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.export.readers import BODIES, right_padded
from tests.tiny import tiny_folder

SLOTS = 5
CONFIGS: dict[str, Any] = {
    "cartridge": lambda: CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=SLOTS, num_frozen_tokens=1),
    "prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=SLOTS),
    "prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=SLOTS),
}


def trained(kind: str, config: Any, folder: Path) -> Any:
    """One step of PEFT's own training on a tiny model, saved by PEFT; returns the model in eval mode."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder(kind), dtype=torch.float32), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    ids, mask = right_padded(BODIES)
    labels = ids.masked_fill(mask == 0, -100)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    optimizer.step()
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    model.save_pretrained(str(folder))
    return model.eval()
