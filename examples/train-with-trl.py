"""A stock TRL trainer under the wordings that a run found: python examples/train-with-trl.py RUN MODEL [STEPS]

The lines that kvopt adds to an ordinary script are those with ``data``, ``held_out`` and ``probes``.
"""

import sys

import torch
from trl import SFTConfig, SFTTrainer

from kvopt.train import ContextClock, ContextDataset, ForgettingProbe, WordingProbe

run, model, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 100
unrelated = [{"prompt": "Name a colour.", "output": "Blue."}, {"prompt": "What is 2 + 3?", "output": "5"}]

data = ContextDataset.of_run(run, ["original", "best-mutations:2"])
held_out = ContextDataset.of_run(run, ["original", "random-mutations:3"], split="validation")
probes = ContextDataset(unrelated, "{{prompt}}\n", data.tokenizer)

settings = SFTConfig(
    "exports/student",
    max_steps=steps,
    learning_rate=1e-4,
    logging_steps=5,
    bf16=torch.cuda.is_available(),
    save_strategy="no",
    report_to=[],
    dataset_kwargs={"skip_prepare_dataset": True},
    remove_unused_columns=False,
)
trainer = SFTTrainer(
    model=model,
    args=settings,
    train_dataset=data.for_trl(),
    processing_class=data.tokenizer,
    callbacks=[ContextClock(data), WordingProbe(held_out, every=20), ForgettingProbe(probes, every=20)],
)
trainer.train()
trainer.save_model()
for entry in trainer.state.log_history:
    if "wording_nll" in entry or "forgetting_kl" in entry:
        print(entry)
