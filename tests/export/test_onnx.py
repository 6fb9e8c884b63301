"""Exported files compute in ONNX Runtime what torch computes, for batches of any shape, from the factors as stored."""

from __future__ import annotations

import collections
import copy
import functools
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
import transformers as tf
from tests.export.once import translate_once
from tests.tiny import MODELS, VOCABULARY, WIDTH

import factorformer
from factorformer.errors import ExportError, OutputError
from factorformer.export import graph
from factorformer.export import onnx as exporter
from factorformer.export.onnx import Exported, export
from factorformer.export.sentence import Pooling
from factorformer.export.subject import TEXTS, prepare
from factorformer.kernels.support import code_of
from factorformer.layers.nn import FactorizedEmbedding, FactorizedLinear, FactorizedMatrix
from factorformer.registration import attach
from factorformer.structures import DenseSparse, KroneckerSum, LowRank, Structure

TALL = 600
CONSTANTS = 4096
"""Bytes of numbers that belong to the graph, such as shapes."""

UP, DOWN, SQUARE = (TALL, WIDTH), (WIDTH, TALL), (WIDTH, WIDTH)
SPECS: dict[str, list[tuple[Structure, tuple[int, int]]]] = {
    "low_rank": [(LowRank(5), SQUARE), (LowRank(9), UP), (LowRank(12), DOWN)],
    "kronecker_sum": [
        (KroneckerSum(2, (8, 4), (4, 8)), SQUARE),
        (KroneckerSum(2, (TALL, 1), (1, WIDTH)), UP),
        (KroneckerSum(20, (5, 38), (7, 16)), DOWN),
    ],
    "dense_sparse": [
        (DenseSparse(24, 6), SQUARE),
        (DenseSparse(300, 4), UP),
        (DenseSparse(28, 2, "columns"), DOWN),
        (DenseSparse(28, 2), UP),
        (DenseSparse(300, 4, "columns"), DOWN),
        (DenseSparse(16, 8), UP),
    ],
}


def encoder(blocks: int, labels: int = 3) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    config = tf.BertConfig(
        hidden_size=WIDTH,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        intermediate_size=TALL,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        num_labels=labels,
        initializer_range=0.2,
    )
    return tf.BertForSequenceClassification(config).eval()


def blocks_of(kind: str) -> int:
    """As many as there are specs of the commonest shape."""
    return max(collections.Counter(shape for _, shape in SPECS[kind]).values())


def structured(kind: str, blocks: int | None = None) -> tf.PreTrainedModel:
    """A classifier whose blocks have one spec of each shape; where no spec is left, a matrix stays dense.

    Of dense times sparse, one block has a support of each code.
    """
    model = encoder(blocks or blocks_of(kind))
    left = {side: [spec for spec, shape in SPECS[kind] if shape == side] for side in (SQUARE, UP, DOWN)}
    for block in model.base_model.encoder.layer:
        specs = {side: of_side.pop(0) for side, of_side in left.items() if of_side}
        for parent, name in (
            (block.attention.self, "query"),
            (block.attention.output, "dense"),
            (block.intermediate, "dense"),
            (block.output, "dense"),
        ):
            dense = getattr(parent, name)
            shape = tuple(dense.weight.shape)
            if shape in specs:
                setattr(parent, name, FactorizedLinear(specs[shape], shape, bias=dense.bias))
    found = {str(m.spec) for m in model.modules() if isinstance(m, FactorizedMatrix)}
    assert blocks is not None or found == {str(s) for s, _ in SPECS[kind]}
    return model


def batch(rows: int, length: int) -> dict[str, torch.Tensor]:
    """Random tokens; each row is padded one token more than the one before."""
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(rows))
    mask = (torch.arange(length) < torch.arange(length, length - rows, -1)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": ids % 2}


def session(directory: Path, optimized: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(directory / "model.onnx", options, providers=["CPUExecutionProvider"])


def deviation(directory: Path, model: Callable[..., torch.Tensor], shapes: list[tuple[int, int]]) -> float:
    """The largest difference between ONNX Runtime and torch, relative to the norm of torch's output."""
    running = session(directory)
    names = [value.name for value in running.get_inputs()]
    found = []
    for shape in shapes:
        inputs = {name: tensor for name, tensor in batch(*shape).items() if name in names}
        with torch.inference_mode():
            expected = model(**inputs)
        got = running.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0]
        assert got.shape == expected.shape
        found.append(float((torch.from_numpy(got) - expected).norm() / expected.norm()))
    return max(found)


SHAPES = [(1, 1), (1, 8), (2, 13), (5, 7), (8, 40)]


def operators(file: Path) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in onnx.load(file).graph.node)


def numbers(directory: Path) -> int:
    """Bytes of all tensors in a file."""
    return sum(onnx.numpy_helper.to_array(t).nbytes for t in onnx.load(directory / "model.onnx").graph.initializer)


def stored(model: torch.nn.Module) -> int:
    """Bytes of all tensors of a model, each counted once."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.nbytes for t in tensors.values())


def test_the_sparse_specs_have_all_codes() -> None:
    specs = [spec for spec, _ in SPECS["dense_sparse"] if isinstance(spec, DenseSparse)]
    assert {code_of(s.atoms, s.nonzeros) for s in specs} == {"bitmap", "uint8", "uint16"}


@pytest.mark.parametrize("kind", SPECS)
def test_all_structures(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    translate_once(monkeypatch)
    model = structured(kind)
    before = copy.deepcopy(model.state_dict())
    small = export(model, tmp_path / "int8", int8=True)  # first, so that it is quantized as it was translated
    done = export(model, tmp_path / "out")
    assert done.path == tmp_path / "out"
    assert (done.inputs, done.output) == (("input_ids", "attention_mask", "token_type_ids"), "logits")
    assert done.deviation < 1e-5
    assert deviation(tmp_path / "out", lambda **x: model(**x).logits, SHAPES) < 1e-5
    # No larger than the factors, but for the graph.
    assert numbers(tmp_path / "out") < stored(model) + CONSTANTS
    file = tmp_path / "out" / "model.onnx"
    onnx.checker.check_model(str(file), full_check=True)
    assert done.file_bytes == file.stat().st_size
    # What depends on factors alone is evaluated when the file is loaded.
    session(tmp_path / "out", tmp_path / "optimized.onnx")
    left = operators(tmp_path / "optimized.onnx")
    assert not left.keys() & {"ScatterElements", "TopK", "Mod", "Div", "SkipLayerNormalization", "Where", "IsNaN"}
    assert left["Attention"] == blocks_of(kind)
    # The model is left as it was.
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(m.form is None for m in model.modules() if isinstance(m, FactorizedMatrix))
    # In int8.
    assert deviation(tmp_path / "int8", lambda **x: model(**x).logits, SHAPES) < 0.15
    supports = stored(model) - sum(p.nbytes for p in model.parameters())
    vectors = sum(p.nbytes for p in model.parameters() if p.dim() == 1)
    assert numbers(tmp_path / "int8") < 0.45 * stored(model) + supports + vectors
    assert small.deviation < 0.2
    session(tmp_path / "int8", tmp_path / "optimized8.onnx")
    left = operators(tmp_path / "optimized8.onnx")
    assert left["MatMul"] == left["MatMulInteger"] == left["Round"] == left["ReduceMax"] == 0
    assert left["DynamicQuantizeMatMul"] + left["MatMulIntegerToFloat"] >= 6 * blocks_of(kind)


def test_a_wrong_graph_in_int8_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    translate_once(monkeypatch)
    right = graph._int8_matrix

    def mistaken(wrong: str, model: object, node: object, *others: object):
        codes, scales = right(model, node, *others)  # type: ignore[arg-type]
        if wrong == "scales":  # of the first output for all
            scales = graph._node(node, "ReduceMax", [scales])  # type: ignore[arg-type]
            scales = graph._node(node, "Mul", [scales, graph._initializer(model, "two", np.float32(2))])  # type: ignore[arg-type]
        elif wrong == "order":
            names = [graph._integers(model, [value]) for value in (-1, -10000, 1, -1)]  # type: ignore[arg-type]
            codes = graph._node(node, "Slice", [codes, *names])  # type: ignore[arg-type]
        else:
            scales = graph._node(node, "Neg", [scales])  # type: ignore[arg-type]
        return codes, scales

    for wrong in ("scales", "sign"):
        monkeypatch.setattr(graph, "_int8_matrix", functools.partial(mistaken, wrong))
        with pytest.raises(ExportError, match=r"products.*float32"):
            export(encoder(1), tmp_path / "out", int8=True)
        assert list(tmp_path.iterdir()) == []


def test_factors_that_are_stored_in_int8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    translate_once(monkeypatch)
    model = structured("dense_sparse")
    for module in model.modules():
        if isinstance(module, FactorizedMatrix):
            module.quantize()
    for int8, most in ((True, 0.15), (False, 0.05)):  # torch multiplies in int8
        export(model, tmp_path / "out", int8=int8, overwrite=not int8)
        assert deviation(tmp_path / "out", lambda **x: model(**x).logits, SHAPES) < most
        assert numbers(tmp_path / "out") < stored(model) + CONSTANTS


def test_factors_of_few_bits_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    translate_once(monkeypatch)
    model = structured("low_rank")
    for module, bits in zip([m for m in model.modules() if isinstance(m, FactorizedMatrix)], itertools.cycle([3, 4])):
        module.fake_quantize(bits)
        module.quantize()
    attach(model)
    model.save_pretrained(tmp_path / "small")
    again = factorformer.load(tmp_path / "small")
    assert {m.bits for m in again.modules() if isinstance(m, FactorizedMatrix)} == {3, 4}
    for int8, most in ((True, 0.15), (False, 0.05)):
        export(again, tmp_path / "out", int8=int8, overwrite=not int8)
        assert deviation(tmp_path / "out", lambda **x: again(**x).logits, SHAPES) < most


@pytest.mark.parametrize(
    ("words", "positions"),
    [(DenseSparse(24, 3), LowRank(6)), (DenseSparse(24, 3, "columns"), KroneckerSum(3, (16, 4), (4, 8)))],
)
def test_factorized_embeddings(words: Structure, positions: Structure, tmp_path: Path) -> None:
    model = encoder(1)
    embeddings = model.base_model.embeddings
    embeddings.word_embeddings = FactorizedEmbedding(words, (VOCABULARY, WIDTH), padding_idx=0)
    embeddings.position_embeddings = FactorizedEmbedding(positions, (64, WIDTH))
    export(model, tmp_path / "out")
    assert deviation(tmp_path / "out", lambda **x: model(**x).logits, SHAPES) < 1e-5
    assert numbers(tmp_path / "out") < stored(model) + CONSTANTS


@pytest.mark.parametrize(
    "spec", [LowRank(9), DenseSparse(24, 3), DenseSparse(24, 3, "columns"), KroneckerSum(3, (30, 4), (20, 8))], ids=str
)
def test_tables_that_are_stored_in_int8(spec: Structure, tmp_path: Path) -> None:
    model = encoder(1)
    table = FactorizedEmbedding(spec, (TALL, WIDTH), padding_idx=0)
    table.quantize()
    model.base_model.embeddings.word_embeddings = table
    assert export(model, tmp_path / "out").deviation < 1e-5
    exact = copy.deepcopy(model)
    exact.base_model.embeddings.word_embeddings = torch.nn.Embedding.from_pretrained(table.to_dense(), padding_idx=0)
    assert deviation(tmp_path / "out", lambda **x: exact(**x).logits, SHAPES) < 1e-5
    assert numbers(tmp_path / "out") < stored(model) + CONSTANTS


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_half_precision_is_stored_as_such(dtype: torch.dtype, tmp_path: Path) -> None:
    model = encoder(1).to(dtype)  # pyright: ignore
    export(model, tmp_path / "out")
    assert model.dtype == dtype
    exact = model.to(torch.float32)  # pyright: ignore
    assert deviation(tmp_path / "out", lambda **x: exact(**x).logits, SHAPES) < 1e-5
    assert numbers(tmp_path / "out") < 0.6 * stored(exact)


@pytest.mark.parametrize("name", ["distilbert", "modernbert"])
def test_architectures(name: str, tmp_path: Path) -> None:
    model = MODELS[name].build()
    factorformer.compress(model, factorformer.plan(model, "svd", ratio=2))
    done = export(model, tmp_path / "out")
    assert done.output == "logits"
    assert deviation(tmp_path / "out", lambda **x: model(**x).logits, [(1, 5), (3, 9), (2, 20)]) < 1e-5


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """An encoder of one block without pooling, which `encoder(1)` makes anew."""
    return export(encoder(1).base_model, tmp_path_factory.mktemp("plain") / "out")


def test_a_text_of_nothing_but_padding_spoils_no_other(plain: Exported) -> None:
    inputs = {name: tensor.numpy() for name, tensor in batch(3, 9).items()}
    running = session(plain.path)
    before = running.run(None, inputs)[0]
    inputs["attention_mask"][2] = 0
    after = running.run(None, inputs)[0]
    assert np.isfinite(after).all()
    assert np.allclose(before[:2], after[:2], atol=1e-6)


def test_pooling_of_a_model_in_memory(tmp_path: Path) -> None:
    pooling = Pooling(("cls", "max", "mean", "mean_sqrt_len_tokens"), normalize=True)
    model = encoder(1).base_model
    done = export(model, tmp_path / "out", pooling=pooling)
    assert done.output == "sentence_embedding"

    def embed(**inputs: torch.Tensor) -> torch.Tensor:
        return pooling(model(**inputs).last_hidden_state, inputs["attention_mask"])

    assert deviation(tmp_path / "out", embed, SHAPES[1:]) < 1e-5


def test_an_encoder_without_pooling(plain: Exported) -> None:
    model = encoder(1).base_model
    assert plain.output == "last_hidden_state"
    assert deviation(plain.path, lambda **x: model(**x).last_hidden_state, SHAPES) < 1e-5


def test_a_real_sentence_encoder(minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sentence_transformers import SentenceTransformer

    texts = ["A man is eating food.", "Somebody has a meal", "The weather is lovely today! " * 80]
    translate_once(monkeypatch)
    expected = SentenceTransformer(str(minilm), device="cpu").encode(texts)
    for int8, least in ((True, 0.97), (False, 0.99999)):
        done = export(minilm, tmp_path / "out", int8=int8, texts=texts if int8 else None, overwrite=not int8)
        assert done.output == "sentence_embedding"
        tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path / "out")
        inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="np")
        found = session(tmp_path / "out").run(["sentence_embedding"], {name: inputs[name] for name in done.inputs})[0]
        assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
        assert (found * expected).sum(1).min() > least
        assert done.file_bytes < 0.26 * (minilm / "model.safetensors").stat().st_size if int8 else done.deviation < 1e-5


def test_texts_are_made_of_the_vocabulary(minilm: Path, tmp_path: Path) -> None:
    model, tokenizer = MODELS["bert"].build().base_model, tf.AutoTokenizer.from_pretrained(minilm)
    model.resize_token_embeddings(len(tokenizer))
    tokenizer.model_max_length = 8
    subject = prepare(
        model, tmp_path / "out", "onnx", exporter.FILES, tokenizer=tokenizer, pooling=None, overwrite=False
    )
    made, again = subject.spoken(None).batches, subject.spoken(None).batches
    assert [ids.shape for ids, *_ in made] == [(TEXTS // 2, 8)] * 2  # cut to what the model reads
    assert all(torch.equal(a[0], b[0]) for a, b in zip(made, again, strict=True))
    assert len({tuple(row) for ids, *_ in made for row in ids.tolist()}) == TEXTS
    assert all(not (ids == tokenizer.unk_token_id).any() for ids, *_ in made)


def test_weights_that_are_too_many_for_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    translate_once(monkeypatch)
    model = encoder(1)
    monkeypatch.setattr(exporter, "LARGEST_FILE", 1000)
    for int8, most in ((True, 0.15), (False, 1e-5)):
        done = export(model, tmp_path / "out", int8=int8, overwrite=not int8)
        graph_file, weights = tmp_path / "out" / "model.onnx", tmp_path / "out" / "model.onnx_data"
        assert graph_file.stat().st_size < 45_000 < weights.stat().st_size
        assert done.file_bytes == graph_file.stat().st_size + weights.stat().st_size
        assert deviation(tmp_path / "out", lambda **x: model(**x).logits, SHAPES) < most
    monkeypatch.setattr(exporter, "LARGEST_FILE", 2 * stored(model) // 3)  # in floats it is larger, in int8 it is not
    done = export(model, tmp_path / "out", int8=True, overwrite=True)
    assert not (tmp_path / "out" / "model.onnx_data").exists()
    assert done.file_bytes == (tmp_path / "out" / "model.onnx").stat().st_size


def test_a_fused_model_has_all_of_its_inputs(tmp_path: Path) -> None:
    model = MODELS["bert"].build().base_model.eval()
    expected = export(model, tmp_path / "plain").inputs
    assert "token_type_ids" in expected
    assert export(factorformer.fuse(model), tmp_path / "fused").inputs == expected


def test_a_single_number_has_no_cosine(tmp_path: Path) -> None:
    assert export(encoder(1, labels=1), tmp_path / "out").cosine is None


@pytest.mark.parametrize("name", ["t5", "vit"])
def test_models_of_another_kind(name: str, tmp_path: Path) -> None:
    model = MODELS[name].build()
    with pytest.raises(ExportError, match=rf"{type(model).__name__}.*(allowed|only)"):
        export(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["qwen3"])
def test_decoders_as_encoders(name: str, tmp_path: Path) -> None:
    model = MODELS[name].build().base_model
    done = export(model, tmp_path / "out")
    assert (done.output, done.inputs) == ("last_hidden_state", ("input_ids", "attention_mask"))
    assert done.deviation < 1e-5


def test_a_causal_classifier(tmp_path: Path) -> None:
    config = tf.LlamaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=99, pad_token_id=0
    )
    done = export(tf.LlamaForSequenceClassification(config), tmp_path / "out")
    assert (done.output, done.deviation < 1e-5) == ("logits", True)


def test_a_head_and_a_pooling(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"head.*pooling"):
        export(encoder(1), tmp_path / "out", pooling=Pooling())


def test_an_output_that_exists(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="exists already"):
        export(encoder(1), tmp_path)


def test_a_file_that_deviates_is_not_written(plain: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "translate", lambda _: onnx_ir.load(plain.path / "model.onnx"))
    monkeypatch.setattr(exporter, "TOLERANCE", 0.0)
    with pytest.raises(ExportError, match=r"deviates .* 0 allowed"):
        export(encoder(1).base_model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(ExportError, match=r"onnxruntime.*factorformer\[onnx\]"):
        export(encoder(1), tmp_path / "out")


def test_a_model_is_not_replaced_by_its_export(tmp_path: Path) -> None:
    model = MODELS["bert"].build()
    model.save_pretrained(tmp_path / "model")
    before = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    for target in (tmp_path / "model", tmp_path):
        with pytest.raises(OutputError, match=r"(is|holds) the input"):
            export(tmp_path / "model", target, overwrite=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()} == before
