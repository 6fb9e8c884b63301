"""Train a Shapeshifter from scratch: any configuration, a tenth of its bytes, the plain `Trainer`.

    python examples/train_from_scratch.py [TEXT_FILE]

Bytes are the tokens, so nothing is downloaded; without a file the text is Python's own manual. About a minute on two
cores.
"""

import sys
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

import factorformer

text = Path(sys.argv[1]).read_bytes() if len(sys.argv) > 1 else "\n".join(topics.values()).encode()
blocks = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().split(128)[:-1]
data = [{"input_ids": block, "labels": block} for block in blocks]

sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=256, **sizes))
plan = factorformer.plan(model, method="shapeshifter", ratio=10)
print(plan)  # every matrix: what it becomes, what it costs
factorformer.initialize(model, plan)  # factors take the place of the matrices; from here on it is any other model

options = {"max_steps": 200, "per_device_train_batch_size": 16, "learning_rate": 3e-3, "logging_steps": 50}
Trainer(model, TrainingArguments("bytes", save_strategy="no", **options), train_dataset=data).train()
model.save_pretrained("bytes")

again = AutoModelForCausalLM.from_pretrained("bytes")
prompt = torch.tensor([list(b"The statement ")])
print(
    bytes(again.generate(prompt, max_new_tokens=100, do_sample=False, pad_token_id=0)[0].tolist()).decode(
        errors="replace"
    )
)
