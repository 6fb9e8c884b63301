"""All that is private in transformers and torch, and that this package uses, is there: for a look at a new release."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from accelerate import Accelerator
from tests.tiny import MODELS
from torch.nn.parallel import DistributedDataParallel
from transformers import core_model_loading, masking_utils, modeling_utils
from transformers.models.falcon_mamba import modeling_falcon_mamba
from transformers.quantizers.base import HfQuantizer

from factorformer.errors import CheckpointError
from factorformer.hf import compat
from factorformer.kernels import _compat, sparse
from factorformer.training import data_parallel

MODEL = tf.PreTrainedModel

READ: dict[str, list[Any]] = {
    # The name, and the functions that read it.
    "_tied_weights_keys": [MODEL.get_expanded_tied_weights_keys, modeling_utils._get_tied_weight_keys],
    "_adjust_bias": [MODEL.tie_weights],
    "all_tied_weights_keys": [MODEL.tie_weights, MODEL._move_missing_keys_from_meta_to_device],
    "checkpoint_files=checkpoint_files": [MODEL.from_pretrained],
    "_keys_to_ignore_on_load_unexpected": [MODEL._adjust_missing_and_unexpected_keys],
    "_keys_to_ignore_on_load_missing": [MODEL._adjust_missing_and_unexpected_keys],
    "_keys_to_ignore_on_save": [MODEL.save_pretrained],
    "model.mark_tied_weights_as_initialized(": [MODEL._finalize_model_loading],
    "_is_hf_initialized": [core_model_loading.set_param_for_module, MODEL._initialize_weights],
    "hf_quantizer": [MODEL.save_pretrained, MODEL.dequantize],
    "get_state_dict_and_metadata(self)": [MODEL.save_pretrained],
    "is_quantized": [MODEL.half, MODEL.float],
    "_weight_conversions": [core_model_loading.revert_weight_conversion],
    "_is_quantized": [modeling_falcon_mamba, importlib.import_module("transformers.quantizers.base")],
    "is_qat_trainable": [importlib.import_module("transformers.trainer_utils")],
    "_hf_peft_config_loaded": [MODEL.save_pretrained],
    "_attn_implementation": [MODEL.set_attn_implementation],
    "allow_is_causal_skip": [masking_utils.sdpa_mask],
    "allow_is_bidirectional_skip": [masking_utils.sdpa_mask],
    "_original_forward": [Accelerator.prepare_model],
    "_get_train_sampler": [tf.Trainer],
    "_load_from_checkpoint": [tf.Trainer],
    data_parallel.IGNORED: [DistributedDataParallel.__init__],
}

ARGUMENTS: dict[Callable[..., Any], set[str]] = {
    MODEL.get_expanded_tied_weights_keys: {"all_submodels"},
    MODEL.mark_tied_weights_as_initialized: {"loading_info"},
    MODEL.save_pretrained: {"save_directory", "is_main_process", "state_dict"},
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
    assert not gone, f"transformers {tf.__version__} and torch {torch.__version__} have moved {gone}"
    assert compat.base_class(tf.BertConfig()) is tf.BertModel
    assert compat.base_class(tf.FunnelConfig()) is tf.FunnelModel
    assert compat.knows_type("bert")
    assert not compat.knows_type("nonsense")
    assert not compat.knows_type(None)
    assert _compat.unobserved()
    assert not torch.func.vmap(lambda x: x * _compat.unobserved())(torch.ones(2)).any()
    assert callable(_compat.reference(sparse.sparse_matmul))


def test_peft_has_what_adapters_need() -> None:
    pytest.importorskip("peft")
    from peft.tuners import tuners_utils
    from peft.tuners.lora import layer, model

    assert {"target", "adapter_name", "config"} <= inspect.signature(layer.dispatch_default).parameters.keys()
    assert "dispatch_default" in inspect.getsource(model.LoraModel)
    assert "_maybe_include_all_linear_layers(" in inspect.getsource(tuners_utils.BaseTuner)
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
