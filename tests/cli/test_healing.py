"""`compress --train --distill` without labels: an encoder that learns from its original, resumable."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers as tf
from safetensors.torch import load_file
from tests.cli.conftest import WORDS
from tests.cli.test_commands import result_of
from tests.cli.test_errors import check
from tests.conftest import ROOT
from tokenizers import Tokenizer

import factorformer
from factorformer.cli._jobs import compress as job
from factorformer.errors import DivergedError
from factorformer.hf.source import load_tokenizer
from factorformer.layers.nn import FactorizedMatrix
from factorformer.structures import DenseSparse
from factorformer.tasks import healing
from factorformer.training.distillation import mean_pool

OPTIONS = ("--ratio", 3, "--int8", "--scope", "all", "--batch-size", 4, "--lr", 5e-3, "--json")


@pytest.fixture
def command(base: Path, tables: Path, tmp_path: Path) -> tuple[Any, ...]:
    return ("compress", base, tmp_path / "small", "--train", tables / "texts.txt", "--distill", base, *OPTIONS)


def test_time_is_kept_and_the_way_is_shown(run: Any, command: tuple[Any, ...], tmp_path: Path) -> None:
    done = run(*command, "--minutes", 0.02)
    content = result_of(done)
    assert done.stderr.count("neighbour recall") >= 1
    assert content["seconds"]["train"] >= 1.2
    assert {"embedding_cosine", "similarity_spearman", "neighbour_recall"} <= set(content["metrics"])
    assert factorformer.load(tmp_path / "small").config.model_type == "bert"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]  # nothing of the run is left


def test_an_interrupted_run_goes_on(
    run: Any, command: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = result_of(run(*command, "--epochs", 4))["metrics"]
    lines = []

    def interrupting(line: str) -> None:
        lines.append(line)
        if len([line for line in lines if "neighbour recall" in line]) == 3:
            raise KeyboardInterrupt

    again = ("--epochs", 4, "--overwrite")
    with monkeypatch.context() as patched:
        patched.setattr(job, "note", interrupting)
        stopped = run(*command, *again)
    assert stopped.exit_code == 130
    assert "add --resume" in stopped.stderr
    assert (tmp_path / ".small.training" / "plan.json").exists()
    refused = run(*command, "--epochs", 4)
    assert refused.exit_code == 2
    assert "exists already" in refused.stderr
    for changed, said in (
        (("--epochs", 5), "epochs was 4.0, not 5.0"),
        (("--epochs", 4, "--seed", 1), "seed was 0, not 1"),
    ):
        refused = run(*command, *changed, "--overwrite", "--resume")
        assert refused.exit_code == 2
        assert f"the interrupted run had other options: {said}; repeat" in " ".join(refused.stderr.split())
    monkeypatch.setattr(job.compression, "plan", lambda *_, **__: pytest.fail("planned again"))
    monkeypatch.setattr(job.compression, "compress", lambda *_, **__: pytest.fail("fitted again"))
    resumed = run(*command, *again, "--resume")
    assert "resumed from step" in resumed.stderr
    assert result_of(resumed)["metrics"]["embedding_cosine"] == pytest.approx(once["embedding_cosine"], abs=0.01)
    assert not (tmp_path / ".small.training").exists()


def test_a_fit_outlasts_an_interruption_of_the_first_steps(
    run: Any, command: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*command, "--method", "dense_sparse_plain", "--ratio", 6, "--epochs", 2, "--overwrite"]
    once = result_of(run(*arguments))["metrics"]
    with monkeypatch.context() as patched:
        patched.setattr(healing, "finish", lambda *_: _stop())
        stopped = run(*arguments)
    assert stopped.exit_code == 130
    assert "add --resume" in stopped.stderr
    monkeypatch.setattr(job.compression, "plan", lambda *_, **__: pytest.fail("planned again"))
    monkeypatch.setattr(job.compression, "compress", lambda *_, **__: pytest.fail("fitted again"))
    resumed = run(*arguments, "--resume")
    assert "resumed from step 0" in resumed.stderr
    assert result_of(resumed)["metrics"] == pytest.approx(once, abs=1e-3)
    specs = {m.spec for m in factorformer.load(tmp_path / "small").modules() if isinstance(m, FactorizedMatrix)}
    assert any(isinstance(spec, DenseSparse) for spec in specs)  # whose supports are not trained, but restored


def test_a_run_that_diverges_from_the_start_leaves_nothing(
    run: Any, command: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*_: object) -> None:
        raise DivergedError("training diverged")

    monkeypatch.setattr(healing, "finish", diverge)
    done = run(*command, "--epochs", 1)
    assert done.exit_code == 2
    assert "diverged" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_cross_encoder_learns_its_own_scores(run: Any, base: Path, tables: Path, tmp_path: Path) -> None:
    rows = tables / "train.jsonl"
    scorer = ("finetune", base, tmp_path / "scorer", "--train", rows, "--text", "text", "--text", "other")
    done = run(*scorer, "--label", "score", "--task", "regression", "--epochs", 8, "--batch-size", 4, "--lr", 3e-3)
    assert done.exit_code == 0, done.stderr
    pairs = ("--train", rows, "--text", "text", "--text", "other", "--distill", tmp_path / "scorer")
    arguments = (
        "compress",
        tmp_path / "scorer",
        tmp_path / "small",
        *pairs,
        "--ratio",
        3,
        "--int8",
        "--epochs",
        6,
        "--eval",
        rows,
    )
    done = run(*arguments, "--batch-size", 4, "--lr", 3e-3, "--json")
    content = result_of(done)
    assert "score spearman" in done.stderr
    assert {"score_spearman", "score_pearson"} <= set(content["metrics"])
    assert "embedding_cosine" not in content["metrics"]
    assert type(factorformer.load(tmp_path / "small")).__name__ == "BertForSequenceClassification"


def test_moving_ranks_go_on_too(
    run: Any, command: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [part for part in command if part not in ("--int8", "--scope", "all")]
    arguments += ["--method", "rankdyna", "--epochs", 8]
    once = result_of(run(*arguments))
    points = []

    def interrupting(line: str) -> None:
        points.append("neighbour recall" in line)
        if sum(points) == 8:  # ranks have moved
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(job, "note", interrupting)
        assert run(*arguments, "--overwrite").exit_code == 130
    checkpoints = tmp_path / ".small.training" / "checkpoints"
    newest = max(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    (newest / "dynamic_rank.safetensors").unlink()  # as if the process had ended before it was written
    resumed = run(*arguments, "--overwrite", "--resume")
    assert f"resumed from step {newest.name.rpartition('-')[2]}" not in resumed.stderr
    content = result_of(resumed)
    assert content["bytes"] == once["bytes"]
    assert content["metrics"]["embedding_cosine"] == pytest.approx(once["metrics"]["embedding_cosine"], abs=0.02)


def test_a_model_that_was_saved_is_not_trained_again(
    run: Any, command: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = job.compare
    monkeypatch.setattr(job, "compare", lambda before, after: compared(before, None) if after is None else _stop())
    done = run(*command, "--epochs", 1)
    assert done.exit_code == 130
    assert "complete in" in done.stderr
    assert "--resume" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]
    factorformer.load(tmp_path / "small")


def _stop() -> None:
    raise KeyboardInterrupt


def test_each_is_pooled_as_its_directory_says(
    run: Any, command: tuple[Any, ...], base_copy: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pooling = base_copy / "1_Pooling" / "config.json"
    pools: dict[str, Any] = {}

    def remember(*args: Any, **kwargs: Any) -> list[dict[str, float]]:
        target = kwargs["target"]
        for name in ("pool", "teacher_pool"):
            pool = getattr(target, name)
            pools[name] = ("mean",) if pool is mean_pool else pool.__self__.pooling.modes
        return [{"seconds": 0.0}]

    monkeypatch.setattr(job, "heal", remember)
    arguments = [base_copy if part == base and place < 3 else part for place, part in enumerate(command)]
    for mode, prompts, expected in (("cls", True, ("cls",)), ("max", False, ("max",))):
        pooling.write_text(json.dumps({"pooling_mode": mode, "include_prompt": prompts}))
        result_of(run(*arguments, "--epochs", 1, "--overwrite"))
        assert pools == {"pool": expected, "teacher_pool": ("mean",)}
    pooling.write_text(json.dumps({"pooling_mode": "middletoken"}))
    check(run(*arguments, "--epochs", 1, "--overwrite"), "what embeddings .* is not known.*middletoken")


def test_plans_and_fits_go_by_what_is_pooled(
    run: Any, base: Path, base_copy: Path, tables: Path, tmp_path: Path
) -> None:
    (base_copy / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "cls"}))
    options = ("--calibration", tables / "texts.txt", "--ratio", 3, "--json")
    metrics = {}
    for name, source in (("mean", base), ("cls", base_copy)):
        metrics[name] = result_of(run("compress", source, tmp_path / name, *options))["metrics"]
        plan = run("plan", source, *options, "--output", tmp_path / f"{name}.json")
        predicted = result_of(plan, layers=True)["metrics"]["predicted_cosine_loss"]
        assert predicted == pytest.approx(metrics[name]["predicted_cosine_loss"], rel=1e-4)
    assert metrics["cls"]["predicted_cosine_loss"] != pytest.approx(metrics["mean"]["predicted_cosine_loss"], rel=0.02)
    fitted = {}
    for name, source in (("mean", base), ("cls", base_copy)):
        plan = ("--plan", tmp_path / "mean.json", "--calibration", tables / "texts.txt", "--overwrite")
        assert run("compress", source, tmp_path / name, *plan).exit_code == 0
        fitted[name] = load_file(tmp_path / name / "model.safetensors")
    assert fitted["mean"].keys() == fitted["cls"].keys()
    assert any(not torch.allclose(fitted["mean"][key], fitted["cls"][key], rtol=0.05) for key in fitted["mean"])


@pytest.mark.parametrize("kind", ["Qwen3ForCausalLM", "T5ForConditionalGeneration"])
def test_encoders_that_were_taken_from_other_models(run: Any, kind: str, base_copy: Path, tables: Path) -> None:
    """As Qwen3-Embedding and sentence-t5 are: config.json names a model that goes on with text."""
    sizes = {"vocab_size": len(WORDS), "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    if kind.startswith("T5"):
        config: Any = tf.T5Config(vocab_size=len(WORDS), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
        config.decoder_start_token_id = 0
    else:
        config = tf.Qwen3Config(**sizes, intermediate_size=64, num_key_value_heads=4, head_dim=8)
    for file in ("config.json", "model.safetensors"):
        (base_copy / file).unlink()
    getattr(tf, kind)(config).save_pretrained(base_copy)
    output = base_copy.parent / "small"
    texts = tables / "texts.txt"
    options = ("--method", "svd", "--ratio", 1.5, "--epochs", 1, "--batch-size", 8, "--json")
    content = result_of(run("compress", base_copy, output, "--train", texts, "--distill", base_copy, *options))
    assert 0 < content["metrics"]["embedding_cosine"] <= 1
    assert "perplexity" not in content["metrics"]
    again = run("evaluate", output, "--against", base_copy, "--data", texts, "--json")
    assert 0 < result_of(again)["metrics"]["texts_embedding_cosine"] <= 1


@pytest.mark.parametrize("method", ["dsformer", "rankdyna"])
def test_supports_and_ranks_move_by_time(run: Any, command: tuple[Any, ...], tmp_path: Path, method: str) -> None:
    arguments = [part for part in command if part not in ("--int8", "--scope", "all", "--lr", 5e-3)]
    done = run(*arguments, "--method", method, "--minutes", 0.02)
    content = result_of(done)
    if method == "rankdyna":  # which starts from the whole model, no distance from the original
        assert "learning rate 0.0005" in done.stderr
    assert content["method"] == method
    assert content["bytes"]["ratio"] == pytest.approx(3, rel=0.05)
    factorformer.load(tmp_path / "small")


def test_what_time_and_checkpoints_are_not_for(
    run: Any, base: Path, trained: Path, tables: Path, tmp_path: Path
) -> None:
    labelled = ("compress", trained, tmp_path / "small", "--train", tables / "train.jsonl", "--label", "label")
    plain = ("compress", base, tmp_path / "small", "--calibration", tables / "texts.txt")
    for arguments, message in (
        ((*labelled, "--minutes", 1), "--minutes"),
        ((*labelled, "--resume"), "--resume"),
        ((*plain, "--resume"), "--resume"),
        (
            ("compress", base, tmp_path / "small", "--train", tables / "texts.txt", "--distill", base, "--resume"),
            "no inter",
        ),
    ):
        done = run(*arguments)
        assert done.exit_code == 2, arguments
        assert message in done.stderr
    done = run(*plain[:3], "--train", tables / "two.txt", "--distill", base, "--minutes", 1, "--epochs", 2)
    assert "not used beside --minutes: --epochs" in done.stderr
    done = run(*plain, "--minutes", 1, "--ratio", 2)
    assert done.exit_code == 0
    assert "not used without --train: --minutes" in done.stderr


def test_shared_layers_and_a_small_vocabulary(run: Any, base: Path, tables: Path, tmp_path: Path) -> None:
    text, whole = tmp_path / "text.txt", stored(base)
    text.write_text("".join(f"a {word} film\n" for word in ("good", "bad", "fine", "poor")) * 10)
    arguments = ("compress", base, tmp_path / "small", "--train", text, "--distill", base, "--scope", "all", "--int8")
    less = ("--unique-layers", 1, "--trim-vocabulary", text, "--ratio", 6, "--epochs", 4, "--batch-size", 4)
    done = run(*arguments, *less, "--json")
    content = result_of(done)
    assert "vocabulary: 11 of 18 tokens are kept" in done.stderr
    assert content["bytes"]["original"] == whole
    assert content["bytes"]["ratio"] == pytest.approx(6, rel=0.02)
    assert stored(tmp_path / "small") == pytest.approx(whole / 6, rel=0.02)
    model, tokenizer = factorformer.load(tmp_path / "small"), load_tokenizer(tmp_path / "small")
    assert model.config.vocab_size == len(tokenizer) == 11
    assert tokenizer("a good film")["input_ids"][1:-1] != load_tokenizer(base)("a good film")["input_ids"][1:-1]
    assert model.encoder.layer[0].output.dense.weight is model.encoder.layer[1].output.dense.weight
    again = run("evaluate", tmp_path / "small", "--against", base, "--data", text, "--json")
    found = result_of(again)["metrics"]["text_embedding_cosine"]
    assert found == pytest.approx(content["metrics"]["embedding_cosine"], abs=0.02)
    for wrong, message in (
        (("--unique-layers", 1), "--int8 or --int4"),
        (("--unique-layers", 2, "--int8"), "fewer than the 2"),
        (("--int8", "--int4"), "two widths"),
    ):
        done = run("compress", base, tmp_path / "other", "--ratio", 6, *wrong)
        assert done.exit_code == 2
        assert message in done.stderr


def test_the_original_reads_all_of_its_tokens(run: Any, base: Path, tables: Path, tmp_path: Path) -> None:
    """Where the text that a vocabulary is cut to is not the text that is learned from."""
    text, small = tmp_path / "text.txt", tmp_path / "small"
    text.write_text("a film\n" + "the " * 200 + "book\n")  # the last word is beyond what the model reads
    learned = ("--train", tables / "texts.txt", "--eval", tables / "texts.txt", "--distill", base)
    options = ("--trim-vocabulary", text, "--scope", "all", "--int4", "--ratio", 7, "--epochs", 2, "--batch-size", 4)
    done = run("compress", base, small, *learned, *options, "--json")
    content = result_of(done)
    assert "vocabulary: 9 of 18 tokens are kept" in done.stderr  # four words and the special ones
    found = result_of(run("evaluate", small, "--against", base, "--data", tables / "texts.txt", "--json"))
    assert content["metrics"]["embedding_cosine"] == pytest.approx(found["metrics"]["texts_embedding_cosine"], abs=1e-4)
    assert found["bytes"]["original"] == content["bytes"]["original"] == stored(base)
    # And so do users of sentence-transformers, who read them as before.
    from sentence_transformers import SentenceTransformer

    texts = (tables / "texts.txt").read_text().splitlines()
    one, other = (
        SentenceTransformer(str(path), device="cpu").encode(texts, convert_to_tensor=True, normalize_embeddings=True)
        for path in (base, small)
    )
    cosine = float((one * other).sum(1).mean())
    assert cosine == pytest.approx(found["metrics"]["texts_embedding_cosine"], abs=1e-4)


def test_the_example_does_what_the_command_does(
    base: Path, tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["encoder.py", str(base), str(tables / "texts.txt"), "0.02"])
    said = runpy.run_path(str(ROOT / "examples" / "encoder.py"))
    assert said["curve"][-1]["embedding_cosine"] > 0.5
    again = factorformer.load(tmp_path / "encoder")
    assert {m.bits for m in again.modules() if isinstance(m, FactorizedMatrix)} <= {3, 4, 8}
    assert stored(tmp_path / "encoder") == pytest.approx(stored(base) / 10, rel=0.1)
    assert (tmp_path / "encoder" / "modules.json").exists()
    with pytest.raises(SystemExit, match="exists already"):
        runpy.run_path(str(ROOT / "examples" / "encoder.py"))


def test_texts_are_read_as_the_directory_says(
    run: Any, command: tuple[Any, ...], base: Path, base_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {"prompts": {"query": "the good ", "passage": "a "}, "default_prompt_name": "query"}
    (base_copy / "config_sentence_transformers.json").write_text(json.dumps(said))
    (base_copy / "sentence_bert_config.json").write_text('{"max_seq_length": 99, "do_lower_case": true}')
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{word} BOOK\n" for word in ("Bad", "FINE", "poor")) * 10 + "book " * 40)
    arguments = [{base: base_copy, command[4]: text}.get(part, part) for part in command]
    seen: list[list[int]] = []

    def remember(model: Any, teacher: Any, data: Any, *args: Any, **kwargs: Any) -> list[dict[str, float]]:
        seen.extend(data["input_ids"])
        return [{"seconds": 0.0}]

    with monkeypatch.context() as patched:
        patched.setattr(job, "heal", remember)
        done = run(*arguments)
    assert "texts begin with 'the good '" in done.stderr
    assert "1 of 31 rows have 24 tokens or more" in done.stderr  # which are all that there are positions for
    tokenizer = load_tokenizer(base)
    known = {tuple(tokenizer(f"the good {word} book")["input_ids"]) for word in ("bad", "fine", "poor")}
    assert {tuple(ids) for ids in seen if len(ids) < 24} <= known
    measured = run("evaluate", tmp_path / "small", "--against", base_copy, "--data", text, "--json")
    assert measured.stderr.count("texts begin with 'the good '") == 2
    done = run(*arguments, "--trim-vocabulary", text, "--epochs", 1, "--overwrite")
    assert done.exit_code == 0, done.stderr
    kept = load_tokenizer(tmp_path / "small").get_vocab()
    assert {"the", "good", "a", "bad", "book"} <= kept.keys()
    assert "film" not in kept


def test_a_teacher_of_other_tokens_is_refused(run: Any, command: tuple[Any, ...], base: Path, base_copy: Path) -> None:
    tokenizer = tf.BertTokenizer(vocab={word: place for place, word in enumerate([*WORDS[:5], *WORDS[:4:-1]])})
    tokenizer.save_pretrained(base_copy)
    arguments = [*command[:6], base_copy, *command[7:]]
    check(run(*arguments, "--epochs", 1), "the teacher .*copy' knows other tokens than the model")


def test_rerankers_read_what_they_can(run: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = tf.BertConfig(vocab_size=len(WORDS), max_position_embeddings=300, num_labels=1, **sizes)
    tf.BertForSequenceClassification(config).save_pretrained(tmp_path / "scorer")
    load_tokenizer(base).save_pretrained(tmp_path / "scorer")
    seen: list[int] = []

    def remember(model: Any, teacher: Any, data: Any, *args: Any, **kwargs: Any) -> list[dict[str, float]]:
        seen.extend(data["length"])
        return [{"seconds": 0.0}]

    monkeypatch.setattr(job, "heal", remember)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"q": "a film", "p": "the book " * n}) + "\n" for n in range(100, 150)))
    pairs = ("--train", rows, "--text", "q", "--text", "p", "--distill", tmp_path / "scorer")
    done = run("compress", tmp_path / "scorer", tmp_path / "small", *pairs, "--ratio", 2, "--calibration-rows", 8)
    assert done.exit_code == 0, done.stderr
    assert max(seen) == 300
    assert min(seen) > 200


def test_two_columns_of_an_encoder_are_two_texts(
    run: Any, command: tuple[Any, ...], tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, int] = {}

    def remember(model: Any, teacher: Any, data: Any, *args: Any, held: Any, **kwargs: Any) -> list[dict[str, float]]:
        learned, kept = ({*map(tuple, rows["input_ids"])} for rows in (data, held))
        assert not learned & kept
        seen.update(rows=len(data) + len(held), longest=max(data["length"]))
        return [{"seconds": 0.0}]

    monkeypatch.setattr(job, "heal", remember)
    rows = tables / "train.jsonl"
    arguments = [rows if part == tables / "texts.txt" else part for part in command]
    done = run(*arguments, "--text", "text", "--text", "other")
    assert "each by itself" in done.stderr
    most = 2 * len(rows.read_text().splitlines())
    assert seen["longest"] == 5
    assert 0.9 * most <= seen["rows"] <= most  # without those that are held out as well


def test_a_multilingual_encoder_is_mostly_its_vocabulary(run: Any, tmp_path: Path) -> None:
    words = {
        "en": ("a", "good", "bad", "film", "book"),
        "de": ("ein", "gutes", "schlechtes", "Stück", "Buch"),
        "ru": ("вот", "хороший", "плохой", "фильм", "роман"),
        "ja": ("この", "良い", "悪い", "映画", "本"),
    }
    lines = [f"{a} {b} {c}" for one in words.values() for a in one for b in one for c in one[2:]]
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    made = Tokenizer(tokenizers.models.Unigram())
    made.pre_tokenizer, made.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(special_tokens=special, unk_token="<unk>", vocab_size=110)
    made.train_from_iterator(lines, trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), special, strict=True))
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=made, **names, cls_token="<s>", sep_token="</s>")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = tf.XLMRobertaConfig(**sizes, vocab_size=len(tokenizer), max_position_embeddings=40, pad_token_id=1)
    base, text, output = tmp_path / "base", tmp_path / "text.txt", tmp_path / "small"
    tf.XLMRobertaModel(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    text.write_text("".join(f"{line}\n" for line in lines if not line.isascii()), encoding="utf-8")
    arguments = ("compress", base, output, "--train", text, "--distill", base, "--int4", "--scope", "all")
    content = result_of(run(*arguments, "--trim-vocabulary", text, "--ratio", 8, "--epochs", 2, "--json"))
    assert content["bytes"]["original"] == stored(base)
    assert stored(output) == pytest.approx(stored(base) / 8, rel=0.02)
    small = load_tokenizer(output)
    assert len(small) == factorformer.load(output).config.vocab_size < len(tokenizer)
    for line in (lines[-1], lines[40]):
        assert small.decode(small(line)["input_ids"], skip_special_tokens=True) == line
    metrics = result_of(run("evaluate", output, "--against", base, "--data", text, "--json"))["metrics"]
    assert metrics["text_embedding_cosine"] > 0.5


def stored(folder: Path) -> int:
    return sum(t.numel() * t.element_size() for t in load_file(folder / "model.safetensors").values())
