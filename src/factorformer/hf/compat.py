"""Everything that this package uses of transformers and that transformers does not document.

One function each, with what it relies on and where that stands in transformers 5.23. `tests/hf/test_compat.py` asserts
that all of it is there, so that a release which moves something fails in one readable test. The same for torch is in
`factorformer.kernels._compat` and `factorformer.layers._compat`.

transformers may be importing its own models while this is imported: nothing here may need `PreTrainedModel` before a
function is called.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from torch import Tensor, nn

from factorformer.errors import CheckpointError, ModelError
from factorformer.hf.config import Quantizer
from factorformer.layers.embeddings import embeddings_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer, TrainingArguments


SAVES_WITHIN = "_factorformer_saves_within"
"""Marks methods of transformers that functions of this module made."""

Ties = dict[str, str]
"""`{target: source}`, names of tensors: the target is stored under the name of the source."""


# Ties


def expanded_ties(model: PreTrainedModel, *, whole: bool) -> Ties:
    """The ties that a model declares, with or without those of the models inside of it.

    Relies on `get_expanded_tied_weights_keys(all_submodels=)`: modeling_utils.py:2416.
    """
    return dict(model.get_expanded_tied_weights_keys(all_submodels=whole))


def declared_ties(model: PreTrainedModel) -> Mapping[str, str]:
    """What a model declares, unexpanded: names that end in `weight` or `bias`, or regular expressions.

    Relies on `_tied_weights_keys`, a mapping or None: modeling_utils.py:2499.
    """
    return model._tied_weights_keys or {}


def declare_ties(model: PreTrainedModel, ties: Mapping[str, str]) -> None:
    """Declare other ties for this model alone, whose class stays as it is, and leave biases of tied heads alone.

    Relies on `_tied_weights_keys`, which an instance may have (modeling_utils.py:2499), and on `_adjust_bias`, which
    cuts the bias of a tied head to the rows of its `weight` (modeling_utils.py:2621): a factor need not have those.
    """
    model._tied_weights_keys = dict(ties)  # pyright: ignore[reportAttributeAccessIssue]
    model._adjust_bias = _leave_bias


def _leave_bias(output_embeddings: Any, input_embeddings: Any) -> None:
    """In the place of `_adjust_bias`."""


def undeclare_ties(model: PreTrainedModel) -> None:
    """The ties of the class again: undoes `declare_ties`."""
    model.__dict__.pop("_tied_weights_keys", None)
    model.__dict__.pop("_adjust_bias", None)


def all_ties(model: PreTrainedModel) -> Ties:
    """The ties that hold in a model.

    Relies on `all_tied_weights_keys`: set in modeling_utils.py:1300, read by saving (:436), loading (:4867) and
    `tie_weights` (:2543).
    """
    return model.all_tied_weights_keys


def set_all_ties(model: PreTrainedModel, ties: Ties) -> None:
    """Say which ties hold; see `all_ties`."""
    model.all_tied_weights_keys = ties


# Loading


def checkpoint_files(options: Mapping[str, Any]) -> Sequence[str] | None:
    """The files that a model is loaded from; None where the caller passed a state dict.

    Relies on the keyword `checkpoint_files` of `_process_model_before_weight_loading`: modeling_utils.py:4390.

    Raises:
        CheckpointError: the keyword is gone, so that nothing could be checked.
    """
    if "checkpoint_files" not in options:
        raise CheckpointError(
            f"transformers {transformers.__version__} does not say which files it loads, so that they cannot be "
            "checked: install a version that factorformer supports"
        )
    return options["checkpoint_files"]


def let_unexpected(model: PreTrainedModel, pattern: str) -> None:
    """Let tensors be in the files that this model has no place for.

    Relies on `_keys_to_ignore_on_load_unexpected`: modeling_utils.py:4934.
    """
    model._keys_to_ignore_on_load_unexpected = {  # pyright: ignore[reportAttributeAccessIssue]
        *(model._keys_to_ignore_on_load_unexpected or ()),
        pattern,
    }


def may_be_missing(model: PreTrainedModel) -> list[str]:
    """Regular expressions of tensors that need not be in the files.

    Relies on `_keys_to_ignore_on_load_missing` (modeling_utils.py:4933) and `_keys_to_ignore_on_save` (:3491).
    """
    return [*(model._keys_to_ignore_on_load_missing or ()), *(model._keys_to_ignore_on_save or ())]


def may_be_unexpected(model: PreTrainedModel) -> list[str]:
    """Regular expressions of tensors that may be in the files without a place in the model; see `let_unexpected`."""
    return list(model._keys_to_ignore_on_load_unexpected or ())


def mark_ties_by(model: PreTrainedModel, mark: Callable[..., None] | None) -> None:
    """Let a function mark the tied tensors as initialized in the load that is going on; None ends that.

    Relies on `mark_tied_weights_as_initialized`, called on the instance: modeling_utils.py:4603.
    """
    if mark is None:
        model.__dict__.pop("mark_tied_weights_as_initialized", None)
    else:
        vars(model)["mark_tied_weights_as_initialized"] = mark


def mark_parameters(model: PreTrainedModel, *arguments: Any) -> None:
    """What transformers itself does where `mark_ties_by` puts something else: modeling_utils.py:4950."""
    type(model).mark_tied_weights_as_initialized(model, *arguments)


def is_initialized(tensor: Tensor) -> bool:
    """Whether a tensor came from the files.

    Relies on `_is_hf_initialized`, set when a tensor is put into its module: core_model_loading.py:1470.
    """
    return bool(getattr(tensor, "_is_hf_initialized", False))


def mark_initialized(tensor: Tensor) -> None:
    """Keep transformers from drawing random values for a tensor; see `is_initialized`."""
    tensor._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]


# What a model is, and what is written of it


def own_config(model: PreTrainedModel) -> None:
    """Give a model a configuration that no other model holds, and everything inside of it the same one.

    Modules keep the configuration that they were made with under any name, most as `config`; parts of it as well.
    """
    copies: dict[int, Any] = {}
    model.config = copy.deepcopy(model.config, copies)
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, transformers.PreTrainedConfig) and id(value) in copies:
                vars(module)[name] = copies[id(value)]


def mark_quantized(model: PreTrainedModel, quantizer: Quantizer, *, codes: bool) -> None:
    """Make transformers save a model through a quantizer, and let it be cast unless some weights are codes.

    Relies on `hf_quantizer` (modeling_utils.py:3383), `quantization_method`, `is_quantized` (forbids `half` and
    `float`, :3784), `_weight_conversions` (core_model_loading.py:1887: converters that fuse or split dense tensors on
    save know nothing of factors), and `config._is_quantized` (quantizers/base.py:68), which loaded models have, and for
    which FalconMamba and Jamba call a layer where they otherwise read its weight.
    """
    state = {
        "hf_quantizer": quantizer,
        "quantization_method": quantizer.quantization_config.quant_method,
        "is_quantized": codes,
        "_weight_conversions": [],
    }
    for name, value in state.items():
        setattr(model, name, value)
    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel):
            module.config._is_quantized = True


def unmark_quantized(model: PreTrainedModel) -> None:
    """Undo `mark_quantized`; the tensors are then saved under the names of the architecture."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized", "_weight_conversions"):
        model.__dict__.pop(name, None)
    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel):
            vars(module.config).pop("_is_quantized", None)


def around_saving(around: Callable[[PreTrainedModel, Mapping[str, Any]], AbstractContextManager[None]]) -> None:
    """Enter a context whenever any model is saved, from the first call on; later calls change nothing.

    There is no other way to reach a model that holds a compressed one, and transformers' hooks for quantizers know
    neither the directory nor the state dict that is written.

    Relies on `PreTrainedModel.save_pretrained`, whose arguments the context is given: modeling_utils.py:3310.
    """
    original = transformers.PreTrainedModel.save_pretrained
    if hasattr(original, SAVES_WITHIN):  # wrappers of others take this over from ours
        return

    @functools.wraps(original)
    def save_pretrained(self: PreTrainedModel, *arguments: Any, **options: Any) -> Any:
        given = inspect.signature(original).bind(self, *arguments, **options)
        given.apply_defaults()
        with around(self, given.arguments):
            return original(self, *arguments, **options)

    setattr(save_pretrained, SAVES_WITHIN, True)
    transformers.PreTrainedModel.save_pretrained = save_pretrained


def before_uploading(prepare: Callable[[PreTrainedModel, Path], None]) -> None:
    """Call a function before the files of any model go to the Hub, from the first call on; later calls change nothing.

    transformers writes a card of its own over the one that was saved.

    Relies on `PreTrainedModel._upload_modified_files(working_dir, ...)`, through which `push_to_hub` and
    `save_pretrained(push_to_hub=True)` go: utils/hub.py:884 and modeling_utils.py:3650.
    """
    original = transformers.PreTrainedModel._upload_modified_files
    if hasattr(original, SAVES_WITHIN):
        return

    @functools.wraps(original)
    def upload(self: PreTrainedModel, working_dir: Any, *arguments: Any, **options: Any) -> Any:
        prepare(self, Path(working_dir))
        return original(self, working_dir, *arguments, **options)

    setattr(upload, SAVES_WITHIN, True)
    transformers.PreTrainedModel._upload_modified_files = upload


def has_adapters(model: PreTrainedModel) -> bool:
    """Whether saving writes adapters alone.

    Relies on `_hf_peft_config_loaded`: modeling_utils.py:3381.
    """
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def around_all_linear(around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put a function around the one that finds the layers that PEFT's `all-linear` means.

    Relies on `_maybe_include_all_linear_layers(peft_config, model)` of peft 0.21: tuners/tuners_utils.py.
    """
    from peft.tuners import tuners_utils

    tuners_utils._maybe_include_all_linear_layers = around(tuners_utils._maybe_include_all_linear_layers)


def token_tables(model: PreTrainedModel) -> list[nn.Module]:
    """The embeddings and the head that `resize_token_embeddings` changes.

    Relies on `get_input_embeddings` and `get_output_embeddings`, which some classes do not implement:
    modeling_utils.py:969 and :1049.
    """
    tables = (embeddings_of(model, which) for which in ("input_embeddings", "output_embeddings"))
    return [table for table in tables if table is not None]


def resize_by(model: PreTrainedModel, resize: Callable[..., Any] | None) -> None:
    """Let a function stand in for `resize_token_embeddings` (modeling_utils.py:2633); None undoes that."""
    if resize is None:
        model.__dict__.pop("resize_token_embeddings", None)
    else:
        vars(model)["resize_token_embeddings"] = resize


def base_class(config: transformers.PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class of a model without a head; None where transformers has none for this configuration.

    Relies on `MODEL_MAPPING`, which gives a class or, for a few, several: models/auto/modeling_auto.py.
    """
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    if type(config) not in MODEL_MAPPING:
        return None
    found = MODEL_MAPPING[type(config)]
    return found[0] if isinstance(found, tuple) else found


def auto_classes(kind: type[PreTrainedModel]) -> list[str]:
    """Names of the classes for a task, such as `AutoModelForMaskedLM`, that load a class by its configuration.

    Relies on `_model_mapping` of these: models/auto/auto_factory.py.
    """
    from transformers.models.auto import modeling_auto

    found = []
    for name in sorted(vars(modeling_auto)):
        mapping = getattr(getattr(modeling_auto, name), "_model_mapping", None)
        if name.startswith("AutoModelFor") and mapping is not None and kind.config_class in mapping:
            classes = mapping[kind.config_class]
            if kind in (classes if isinstance(classes, (list, tuple)) else (classes,)):
                found.append(name)
    return found


def knows_type(model_type: str | None) -> bool:
    """Whether transformers has a configuration of this `model_type`.

    Relies on `CONFIG_MAPPING`: models/auto/configuration_auto.py.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return model_type is not None and model_type in CONFIG_MAPPING


def settable_attention(model: PreTrainedModel) -> str | None:
    """The name of a model's attention implementation; None where no other can be set.

    Relies on `_can_set_attn_implementation` and `config._attn_implementation`: modeling_utils.py:1908 and
    configuration_utils.py:493.
    """
    return model.config._attn_implementation if model._can_set_attn_implementation() else None


def whole_mask(**arguments: Any) -> Tensor:
    """Which tokens attend to which, `(batch, 1, length, length)`, booleans; a mask that hides nothing is made as well.

    Relies on `sdpa_mask(allow_is_bidirectional_skip=, allow_is_causal_skip=)`: masking_utils.py.
    """
    from transformers.masking_utils import sdpa_mask

    mask = sdpa_mask(**{**arguments, "allow_is_bidirectional_skip": False, "allow_is_causal_skip": False})
    assert mask is not None
    return mask


def capturing() -> bool:
    """Whether a forward pass collects what single layers make.

    Relies on `_active_collector`: utils/output_capturing.py:117.
    """
    from transformers.utils import output_capturing

    return bool(output_capturing._active_collector.get())


# Training


@contextlib.contextmanager
def own_forward(model: nn.Module) -> Iterator[None]:
    """Take off what Accelerate wraps around `forward` for the precision of a training, which ends with it.

    Relies on `forward` and `_original_forward`, set on the instance: `Accelerator.prepare_model` of accelerate 1.x.
    """
    wrapped = ("forward", "_original_forward")
    own = {name: vars(model)[name] for name in wrapped if name in vars(model)}
    try:
        yield
    finally:
        for name in wrapped:
            vars(model).pop(name, None)
        vars(model).update(own)


def load_weights(trainer: Trainer, checkpoint: Path) -> None:
    """Give the model of a Trainer the weights of a checkpoint, as it does when it goes on from one.

    Relies on `Trainer._load_from_checkpoint`: trainer.py:3602.
    """
    trainer._load_from_checkpoint(str(checkpoint))


def use_one_gpu(arguments: TrainingArguments) -> None:
    """Let a Trainer leave all GPUs but one alone, where it would put the model on each of them.

    Relies on `TrainingArguments._n_gpu`, which `n_gpu` gives once it is set: training_args.py.
    """
    arguments._n_gpu = 1


@contextlib.contextmanager
def recomputed(model: transformers.PreTrainedModel, wanted: bool) -> Iterator[Callable[[], None]]:
    """While this lasts, the backward pass computes layers again instead of keeping what is inside them.

    Relies on `activation_checkpointing_enable` (in older releases `gradient_checkpointing_enable`), and on layers that
    look at `gradient_checkpointing` and `training`, of themselves alone: modeling_layers.py:93.

    Yields:
        What tells these layers that they train, whatever the mode of the modules in them.
    """
    layers: list[nn.Module] = []
    if wanted:
        if not model.supports_gradient_checkpointing:
            raise ModelError(f"the layers of {type(model).__name__} cannot be computed again: leave checkpointing out")
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]

    def train() -> None:
        for layer in layers:
            layer.training = True

    try:
        yield train
    finally:
        if wanted:
            disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
            disable()
