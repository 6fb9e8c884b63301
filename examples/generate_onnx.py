"""A causal language model in ONNX Runtime: greedy, with what was read kept, without torch and without this package.

factorformer export small-chat/                                       # small-chat-onnx/
python examples/generate_onnx.py small-chat-onnx/ "Once upon a time" 64
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import tokenizers


def generate(folder: Path, text: str, count: int) -> list[int]:
    """At most so many tokens that go on with a text."""
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    settings = json.loads((folder / "generation_config.json").read_text())
    ends = np.ravel(settings.get("eos_token_id") or -1)
    sizes = {given.name: given.shape for given in session.get_inputs()}
    past = {n: np.zeros((1, s[1], 0, s[3]), np.float32) for n, s in sizes.items() if n.startswith("past_key_values")}
    new = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    total, found = 0, []
    for _ in range(count):
        before, total = total, total + len(new)
        feed = {"input_ids": new, "attention_mask": np.ones(total), "position_ids": np.arange(before, total)}
        feed = {name: np.array([values], np.int64) for name, values in feed.items() if name in sizes}
        logits, *kept = session.run(None, feed | past)
        past = dict(zip(past, kept, strict=True))  # in the same order
        new = [int(logits[0, -1].argmax())]
        if new[0] in ends:
            break
        found += new
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    written = generate(folder, sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 64)
    print(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).decode(written))
