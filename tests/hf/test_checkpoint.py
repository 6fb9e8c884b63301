"""A damaged checkpoint is an error that names the damage, and an output directory is complete or absent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tests.tiny import MODELS, logits
from torch import Tensor

import factorformer
from factorformer.errors import CheckpointError, FactorformerWarning
from factorformer.hf.tensors import read_sizes

QUERY = "bert.encoder.layer.0.attention.self.query"
LOADERS: dict[str, Callable[[Path], Any]] = {
    "load": factorformer.load,
    "auto": tf.AutoModelForMaskedLM.from_pretrained,
    "class": tf.BertForMaskedLM.from_pretrained,
    "without-head": tf.AutoModel.from_pretrained,
    "other-head": tf.AutoModelForSequenceClassification.from_pretrained,
}


@pytest.fixture(scope="module", params=["blocks", "all"])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "model"
    model = MODELS["bert"].build()
    factorformer.compress(model, factorformer.plan(model, "svd", ratio=2, scope=request.param))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


# Tensors


@pytest.mark.parametrize("loader", LOADERS)
def test_an_intact_checkpoint_loads(folder: Path, loader: str) -> None:
    LOADERS[loader](folder)


def test_a_pooler_may_be_left_out(tmp_path: Path) -> None:
    model = tf.BertModel(MODELS["bert"].build().config).eval()
    factorformer.compress(model, factorformer.plan(model, "svd", ratio=2, scope="all"))
    model.save_pretrained(tmp_path)
    loaded = tf.AutoModel.from_pretrained(tmp_path, add_pooling_layer=False)
    assert loaded.pooler is None
    inputs = MODELS["bert"].inputs()
    assert torch.equal(loaded(**inputs).last_hidden_state, model(**inputs).last_hidden_state)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    "name", [f"{QUERY}.weight", f"{QUERY}.right", f"{QUERY}.bias", "bert.embeddings.LayerNorm.weight"]
)
def test_a_missing_tensor(folder: Path, loader: str, name: str) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"missing: .*{name.removeprefix('bert.')}"):
        LOADERS[loader](folder)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    "name", [f"{QUERY}.extra", "bert.encoder.layer.2.output.dense.weight", "bert.embeddings.extra"]
)
def test_an_unexpected_tensor(folder: Path, loader: str, name: str) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(3)}))
    with pytest.raises(CheckpointError, match=f"unexpected: .*{name.removeprefix('bert.')}"):
        LOADERS[loader](folder)


def test_what_training_keeps_beside_factors_is_let_in(folder: Path) -> None:
    """Checkpoints of straight-through training hold shadows; those load in every class, under either name."""
    training = {f"{QUERY}.shadow": torch.zeros(32, 32), f"{QUERY}.frozen": torch.zeros(1)}
    edit_tensors(folder, lambda tensors: tensors.update(training))
    for load in LOADERS.values():
        assert not any(name.endswith((".shadow", ".frozen")) for name in load(folder).state_dict())
    tf.AutoModel.from_pretrained(folder).save_pretrained(folder / "base")
    inside = {name.removeprefix("bert."): tensor for name, tensor in training.items()}
    edit_tensors(folder / "base", lambda tensors: tensors.update(inside))
    for load in (factorformer.load, tf.AutoModelForSequenceClassification.from_pretrained):
        load(folder / "base")


@pytest.mark.parametrize("loader", ["load", "auto", "class"])
def test_an_unexpected_part(folder: Path, loader: str) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"stranger.weight": torch.zeros(3)}))
    with pytest.raises(CheckpointError, match=r"unexpected: stranger.weight"):
        LOADERS[loader](folder)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    "name", [f"{QUERY}.weight", f"{QUERY}.right", f"{QUERY}.bias", "bert.embeddings.LayerNorm.weight"]
)
def test_a_misshapen_tensor(folder: Path, loader: str, name: str) -> None:
    def cut(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name][:-1].clone()

    size = tuple(load_file(folder / "model.safetensors")[name].shape)
    edit_tensors(folder, cut)
    with pytest.raises(CheckpointError) as caught:
        LOADERS[loader](folder)
    assert name.removeprefix("bert.") in str(caught.value)
    assert f"{[size[0] - 1, *size[1:]]} in the file" in str(caught.value)
    assert str(list(size)) in str(caught.value)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_renamed_tensor(folder: Path, loader: str) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({f"{QUERY}.left": tensors.pop(f"{QUERY}.weight")}))
    with pytest.raises(CheckpointError) as caught:
        LOADERS[loader](folder)
    assert f"1 missing: {QUERY}.weight" in str(caught.value)
    assert f"1 unexpected: {QUERY}.left" in str(caught.value)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_dense_weight_in_place_of_factors(folder: Path, loader: str) -> None:
    def multiply(tensors: dict[str, Tensor]) -> None:
        tensors[f"{QUERY}.weight"] = tensors[f"{QUERY}.weight"] @ tensors.pop(f"{QUERY}.right")

    edit_tensors(folder, multiply)
    with pytest.raises(CheckpointError, match=f"{QUERY}.right"):
        LOADERS[loader](folder)


def test_many_problems_are_counted_and_five_named(folder: Path) -> None:
    def strip(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".right")]:
            del tensors[name]

    edit_tensors(folder, strip)
    with pytest.raises(CheckpointError, match=r"1\d missing: ") as caught:
        factorformer.load(folder)
    assert str(caught.value).count(".right") == 5
    assert "; ..." in str(caught.value)


def test_a_missing_head_is_an_error_in_the_class_that_was_saved(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop("cls.predictions.transform.dense.bias"))
    for loader in ("load", "auto", "class"):
        with pytest.raises(CheckpointError, match=r"cls\.predictions\.transform\.dense\.bias"):
            LOADERS[loader](folder)


def test_a_config_without_architectures_hides_nothing(folder: Path) -> None:
    edit_config(folder, lambda config: config.pop("architectures"))
    edit_tensors(folder, lambda tensors: tensors.pop("bert.embeddings.LayerNorm.weight"))
    with pytest.raises(CheckpointError, match=r"embeddings\.LayerNorm\.weight"):
        tf.AutoModelForMaskedLM.from_pretrained(folder)


# Files


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_truncated_file(folder: Path, loader: str, size: int) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: size if size >= 0 else len(content) + size])
    with pytest.raises(CheckpointError, match=r"cannot read.*model.safetensors"):
        LOADERS[loader](folder)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_pickle_is_refused(folder: Path, loader: str) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="never read from pickles"):
        LOADERS[loader](folder)


def test_a_missing_shard(folder: Path) -> None:
    sharded = folder / "sharded"
    factorformer.load(folder).save_pretrained(sharded, max_shard_size="20KB")
    factorformer.load(sharded)
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=shards[1].name):
        factorformer.load(sharded)


def test_missing_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot load"):
        factorformer.load(folder)


@pytest.mark.parametrize("content", [None, "", "{", "[]"])
def test_a_config_that_cannot_be_read(folder: Path, content: str | None) -> None:
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model directory|config\.json|JSON object"):
        factorformer.load(folder)


def test_a_directory_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such model directory"):
        factorformer.load(tmp_path / "nowhere")


def test_sizes_are_read_from_headers(folder: Path) -> None:
    sizes = read_sizes([folder / "model.safetensors"])
    assert sizes == {name: tuple(t.shape) for name, t in load_file(folder / "model.safetensors").items()}


# config.json


def layer(config: dict[str, Any]) -> dict[str, Any]:
    return config["quantization_config"]["layers"][QUERY]


WRONG_LAYERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a larger rank": (lambda c: layer(c).update(rank=layer(c)["rank"] + 1), f"{QUERY}.*in the file"),
    "a rank above break-even": (lambda c: layer(c).update(rank=100), f"'{QUERY}' wrongly: rank 100"),
    "a rank of zero": (lambda c: layer(c).update(rank=0), f"'{QUERY}' wrongly: rank"),
    "a rank that is text": (lambda c: layer(c).update(rank="8"), f"'{QUERY}' wrongly: rank"),
    "no rank": (lambda c: layer(c).pop("rank"), f"'{QUERY}' wrongly: .*rank"),
    "another field": (lambda c: layer(c).update(colour=1), f"'{QUERY}' wrongly: .*colour"),
    "an unknown structure": (
        lambda c: layer(c).update(structure="low_rnk"),
        f"'{QUERY}' wrongly: .*'low_rnk'.*'low_rank'",
    ),
    "no structure": (lambda c: layer(c).pop("structure"), f"'{QUERY}' wrongly: unknown structure"),
    "no shape": (lambda c: layer(c).pop("shape"), f"'{QUERY}' wrongly: .*shape"),
    "half a shape": (lambda c: layer(c).update(shape=[32]), f"'{QUERY}' wrongly"),
    "another shape": (lambda c: layer(c).update(shape=[32, 64]), QUERY),
    "a layer less": (lambda c: c["quantization_config"]["layers"].pop(QUERY), QUERY.removeprefix("bert.")),
    "a layer more": (lambda c: c["quantization_config"]["layers"].update({"bert.other": layer(c)}), "bert.other"),
    "no layers": (lambda c: c["quantization_config"].pop("layers"), "attention"),
    "a newer format": (lambda c: c["quantization_config"].update(format=3), "format 3.*format 2.*newer version"),
}


@pytest.mark.parametrize("wrong", WRONG_LAYERS)
@pytest.mark.parametrize("loader", LOADERS)
def test_a_config_that_does_not_fit(folder: Path, loader: str, wrong: str, no_shape_checks: None) -> None:
    change, message = WRONG_LAYERS[wrong]
    edit_config(folder, change)
    with pytest.raises(CheckpointError, match=message):
        LOADERS[loader](folder)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_config_without_a_description_never_loads_random_weights(folder: Path, loader: str) -> None:
    edit_config(folder, lambda config: config.pop("quantization_config"))
    with pytest.raises((CheckpointError, RuntimeError)):
        LOADERS[loader](folder)


@pytest.mark.parametrize("name", [None, "BertForNothing", "os", "Trainer"])
def test_a_config_that_names_no_model_class(folder: Path, name: str | None) -> None:
    edit_config(folder, lambda config: config.update(architectures=None if name is None else [name]))
    named = "no class" if name is None else f"the class '{name}'"
    with pytest.warns(FactorformerWarning, match=named), pytest.warns(FactorformerWarning, match=r"out: cls\."):
        loaded = factorformer.load(folder)
    assert type(loaded) is tf.BertModel
    assert torch.equal(loaded.state_dict()[f"{QUERY.removeprefix('bert.')}.right"], tensors(folder)[f"{QUERY}.right"])
    edit_config(folder, lambda config: config.update(model_type="nonsense"))
    with pytest.raises(CheckpointError, match="nonsense"):
        factorformer.load(folder)


# Other heads


def test_a_compressed_encoder_takes_a_new_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = tf.BertModel(MODELS["bert"].build().config).eval()
    factorformer.compress(encoder, factorformer.plan(encoder, "svd", ratio=2, scope="all"))
    encoder.save_pretrained(tmp_path)
    model, info = tf.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=5, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert logits(model, MODELS["bert"].inputs()).shape == (2, 5)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(model.bert.state_dict()[name], tensor)
    model.save_pretrained(tmp_path / "again")
    again = factorformer.load(tmp_path / "again")
    assert torch.equal(logits(again, MODELS["bert"].inputs()), logits(model, MODELS["bert"].inputs()))


@pytest.mark.parametrize("name", ["bert", "albert", "gpt2", "llama", "t5", "distilbert", "whisper"])
def test_a_head_is_dropped(name: str, tmp_path: Path) -> None:
    model = MODELS[name].build()
    factorformer.compress(model, factorformer.plan(model, "svd", ratio=2, scope="all"))
    model.save_pretrained(tmp_path)
    base = tf.AutoModel.from_pretrained(tmp_path)
    expected = {key: tensor for key, tensor in model.base_model.state_dict().items() if not key.startswith("lm_head.")}
    loaded = base.state_dict()
    assert set(expected) <= set(loaded)
    assert all(torch.equal(loaded[key], tensor) for key, tensor in expected.items())


def test_a_head_of_another_size_is_an_error(tmp_path: Path) -> None:
    model = MODELS["roberta"].build()
    factorformer.compress(model, factorformer.plan(model, "svd", ratio=2))
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        tf.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    load = tf.AutoModelForSequenceClassification.from_pretrained
    renewed = load(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert renewed.classifier.out_proj.weight.shape == (5, 32)
    assert torch.equal(
        renewed.roberta.encoder.layer[0].output.dense.right, model.roberta.encoder.layer[0].output.dense.right
    )
