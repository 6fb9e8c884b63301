"""LoRA of PEFT trains beside factors, in floats or int8, and never pretends to be merged into them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tests.tiny import MODELS, logits

import factorformer
from factorformer.errors import ModelError
from factorformer.layers.nn import FactorizedMatrix

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LLAMA = MODELS["llama"]


def compressed(*, int8: bool = False) -> tf.PreTrainedModel:
    model = LLAMA.build()
    factorformer.compress(model, factorformer.plan(model, "svd", 8 if int8 else 2, int8=int8))
    return model


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("targets", "layers"), [(["q_proj", "v_proj"], 4), ("all-linear", 14)])
def test_adapters(targets: Any, layers: int, int8: bool, tmp_path: Path) -> None:
    model, inputs = compressed(int8=int8), LLAMA.inputs()
    model.save_pretrained(tmp_path / "small")
    expected = logits(model, inputs)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    assert torch.equal(logits(adapted, inputs), expected)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "base_layer" in name}
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * layers
    assert all("lora_" in name for name in trained)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    changed = logits(adapted, inputs)
    assert not torch.allclose(changed, expected)
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(factorformer.load(tmp_path / "small"), tmp_path / "adapter")
    torch.testing.assert_close(logits(again, inputs), changed)
    with pytest.raises(ModelError, match="merged into factors"):
        again.merge_and_unload()
    plain = adapted.unload()
    assert torch.equal(logits(plain, inputs), expected)
    assert sum(isinstance(module, FactorizedMatrix) for module in plain.modules()) == 14


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_adapters_that_read_the_weight_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=next(iter(options))):
        peft.get_peft_model(compressed(), peft.LoraConfig(r=4, target_modules=["q_proj"], **options))


def test_dense_models_are_as_ever() -> None:
    model, inputs = LLAMA.build(), LLAMA.inputs()
    expected = logits(model, inputs)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert torch.equal(logits(adapted, inputs), expected)
    assert torch.equal(logits(adapted.merge_and_unload(), inputs), expected)


def test_a_model_with_an_adapter_is_not_compressed() -> None:
    adapted = peft.get_peft_model(LLAMA.build(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    for model in (adapted, adapted.get_base_model()):
        with pytest.raises(ModelError, match=r"adapter of PEFT.*merge_and_unload"):
            factorformer.plan(model, "svd", 2)
    merged = adapted.merge_and_unload()
    factorformer.compress(merged, factorformer.plan(merged, "svd", 2))
