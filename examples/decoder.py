"""A language model with a third less in its blocks, healed on plain text, that goes on with a prompt as before.

    python examples/decoder.py MODEL TEXT_FILE [MINUTES] [TOKENS]

MODEL is a directory, or a name on the Hub, of a causal language model such as SmolLM2-135M; windows of its text have so
many TOKENS, 256 unless told otherwise. The last tenth of the text is what both models are compared on.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import factorformer
from factorformer.hf.source import find, load_tokenizer
from factorformer.layers.modes import has_bfloat16_products
from factorformer.tasks.data import batches
from factorformer.tasks.language_modelling import predict
from factorformer.tasks.targets import NextTokens
from factorformer.tasks.windows import windows

output = Path("decoder")
if output.exists():
    sys.exit(f"'{output}' exists already: move it")
source, text = find(sys.argv[1]), Path(sys.argv[2]).read_text(encoding="utf-8")
minutes, length = float(sys.argv[3]) if len(sys.argv) > 3 else 1.0, int(sys.argv[4]) if len(sys.argv) > 4 else 256
tokenizer = load_tokenizer(source)
original, model = (AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval() for _ in range(2))
cut = len(text) * 9 // 10
learned, held = (windows(tokenizer, [part], length) for part in (text[:cut], text[cut:]))
held = held.select(range(min(len(held), 16)))


def show(phase: str) -> None:
    """How well the model predicts, and how often it says what the original would."""
    found = predict(model, tokenizer, held, "causal", 4, original=original)
    print(
        phase, {name: round(found[name], 3) for name in ("original_perplexity", "perplexity", "next_token_agreement")}
    )


calibration = list(batches(tokenizer, learned.select(range(min(len(learned), 32))), 4))
plan = factorformer.plan(model, ratio=1.5, calibration=calibration, keep_statistics=True)
factorformer.compress(model, plan, calibration)
show("fitted:")

settings = factorformer.HealingSettings(
    minutes=minutes, batch_size=8, precision="bf16" if has_bfloat16_products() else "fp32"
)
factorformer.heal(model, original, learned, settings, tokenizer=tokenizer, held=held, target=NextTokens(), report=print)
show("healed:")
model.save_pretrained(output)
tokenizer.save_pretrained(output)

again = AutoModelForCausalLM.from_pretrained(output)
prompt = tokenizer(text[cut : cut + 4 * length], return_tensors="pt", add_special_tokens=False)["input_ids"][
    :, : length // 2
]
continued = again.generate(
    prompt, max_new_tokens=min(length // 2, 32), do_sample=False, pad_token_id=tokenizer.eos_token_id
)
print(tokenizer.decode(continued[0]))
