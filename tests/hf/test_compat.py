"""All that is private in transformers and torch, and that this package uses, is there: for a look at a new release."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from accelerate import Accelerator
from tests.tiny import MODELS
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import core_model_loading, masking_utils, modeling_utils
from transformers.models.falcon_mamba import modeling_falcon_mamba
from transformers.quantizers.base import HfQuantizer

import factorformer
from factorformer.errors import CheckpointError
from factorformer.hf import compat
from factorformer.kernels import _compat, sparse
from factorformer.layers import _compat as layers_compat
from factorformer.layers._compat import IGNORED

MODEL = tf.PreTrainedModel
SOURCE = Path(factorformer.__file__).parent

READ: dict[str, list[Any]] = {
    # The name, and the functions that read it.
    "_tied_weights_keys": [MODEL.get_expanded_tied_weights_keys, modeling_utils._get_tied_weight_keys],
    "_adjust_bias": [MODEL.tie_weights],
    "all_tied_weights_keys": [MODEL.tie_weights, MODEL._move_missing_keys_from_meta_to_device],
    "checkpoint_files=checkpoint_files": [MODEL.from_pretrained],
    "_keys_to_ignore_on_load_unexpected": [MODEL._adjust_missing_and_unexpected_keys],
    "_keys_to_ignore_on_load_missing": [MODEL._adjust_missing_and_unexpected_keys],
    "_keys_to_ignore_on_save": [MODEL.save_pretrained],
    "_upload_modified_files": [MODEL.save_pretrained, MODEL.push_to_hub],
    "model.mark_tied_weights_as_initialized(": [MODEL._finalize_model_loading],
    "_is_hf_initialized": [core_model_loading.set_param_for_module, MODEL._initialize_weights],
    "hf_quantizer": [MODEL.save_pretrained, MODEL.dequantize],
    "get_state_dict_and_metadata(self)": [MODEL.save_pretrained],
    "is_quantized": [MODEL.half, MODEL.float],
    "_weight_conversions": [core_model_loading.revert_weight_conversion],
    "_is_quantized": [modeling_falcon_mamba, importlib.import_module("transformers.quantizers.base")],
    "self._n_gpu": [tf.TrainingArguments],
    "is_qat_trainable": [importlib.import_module("transformers.trainer_utils")],
    "_hf_peft_config_loaded": [MODEL.save_pretrained],
    "_attn_implementation": [MODEL.set_attn_implementation],
    "allow_is_causal_skip": [masking_utils.sdpa_mask],
    "allow_is_bidirectional_skip": [masking_utils.sdpa_mask],
    "_original_forward": [Accelerator.prepare_model],
    "_load_from_checkpoint": [tf.Trainer],
    IGNORED: [DistributedDataParallel.__init__],
}

OVERRIDDEN: dict[str, type] = {
    # Methods that classes of ours override.
    "_apply": nn.Module,
    "_process_model_before_weight_loading": HfQuantizer,
    "_process_model_after_weight_loading": HfQuantizer,
    "_dequantize": HfQuantizer,
}

FOREIGN = (nn.Module(), MODEL, tf.Trainer)
"""What names that are given as strings, and methods, may belong to."""

ARGUMENTS: dict[Callable[..., Any], set[str]] = {
    nn.Module._apply: {"fn", "recurse"},
    MODEL._init_weights: {"module"},
    MODEL.get_expanded_tied_weights_keys: {"all_submodels"},
    MODEL.mark_tied_weights_as_initialized: {"loading_info"},
    MODEL.save_pretrained: {"save_directory", "is_main_process", "state_dict"},
    MODEL._upload_modified_files: {"working_dir"},
    MODEL.resize_token_embeddings: {"new_num_tokens"},
    HfQuantizer._process_model_before_weight_loading: {"model", "kwargs"},
    HfQuantizer._process_model_after_weight_loading: {"model", "kwargs"},
    HfQuantizer._dequantize: {"model", "dtype"},
}


def test_all_of_it_is_there() -> None:
    gone = [
        f"{name} in {getattr(reader, '__qualname__', reader)}"
        for name, readers in READ.items()
        for reader in readers
        if name not in inspect.getsource(reader)
    ]
    gone += [
        f"{sorted(wanted)} of {function.__qualname__}"
        for function, wanted in ARGUMENTS.items()
        if not wanted <= inspect.signature(function).parameters.keys()
    ]
    methods = ("get_input_embeddings", "get_output_embeddings", "_can_set_attn_implementation")
    gone += [name for name in methods if not hasattr(MODEL, name)]
    gone += [f"{name} of {base.__name__}" for name, base in OVERRIDDEN.items() if not hasattr(base, name)]
    assert not gone, f"transformers {tf.__version__} and torch {torch.__version__} have moved {gone}"
    assert compat.base_class(tf.BertConfig()) is tf.BertModel
    assert compat.base_class(tf.FunnelConfig()) is tf.FunnelModel
    assert compat.knows_type("bert")
    assert not compat.knows_type("nonsense")
    assert not compat.knows_type(None)
    assert _compat.unobserved()
    assert not torch.func.vmap(lambda x: x * _compat.unobserved())(torch.ones(2)).any()
    assert callable(_compat.reference(sparse.sparse_matmul))


def test_what_layers_use_of_torch_is_there() -> None:
    layer = nn.Linear(2, 3)
    weight = layer.weight.detach()
    assert layers_compat.place_of(weight[1:]) == layers_compat.place_of(layer.weight)
    assert layers_compat.place_of(weight) != layers_compat.place_of(weight.clone())
    assert layers_compat.is_grouped_product(torch.ops.aten._grouped_mm.default)
    assert not layers_compat.is_hooked(layer)
    layer.register_forward_hook(lambda *_: None)
    layer.register_forward_pre_hook(lambda *_: None)
    assert layers_compat.is_hooked(layer)
    layers_compat.drop_hooks(layer)
    assert not layers_compat.is_hooked(layer)
    twin = layers_compat.with_parameters(layer, {"weight": nn.Parameter(torch.ones(3, 2)), "bias": None})
    assert twin(torch.ones(2)).tolist() == [2, 2, 2]
    assert layer.weight.data_ptr() == weight.data_ptr()
    assert layers_compat.tree_leaves(({"a": 1}, [2])) == [1, 2]


def test_nothing_private_is_used_elsewhere() -> None:
    """Attributes with a leading underscore that the package does not define itself, and modules of that kind."""
    sources = {file: ast.parse(file.read_text(encoding="utf-8")) for file in SOURCE.rglob("*.py")}
    own = {name for tree in sources.values() for name in defined(tree)} - set(OVERRIDDEN)
    foreign = {name for thing in FOREIGN for name in dir(thing)}
    found = []
    for file, tree in sources.items():
        if file.name not in ("compat.py", "_compat.py"):
            found += [f"{file.relative_to(SOURCE)}:{line}: {name}" for line, name in private(tree, own, foreign)]
    assert not found, "\n".join(found)


def defined(tree: ast.Module) -> Iterator[str]:
    """Names of functions, classes, variables and attributes of `self` that a module defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def private(tree: ast.Module, own: set[str], foreign: set[str]) -> Iterator[tuple[int, str]]:
    """Where a module uses what others keep to themselves: as an attribute, by name, or imported."""
    overridden = {
        id(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "super()" and node.attr in OVERRIDDEN
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute) and id(node) not in overridden:
            names = [node.attr] if node.attr not in own else []
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value] if node.value in foreign else []
        elif isinstance(node, ast.ClassDef):
            methods = {method.name for method in node.body if isinstance(method, ast.FunctionDef)}
            names = sorted(methods & foreign - set(OVERRIDDEN))
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith(("factorformer", "__future__")):
            names = [*str(node.module).split("."), *(alias.name for alias in node.names)]
        yield from ((node.lineno, name) for name in names if re.match(r"_(?!_)", name))


def test_the_scan_sees_what_is_private() -> None:
    examples = (
        "import torch._dynamo",
        "from torch import _C",
        "from torch.utils._pytree import tree_map",
        "model._modules",
        "getattr(model, '_modules')",
        "vars(model)['_parameters'] = {}",
        "class Mine(Trainer):\n    def _get_train_sampler(self): ...",
        "super()._load_from_state_dict()",
    )
    foreign = {name for thing in FOREIGN for name in dir(thing)}
    for example in examples:
        assert list(private(ast.parse(example), {"_mine"}, foreign)), example
    harmless = "from factorformer.layers import _compat\nself._mine = 3\nsuper()._apply(fn)\nx.__dict__\n'_mine'"
    assert not list(private(ast.parse(harmless), {"_mine"}, foreign))


def test_peft_has_what_adapters_need() -> None:
    pytest.importorskip("peft")
    from peft.tuners import tuners_utils
    from peft.tuners.lora import layer, model

    assert {"target", "adapter_name", "config"} <= inspect.signature(layer.dispatch_default).parameters.keys()
    assert "dispatch_default" in inspect.getsource(model.LoraModel)
    assert "_maybe_include_all_linear_layers(" in inspect.getsource(tuners_utils.BaseTuner)
    assert hasattr(layer.LoraLayer, "_get_in_out_features")
    update = inspect.signature(layer.Linear.update_layer).parameters.keys()
    assert {"adapter_name", "r", "lora_alpha", "config"} <= update


def test_no_check_fails_open() -> None:
    assert compat.checkpoint_files({"checkpoint_files": None}) is None
    with pytest.raises(CheckpointError, match="which files"):
        compat.checkpoint_files({"files": ["model.safetensors"]})


def test_a_configuration_of_its_own() -> None:
    model = MODELS["whisper"].build()
    before = model.config
    compat.own_config(model)
    held = [value for module in model.modules() for value in vars(module).values()]
    configs = {id(value) for value in held if isinstance(value, tf.PreTrainedConfig)}
    assert configs == {id(model.config)}
    assert model.config is not before
    assert model.config.to_dict() == before.to_dict()
