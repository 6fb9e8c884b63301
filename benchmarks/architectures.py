"""Which model classes of transformers can be compressed, saved, loaded, and compute the same: tried, not listed.

    python benchmarks/architectures.py

Every model class gets a tiny configuration, as far as shrinking the default one by the names of its settings gives one,
random weights and a random batch. It is planned by `svd`, compressed, saved, loaded by `from_pretrained`, and has to
give the same outputs bit for bit; then, with the whole model in int8, nearly those of its own factors in floats. Each
class runs in a process of its own. Finished classes are skipped when the script is started again; `--render` writes
the table of docs/architectures.md from the results.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import json
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from common import HERE, RESULTS, commit, machine
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

import factorformer
from factorformer.errors import BudgetError, FactorformerError
from factorformer.layers.dummies import Inputs, dummy_inputs
from factorformer.layers.nn import FactorizedMatrix

FILE = RESULTS / "architectures.json"
PAGE = HERE.parent / "docs" / "architectures.md"
BEGIN, END = "<!-- begin of the table -->", "<!-- end of the table -->"
LARGEST = 30_000_000
"""Parameters of a model that still counts as tiny."""
SECONDS = 90
"""Processor time that a class may take."""
ROUNDING = 0.2
"""Relative deviation that int8 may cause in the outputs of a tiny random model."""
PRODUCT = 0.05
"""The same of a single product, of an input that does not deviate."""

SIZES: dict[str, Any] = {
    "hidden_size d_model n_embd dim emb_dim embed_dim encoder_hidden_size decoder_hidden_size n_embed": 64,
    "word_embed_proj_dim embedding_size projection_dim hidden_dim d_embed text_embed_dim proj_dim": 64,
    "intermediate_size ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim n_inner d_inner mlp_dim hidden_mult": 128,
    "moe_intermediate_size shared_expert_intermediate_size encoder_intermediate_size d_hidden": 64,
    "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_encoder_layers depth": 2,
    "num_decoder_layers layers num_blocks encoder_num_hidden_layers num_hidden_groups_": 2,
    "num_attention_heads num_heads n_head n_heads encoder_attention_heads decoder_attention_heads heads": 4,
    "encoder_num_attention_heads decoder_num_attention_heads num_encoder_attention_heads": 4,
    "num_key_value_heads num_kv_heads n_kv_heads": 4,
    "head_dim kv_channels attention_head_size d_kv d_head": 16,
    "vocab_size text_vocab_size": 150,
    "max_position_embeddings n_positions max_seq_len max_sequence_length max_target_positions": 64,
    "image_size input_size": 32,
    "patch_size": 8,
    "num_experts num_local_experts n_routed_experts moe_num_experts": 4,
    "num_experts_per_tok moe_top_k top_k experts_per_token": 2,
    "kv_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim": 16,
    "state_size mamba_d_state ssm_state_size": 8,
    "num_queries num_query_tokens": 8,
}
SMALL = {name: size for names, size in SIZES.items() for name in names.split()}


def tiny(kind: type[PreTrainedConfig], without: str = "") -> PreTrainedConfig:
    """The default configuration of a class with the sizes that it has made small, but for one kind of them."""
    default = kind()
    settings: dict[str, Any] = {}
    for name, value in vars(default).items():
        if name in SMALL and name not in without.split() and isinstance(value, int) and not isinstance(value, bool):
            settings[name] = min(value, SMALL[name]) if value > 0 else value
        elif name.endswith("token_id") and isinstance(value, int) and value >= 100:
            settings[name] = 99 - len(settings) % 50
        elif name == "layer_types" and isinstance(value, list):
            settings[name] = None
    for name, inner in getattr(kind, "sub_configs", {}).items():
        known = getattr(default, name, None)
        known = type(known) if isinstance(known, PreTrainedConfig) else inner
        if isinstance(known, type) and issubclass(known, PreTrainedConfig) and known is not transformers.AutoConfig:
            settings[name] = tiny(known, without)
    return kind(**settings)


def build(kind: type[PreTrainedModel]) -> tuple[PreTrainedModel, Inputs]:
    """A tiny model of a class, and a batch that it takes."""
    first: Exception | None = None
    for without in ("", *SIZES):
        try:
            config = tiny(kind.config_class, without)
            with torch.device("meta"):
                if sum(p.numel() for p in kind(config).parameters()) > LARGEST:
                    raise ValueError("too large even so")
            torch.manual_seed(0)
            model = kind(config).eval()
            return model, fed(model)
        except Exception as error:
            first = first or error
    assert first is not None
    raise first


@torch.no_grad()
def outputs(model: PreTrainedModel, inputs: Inputs) -> list[Tensor]:
    """All floating-point tensors that a model returns."""
    torch.manual_seed(0)
    found: list[Tensor] = []

    def add(value: Any) -> None:
        if isinstance(value, Tensor) and value.is_floating_point():
            found.append(value.clone())
        elif isinstance(value, dict):
            for each in value.values():
                add(each)
        elif isinstance(value, (list, tuple)):
            for each in value:
                add(each)

    add(model(**{key: value.clone() for key, value in inputs.items()}))
    return found


def fed(model: PreTrainedModel) -> Inputs:
    """A batch that the model takes."""
    for inputs in dummy_inputs(model):
        with contextlib.suppress(Exception):
            if outputs(model, inputs):
                return inputs
    raise ValueError("no batch is taken")


def compressed(model: PreTrainedModel, scope: str, ratios: tuple[float, ...], int8: bool) -> float:
    """Compress at the largest of the ratios that can be met."""
    for ratio in ratios:
        try:
            plan = factorformer.plan(model, "svd", ratio, scope, int8=int8)  # type: ignore[arg-type]
        except BudgetError as error:
            if ratio == ratios[-1] or "cannot be met" not in str(error):
                raise
            continue
        factorformer.compress(model, plan)
        return ratio
    raise AssertionError


def equal(before: list[Tensor], after: list[Tensor]) -> bool:
    return len(before) == len(after) and all(
        torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(before, after, strict=True)
    )


def deviation(before: list[Tensor], after: list[Tensor]) -> float:
    parts = [
        float((a - b).double().norm() / a.double().norm().clamp_min(1e-12)) for a, b in zip(before, after, strict=True)
    ]
    return max(parts, default=0.0)


def is_changed(model: PreTrainedModel) -> bool:
    return any(isinstance(module, FactorizedMatrix) for module in model.modules())


def floats(name: str, model: PreTrainedModel, inputs: Inputs) -> tuple[str, str]:
    """What becomes of a model in float factors, and what went wrong if anything did."""
    ratios, scope = (2.0, 1.5, 1.2, 1.1, 1.05, 1.02), "blocks"
    try:
        try:
            compressed(model, scope, ratios, int8=False)
        except FactorformerError as error:
            if is_changed(model) or "no Transformer blocks" not in str(error):
                raise
            compressed(model, "all", ratios, int8=False)
    except FactorformerError as error:
        return ("half converted" if is_changed(model) else "refused"), str(error)
    except Exception as error:
        return ("half converted" if is_changed(model) else "failed"), f"{type(error).__name__}: {error}"
    try:
        before = outputs(model, inputs)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            loaded = type(model).from_pretrained(folder).eval()
        after = outputs(loaded, inputs)
    except Exception as error:
        return "wrong", f"{type(error).__name__}: {error}"
    if equal(before, after):
        return "bit for bit", ""
    # Tensors that lie elsewhere in memory are multiplied in another order: the weights themselves have to be equal.
    off, stored = deviation(before, after), loaded.state_dict()
    same = all(torch.equal(tensor, stored[key]) for key, tensor in model.state_dict().items())
    return ("equal weights" if same and off < 1e-5 else "wrong"), f"off by {off:.3g}"


def codes(model: PreTrainedModel, inputs: Inputs) -> tuple[str, str]:
    """The same for the whole model in int8."""
    try:
        compressed(model, "all", (4.0, 2.0, 1.5, 1.2, 1.05), int8=True)
    except FactorformerError as error:
        return ("half converted" if is_changed(model) else "refused"), str(error)
    except Exception as error:
        return ("half converted" if is_changed(model) else "failed"), f"{type(error).__name__}: {error}"
    try:
        found = outputs(model, inputs)
        expected = outputs(copy.deepcopy(model).dequantize(), inputs)  # pyright: ignore[reportArgumentType]
    except Exception as error:
        return "wrong", f"{type(error).__name__}: {error}"
    off = deviation(expected, found)
    if off < ROUNDING:
        return "right", f"off by {off:.3g}"
    each = largest_of_products(model, inputs)
    return ("amplified" if each < PRODUCT else "wrong"), f"off by {off:.3g}, each product by at most {each:.3g}"


def largest_of_products(model: PreTrainedModel, inputs: Inputs) -> float:
    """Largest relative deviation of a product in int8 from that of its own factors, both of the same input."""
    twins = dict(copy.deepcopy(model).dequantize().named_modules())  # pyright: ignore[reportArgumentType]
    found = [0.0]

    def compare(twin: torch.nn.Module, given: tuple[Any, ...], keywords: dict[str, Any], output: Tensor) -> None:
        found.append(deviation([twin(*given, **keywords)], [output]))

    for name, module in model.named_modules():
        if isinstance(module, FactorizedMatrix):
            module.register_forward_hook(
                lambda _, *rest, twin=twins[name]: compare(twin, *rest),
                with_kwargs=True,
            )
    outputs(model, inputs)
    return max(found)


def attempt(name: str) -> dict[str, Any]:
    """One row of the results."""
    row: dict[str, Any] = {"class": name, "commit": commit()}
    try:
        model, inputs = build(getattr(transformers, name))
    except Exception as error:
        return {**row, "floats": "not built", "why": f"{type(error).__name__}: {error}"[:300]}
    row["type"] = model.config.model_type
    twin = copy.deepcopy(model)
    row["floats"], row["why"] = floats(name, model, inputs)
    row["int8"], row["int8_why"] = codes(twin, inputs)
    return row


def in_own_process(name: str) -> dict[str, Any]:
    """`attempt` in a fork, with a limit of time."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of processor time, whatever else runs
            os.close(read)
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
            row = json.dumps(attempt(name)).encode()
            with os.fdopen(write, "wb") as pipe:
                pipe.write(row)
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        content = pipe.read()
    _, status = os.waitpid(child, 0)
    if content:
        return json.loads(content)
    return {"class": name, "floats": "not built", "why": f"the process ended ({status})"}


def classes() -> list[str]:
    """Model classes that transformers exports and that can be made from a configuration."""
    found = []
    for name in sorted(dir(transformers)):
        kind = getattr(transformers, name, None) if name[0].isupper() else None
        if isinstance(kind, type) and issubclass(kind, PreTrainedModel) and not name.endswith("PreTrainedModel"):
            found += [name] if isinstance(kind.config_class, type) else []
    return found


def render(content: dict[str, Any]) -> str:
    """The table of the page."""
    rows = content["rows"]
    built = [row for row in rows if row["floats"] != "not built"]
    machine = content["machine"]
    lines = [
        f"{len(rows)} of {content['classes']} model classes of transformers {machine['transformers']} were tried, "
        f"in alphabetical order; the script could make and feed {len(built)} of them (torch {machine['torch']}, "
        f"{machine['device']}).",
        "",
        "| outcome | float factors | the whole model in int8 |",
        "|---|---|---|",
    ]
    names = {
        "bit for bit": "compressed, saved, loaded; outputs equal bit for bit (int8: those of its factors, rounded)",
        "equal weights": "the same, outputs equal up to rounding: tensors lie elsewhere in memory",
        "refused": "refused before anything was replaced",
        "failed": "failed before anything was replaced",
        "half converted": "left half converted",
        "amplified": "each product is right, and the random model amplifies their rounding: outputs differ",
        "wrong": "does not run, or outputs differ",
    }
    for outcome, words in names.items():
        first = sum(row["floats"] == outcome for row in built)
        second = sum(row.get("int8") == ("right" if outcome == "bit for bit" else outcome) for row in built)
        lines.append(f"| {words} | {first} | {second} |")
    for outcome in ("refused", "failed", "half converted", "amplified", "wrong"):
        for column, title in (("floats", "float factors"), ("int8", "int8")):
            found = ", ".join(f"`{row['class']}`" for row in built if row.get(column) == outcome)
            lines += ["", f"{outcome.capitalize()}, {title}: {found}."] if found else []
    by_type: dict[str, list[str]] = collections.defaultdict(list)
    for row in built:
        if row["floats"] in ("bit for bit", "equal weights"):
            by_type[row["type"]].append(row["class"])
    lines += ["", "Types with classes that pass:", "", ", ".join(f"{t} ({len(c)})" for t, c in sorted(by_type.items()))]
    return "\n".join(lines)


def write_page(content: dict[str, Any]) -> None:
    """Put the table between the markers of the page."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{render(content)}\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", nargs="*", help="these alone, whether finished or not")
    parser.add_argument("--again", nargs="*", default=[], help="try those with these outcomes again, e.g. wrong")
    parser.add_argument("--render", action="store_true", help="write the table, try nothing")
    parser.add_argument("--output", type=Path, default=FILE)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    content = json.loads(arguments.output.read_text()) if arguments.output.exists() else {"rows": []}
    if not arguments.render:
        content |= {"machine": machine(), "classes": len(classes())}
        again = {row["class"] for row in content["rows"] if {row["floats"], row.get("int8")} & {*arguments.again}}
        done = {row["class"]: row for row in content["rows"]}
        for name in arguments.classes or [n for n in classes() if n not in done or n in again]:
            done[name] = in_own_process(name)
            print(json.dumps(done[name]), flush=True)
            content["rows"] = [done[key] for key in sorted(done)]
            arguments.output.write_text(json.dumps(content, indent=0) + "\n")
    write_page(content)


if __name__ == "__main__":
    main()
