"""What a user writes becomes a model that runs, by the route that was asked for; mistakes are explained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.bench.onnx_file import write_onnx
from tests.tiny import MODELS
from transformers import BertConfig, BertModel, PreTrainedModel

import factorformer
from factorformer.bench.candidates import Candidate, _in_int8, load, parse
from factorformer.errors import MethodError, ModelError

CPU = torch.device("cpu")
IDS = torch.tensor([[3, 4, 5], [6, 7, 8]])


def save(model: PreTrainedModel, path: Path) -> Path:
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(MODELS["bert"].build(), tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = MODELS["bert"].build()
    factorformer.compress(model, factorformer.plan(model, "svd", 2))
    return save(model, tmp_path_factory.mktemp("models") / "small")


def output(candidate: Candidate) -> torch.Tensor:
    run: Callable[[], object] = load(candidate, 1, CPU).prepare(IDS)
    with torch.inference_mode():
        found = run()
    return found.logits  # type: ignore[attr-defined]


def test_a_directory_is_run_by_torch(dense: Path) -> None:
    candidate = parse(str(dense))
    assert candidate == Candidate(str(dense), dense)
    assert [file.name for file in candidate.files] == ["model.safetensors"]
    with torch.inference_mode():
        expected = MODELS["bert"].build()(IDS).logits
    assert torch.equal(output(candidate), expected)
    loaded = load(candidate, 1, CPU)
    assert (loaded.vocabulary, loaded.padding, loaded.positions) == (99, 0, 24)


@pytest.mark.parametrize(("variant", "tolerance"), [("bf16", 0.05), ("int8", 0.05)])
def test_variants_change_precision(dense: Path, variant: str, tolerance: float) -> None:
    candidate = parse(f"{variant}:{dense}")
    assert (candidate.path, candidate.variants) == (dense, (variant,))
    exact, found = output(parse(str(dense))), output(candidate)
    assert found.dtype == (torch.bfloat16 if variant == "bf16" else torch.float32)
    assert 0 < (found.float() - exact).abs().max() < tolerance


def test_variants_combine(small: Path) -> None:
    candidate = parse(f"compile:bf16:{small}")
    assert candidate.variants == ("compile", "bf16")
    loaded = load(candidate, 1, CPU)
    assert isinstance(loaded.module, torch._dynamo.OptimizedModule)
    assert next(loaded.module.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "albert", "modernbert"])
def test_other_models_of_text_run(name: str, tmp_path: Path) -> None:
    path = save(MODELS[name].build(), tmp_path / name)
    assert output(parse(str(path))).shape[:2] == IDS.shape


def test_a_colon_can_be_part_of_a_name(tmp_path: Path) -> None:
    path = save(MODELS["bert"].build(), tmp_path / "compile:this")
    assert parse(str(path)).variants == ()
    assert parse(f"bf16:{path}").path == path


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (
            "in8:DENSE",
            MethodError,
            r"'in8'.*'int8'.*allowed: fused, fused-bf16, fused-int8, compile",
        ),
        ("int8:bf16:DENSE", MethodError, "one of bf16, int8"),
        ("compile:compile:DENSE", MethodError, "each variant once"),
        ("onnx:DENSE", ModelError, r"model\.onnx'"),
        ("DENSE/none.onnx", ModelError, r"none\.onnx'"),
        ("DENSE/none", ModelError, "/none'"),
    ],
)
def test_a_wrong_name_is_refused(dense: Path, text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parse(text.replace("DENSE", str(dense)))


def test_int8_of_what_is_not_dense_is_refused(small: Path, dense: Path) -> None:
    with pytest.raises(MethodError, match=r"int8.*query'.*factors"):
        load(parse(f"int8:{small}"), 1, CPU)
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(MethodError, match=r"CPU.*cuda"):
        _in_int8(parse(f"int8:{dense}"), "int8", layer, torch.device("cuda"))


def test_layers_that_do_not_run_in_one_call_are_refused(tmp_path: Path) -> None:
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(**sizes, intermediate_size=32, hidden_act="relu")).save_pretrained(tmp_path)
    with pytest.raises(MethodError, match=r"fused-int8.*does not run in one call, nor its products in int8"):
        load(parse(f"fused-int8:{tmp_path}"), 1, CPU)


def test_models_of_other_things_are_refused(tmp_path: Path) -> None:
    path = save(MODELS["vit"].build(), tmp_path / "vit")
    with pytest.raises(ModelError, match="pixel_values"):
        load(parse(str(path)), 1, CPU)


class TestOnnx:
    @pytest.fixture(autouse=True)
    def _needs(self) -> None:
        pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")

    def test_a_file_or_a_directory(self, tmp_path: Path) -> None:
        file = write_onnx(tmp_path / "exported" / "model.onnx")
        (file.parent / "config.json").write_text('{"vocab_size": 14, "pad_token_id": 2}')
        candidates = [parse(str(file)), parse(str(file.parent)), parse(f"onnx:{file.parent}")]
        assert {(c.path, c.route, c.variants) for c in candidates} == {(file, "onnxruntime", ())}
        loaded = load(candidates[1], 1, CPU)
        assert (loaded.vocabulary, loaded.padding, loaded.positions, loaded.module) == (14, 2, None, None)
        (rows,) = loaded.prepare(IDS)()  # type: ignore[misc]
        assert rows.shape == (2, 3, 4)
        assert (rows != 0).all()

    def test_data_beside_the_file_counts(self, tmp_path: Path) -> None:
        file = write_onnx(tmp_path / "model.onnx")
        file.with_name("model.onnx.data").write_bytes(b"12345")
        assert [f.name for f in parse(str(file)).files] == ["model.onnx", "model.onnx.data"]

    def test_beside_other_weights_it_has_to_be_asked_for(self, tmp_path: Path) -> None:
        path = save(MODELS["bert"].build(), tmp_path / "both")
        write_onnx(path / "model.onnx")
        assert parse(str(path)).route == "torch"
        assert parse(f"onnx:{path}").route == "onnxruntime"

    def test_no_variant_of_torch(self, tmp_path: Path) -> None:
        file = write_onnx(tmp_path / "model.onnx")
        with pytest.raises(MethodError, match="leave out 'int8:'"):
            parse(f"int8:{file}")
        with pytest.raises(MethodError, match=r"cuda.*CPU"):
            load(parse(str(file)), 1, torch.device("cuda"))

    def test_what_is_no_model_of_tokens(self, tmp_path: Path) -> None:
        (tmp_path / "broken.onnx").write_bytes(b"no model")
        with pytest.raises(ModelError, match=r"broken\.onnx'"):
            load(parse(str(tmp_path / "broken.onnx")), 1, CPU)
        other = write_onnx(tmp_path / "other.onnx", inputs=("input_ids", "pixels"))
        with pytest.raises(ModelError, match="input_ids, pixels"):
            load(parse(str(other)), 1, CPU)


class TestOpenVINO:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        openvino = pytest.importorskip("openvino")
        pytest.importorskip("onnx")
        graph = openvino.convert_model(write_onnx(tmp_path / "model.onnx"))
        path = tmp_path / "exported" / "openvino_model.xml"
        openvino.save_model(graph, path)
        (path.parent / "config.json").write_text('{"vocab_size": 14, "pad_token_id": 2}')
        return path

    def test_a_file_or_a_directory(self, file: Path) -> None:
        candidates = [parse(str(file)), parse(str(file.parent)), parse(f"openvino:{file.parent}")]
        assert {(c.path, c.route, c.variants) for c in candidates} == {(file, "openvino", ())}
        assert [f.name for f in candidates[0].files] == ["openvino_model.xml", "openvino_model.bin"]
        loaded = load(candidates[1], 1, CPU)
        assert (loaded.vocabulary, loaded.padding, loaded.positions, loaded.module) == (14, 2, None, None)
        rows = loaded.prepare(IDS)()[0]  # type: ignore[index]
        assert rows.shape == (2, 3, 4)
        assert (rows != 0).all()
        with pytest.raises(MethodError, match="leave out 'fused:'"):
            parse(f"fused:{file}")
        with pytest.raises(MethodError, match=r"cuda.*CPU"):
            load(candidates[0], 1, torch.device("cuda"))

    def test_in_a_folder_of_a_model(self, file: Path, tmp_path: Path) -> None:
        path = save(MODELS["bert"].build(), tmp_path / "both")
        with pytest.raises(ModelError, match=r"both/openvino_model\.xml' nor .*both/openvino/openvino_model\.xml'"):
            parse(f"openvino:{path}")
        (file.parent / "config.json").unlink()
        file.parent.rename(path / "openvino")
        assert parse(str(path)).route == "torch"
        candidate = parse(f"openvino:{path}")
        assert candidate.path == path / "openvino" / file.name
        assert load(candidate, 1, CPU).vocabulary == MODELS["bert"].build().config.vocab_size

    def test_beside_a_file_of_another_runtime(self, file: Path) -> None:
        write_onnx(file.parent / "model.onnx")
        routes = {form: parse(f"{form}:{file.parent}").route for form in ("onnx", "openvino")}
        assert routes == {"onnx": "onnxruntime", "openvino": "openvino"}

    def test_what_is_no_model(self, tmp_path: Path) -> None:
        pytest.importorskip("openvino")
        (tmp_path / "broken.xml").write_text("no model")
        with pytest.raises(ModelError, match=r"broken\.xml'"):
            load(parse(str(tmp_path / "broken.xml")), 1, CPU)
