"""`factorformer train`: translations and language models from scratch, resumed runs, and everything it refuses."""

from __future__ import annotations

import errno
import inspect
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli.test_commands import result_of
from tests.cli.test_errors import check
from transformers import AutoTokenizer, PreTrainedModel
from typer.testing import CliRunner

import factorformer
from factorformer.cli._jobs import train as job
from factorformer.cli.app import app
from factorformer.cli.train import train
from factorformer.errors import ModelError
from factorformer.tasks import translation
from factorformer.tasks.checkpoints import last_checkpoint, locked
from factorformer.tasks.from_scratch import ScratchSettings
from factorformer.tasks.trainer import Watch

NUMBERS = {"eins": "one", "zwei": "two", "drei": "three", "vier": "four", "fünf": "five", "sechs": "six"}
TINY = {
    "marian": ["d_model=32", "encoder_layers=1", "decoder_layers=1", "encoder_ffn_dim=64", "decoder_ffn_dim=64"],
    "t5": ["d_model=32", "num_layers=1", "num_decoder_layers=1", "d_ff=64", "d_kv=8"],
    "gpt2": ["n_embd=32", "n_layer=2", "n_positions=40"],
    "llama": ["hidden_size=32", "num_hidden_layers=2", "intermediate_size=64"],
    "bert": ["hidden_size=32", "num_hidden_layers=2", "intermediate_size=64", "max_position_embeddings=40"],
}
HALFWAY = ("whole", "new")
PAIRS = ("--source", "train.de", "--target", "train.en")


def fields(config: str) -> list[str]:
    return [part for field in TINY[config] for part in ("--set", field)]


def options(config: str, *others: object) -> list[object]:
    """A tiny model, trained for a moment."""
    common = ("--vocabulary", 275, "--max-length", 16, "--ratio", 1.5, "--batch-size", 16, "--steps", 6)
    return ["--config", config, *fields(config), *common, *others]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small parallel text, and plain text as lines and as a table."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    rows = [draw.choices(list(NUMBERS), k=draw.randint(2, 6)) for _ in range(80)]
    for name, part in (("train", rows), ("dev", rows[:12]), ("short", rows[:20])):
        (folder / f"{name}.de").write_text("".join(" ".join(row) + "\n" for row in part), encoding="utf-8")
        english = [" ".join(NUMBERS[word] for word in row) for row in part]
        (folder / f"{name}.en").write_text("".join(f"{text}\n" for text in english), encoding="utf-8")
    lines = (folder / "train.en").read_text().splitlines()
    (folder / "text.txt").write_text("\n\n".join(lines) + "\n")
    (folder / "rows.jsonl").write_text("".join(json.dumps({"body": line, "text": None}) + "\n" for line in lines))
    (folder / "blank.txt").write_text("\n \n\n")
    return folder


@pytest.fixture(autouse=True)
def _in_the_corpus(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(corpus)


def saved(result: dict[str, Any]) -> tuple[PreTrainedModel, Any]:
    path = Path(result["output"])
    assert json.loads((path / "factorformer.json").read_text()) == result
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name]
    return factorformer.load(path).eval(), AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize(("config", "method"), [("marian", "shapeshifter"), ("t5", "svd"), ("marian", "dense")])
def test_a_translation(run: Any, tmp_path: Path, config: str, method: str) -> None:
    chosen = options(config, "--method", method, "--steps", 3)
    if method == "dense":
        del chosen[chosen.index("--ratio") : chosen.index("--ratio") + 2]
    done = run(
        "train", tmp_path / "new", *PAIRS, "--eval-source", "dev.de", "--eval-target", "dev.en", *chosen, "--json"
    )
    content = result_of(done)
    assert content["bytes"]["ratio"] == pytest.approx(1 if method == "dense" else 1.5, rel=0.01)
    assert (content["scope"], content["method"]) == ("all", None if method == "dense" else method)
    assert {"loss", "perplexity", "token_accuracy", "bleu", "chrf", "vocabulary", "texts"} == set(content["metrics"])
    assert content["metrics"]["texts"] == 80
    model, tokenizer = saved(content)
    assert model.config.model_type == config
    assert model.generation_config.max_length == 16
    sources, references = (Path(name).read_text(encoding="utf-8").splitlines() for name in ("dev.de", "dev.en"))
    again = translation.bleu(translation.translate(model, tokenizer, sources, max_length=16), references)
    assert again["bleu"] == content["metrics"]["bleu"]
    curve = json.loads((tmp_path / "new" / "training.json").read_text())["curve"]
    assert [row["step"] for row in curve] == [1, 2, 3]


@pytest.mark.parametrize("config", ["gpt2", "llama", "bert"])
def test_a_language_model(run: Any, tmp_path: Path, config: str) -> None:
    content = result_of(run("train", tmp_path / "new", "--train", "text.txt", *options(config, "--steps", 2), "--json"))
    assert content["bytes"]["ratio"] == pytest.approx(1.5, rel=0.01)
    known = set() if config == "bert" else {"tokens", "window", "stride", "bits_per_byte"}
    assert {"loss", "perplexity", "token_accuracy", "vocabulary", "texts"} | known == set(content["metrics"])
    assert (content["metrics"]["vocabulary"], content["metrics"]["texts"]) == (275, 72)  # a tenth is held out
    model, tokenizer = saved(content)
    assert len(tokenizer) == model.get_input_embeddings().num_embeddings == 275
    assert (tokenizer.mask_token is None) == (config != "bert")
    with torch.inference_mode():
        assert model(**tokenizer("one two", return_tensors="pt")).logits.isfinite().all()


def test_the_table_and_a_column_of_a_table_in_the_place_of_another_output(run: Any, tmp_path: Path) -> None:
    data = ("--train", "rows.jsonl", "--eval", "rows.jsonl", "--text", "body")
    command = (
        "train",
        tmp_path / "new",
        *data,
        *options("gpt2", "--steps", 2, "--precision", "bf16", "--device", "cpu"),
    )
    # In a place where something is.
    (tmp_path / "new").mkdir()
    check(run(*command), "exists already")
    done = run(*command, "--overwrite")
    assert done.exit_code == 0, done.stderr
    assert "method shapeshifter" in done.stdout
    assert "perplexity" in done.stdout
    assert next(factorformer.load(tmp_path / "new").parameters()).dtype == torch.float32


def test_a_dry_run_shows_the_plan_and_writes_nothing(run: Any, tmp_path: Path) -> None:
    content = result_of(run("train", tmp_path / "new", *PAIRS, *options("marian"), "--dry-run", "--json"), layers=True)
    assert content["bytes"]["ratio"] == pytest.approx(1.5, rel=0.01)
    assert content["output"] is None
    structures = [layer["structure"] for layer in content["layers"]]
    assert any("kronecker_sum" in (structure or {}).values() for structure in structures)
    assert list(tmp_path.iterdir()) == []


def test_training_is_reproducible(run: Any, tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        result_of(
            run(
                "train",
                tmp_path / name,
                "--train",
                "text.txt",
                *options("gpt2", "--steps", 2, "--seed", seed),
                "--json",
            )
        )
    first, same, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert first == same != other


def test_default_settings_are_those_of_the_library() -> None:
    settings, parameters = ScratchSettings(), inspect.signature(train).parameters
    names = {"epochs": "epochs", "batch_size": "batch_size", "seed": "seed", "steps": "steps"}
    for name, option in names.items():
        assert parameters[option].default == getattr(settings, name)
    assert parameters["precision"].default.value == settings.precision


# Interruptions


def test_a_run_without_a_checkpoint_leaves_nothing_to_resume(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("train", tmp_path / "new", "--train", "text.txt", *options("gpt2", "--steps", 100_000))
    check(run(*command, "--resume"), "leave --resume out")

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    # Before training, and in it: 5,000 steps lie before its first checkpoint.
    for place in ("factorformer.cli._jobs.train.Architecture.of", "factorformer.tasks.trainer.Watch.on_step_end"):
        with monkeypatch.context() as patch:
            patch.setattr(place, stop)
            done = run(*command)
        assert done.exit_code == 130
        assert done.stderr.splitlines()[-1] == "interrupted; nothing was written"
        assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def halfway(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole run, and one that was interrupted after its fourth step, which has a checkpoint."""
    folder, runner, watch = tmp_path_factory.mktemp("halfway"), CliRunner(), Watch.on_step_end

    def stop(self: Any, args: Any, state: Any, control: Any, **others: Any) -> None:
        watch(self, args, state, control, **others)
        if state.global_step == 5:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(corpus)
        commands = [[str(part) for part in ("train", folder / name, *PAIRS, *options("marian"))] for name in HALFWAY]
        assert runner.invoke(app, commands[0], catch_exceptions=False).exit_code == 0
        patch.setattr(Watch, "on_step_end", stop)
        done = runner.invoke(app, commands[1], catch_exceptions=False)
    assert done.exit_code == 130
    assert "add --resume" in done.stderr.splitlines()[-1]
    assert sorted(path.name for path in folder.iterdir()) == [".new.training", "whole"]
    return folder


@pytest.fixture
def interrupted(halfway: Path, tmp_path: Path) -> list[object]:
    """The command whose run was interrupted, in a copy of its folder."""
    shutil.copytree(halfway, tmp_path, dirs_exist_ok=True)
    return ["train", tmp_path / "new", *PAIRS, *options("marian")]


def test_a_resumed_run_ends_as_if_it_had_not_been_interrupted(
    run: Any, tmp_path: Path, interrupted: list[object]
) -> None:
    check(run(*interrupted), "interrupted.*--resume")
    check(run(*interrupted, "--lr", 0.5), "--resume.*--overwrite")
    check(run(*interrupted, "--lr", 0.5, "--resume"), r"learning_rate was 0\.002, not 0\.5")
    done = run(*interrupted, "--resume")
    assert done.exit_code == 0, done.stderr
    assert "resumed from step 4" in done.stderr
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "new")]
    assert weights[0] == weights[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "whole"]


def test_an_interrupted_run_can_be_started_anew(run: Any, tmp_path: Path, interrupted: list[object]) -> None:
    (tmp_path / ".new.training" / "options.json").write_text("{")
    check(run(*interrupted, "--resume"), "cannot read.*run")
    done = run(*interrupted, "--overwrite", "--steps", 2)
    assert done.exit_code == 0, done.stderr
    assert "resumed" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "whole"]


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--source and --target.*--train"),
        (["--text", "text.txt"], "--train.*--text names a column"),
        (["--source", "train.de"], "--source alone"),
        (["--target", "train.en"], "--target alone"),
        ([*PAIRS, "--eval-source", "dev.de"], "--eval-source alone.*--eval-target"),
        (["--train", "text.txt", "--eval-source", "dev.de", "--eval-target", "dev.en"], "--eval-source.*translations"),
        ([*PAIRS, "--train", "text.txt"], "--train.*language models"),
        ([*PAIRS, "--config", "bert"], "'bert'.*--train"),
        (["--train", "text.txt", "--config", "t5"], "'t5'.*pairs"),
        ([*PAIRS, "--config", "marain"], "'marain'.*'marian'"),
        ([*PAIRS, "--set", "dmodel=3"], "MarianConfig.*'dmodel'.*'d_model'"),
        ([*PAIRS, "--method", "whitened"], "svd, kronecker, dense_sparse_plain, shapeshifter, dense"),
        ([*PAIRS, "--method", "shapeshift"], "'shapeshift'.*'shapeshifter'"),
        ([*PAIRS, "--method", "dense", "--ratio", "3"], "--method dense"),
        ([*PAIRS, "--vocabulary", "20"], " 20 tokens.*small"),
        ([*PAIRS, "--vocabulary", "5000"], "fewer tokens.*more text"),
        ([*PAIRS, *fields("marian"), "--vocabulary", "300", "--ratio", "1000"], "ask for at most"),
        ([*PAIRS, *fields("marian"), "--vocabulary", "300", "--include", "*.nothing"], "nothing'.*no"),
        (["--source", "train.de", "--target", "dev.en"], "80 lines.*'dev.en' has 12"),
        (
            ["--source", "short.de", "--target", "short.en"],
            "too few.*--eval-s",
        ),
        (["--source", "nothing.de", "--target", "dev.en"], r"'nothing\.de'"),
        (["--train", "rows.jsonl", "--text", "bdy"], r"rows\.jsonl.*'bdy'.*'body'"),
        (["--train", "rows.jsonl"], "'rows.jsonl', line 1, column 'text': no text"),
        (["--train", "blank.txt"], r"'blank\.txt'.*empty"),
        (["--train", "rows.jsonl", "--text", "text", "--text", "body"], "language model.*single text"),
        ([*PAIRS, "--dry-run", "--resume"], "--dry-run.*--resume"),
        (["--train", "text.txt", *map(str, options("gpt2")), "--max-length", "60"], " 40 positions"),
    ],
)
def test_what_is_refused(run: Any, tmp_path: Path, arguments: list[str], message: str) -> None:
    check(run("train", tmp_path / "new", *arguments), message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda"], "CUDA.*cpu or auto"),
        (["--precision", "fp16"], "fp16.*GPU.*bf16 or fp32"),
    ],
)
def test_what_needs_a_gpu(run: Any, tmp_path: Path, arguments: list[str], message: str) -> None:
    check(run("train", tmp_path / "new", *PAIRS, *arguments), message)


def test_a_full_disk_at_the_end_costs_no_training(
    run: Any, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["train", tmp_path / "new", *PAIRS, *options("marian", "--steps", 2)]

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(job, "write", full)
    done = run(*command)
    assert done.exit_code == 2
    assert "No space left" in done.stderr
    assert "--resume" in done.stderr
    monkeypatch.undo()
    monkeypatch.chdir(corpus)
    assert not (tmp_path / "new").exists()
    done = run(*command, "--resume")
    assert done.exit_code == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_dry_run_beside_an_interrupted_run_trains_its_own_tokenizer(run: Any, interrupted: list[object]) -> None:
    done = run(*interrupted, "--dry-run", "--vocabulary", 265, "--json")
    assert json.loads(done.stdout)["metrics"]["vocabulary"] == 265


def test_a_run_that_diverges_keeps_its_checkpoints_and_says_so(run: Any, tmp_path: Path) -> None:
    done = run("train", tmp_path / "new", "--train", "text.txt", *options("gpt2", "--lr", 1e30, "--steps", 3))
    check(done, "lower the learning rate")
    checkpoints = tmp_path / ".new.training" / "checkpoints"
    assert f"kept in '{checkpoints}'" in done.stderr
    assert last_checkpoint(checkpoints) is not None
    assert [path.name for path in tmp_path.iterdir()] == [".new.training"]


def test_no_failure_deletes_checkpoints(
    run: Any, tmp_path: Path, interrupted: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ".new.training"

    def content() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    (folder / "checkpoints" / "checkpoint-6").mkdir()  # whose writing was interrupted
    before = content()
    # A resumed run that cannot read its tokenizer, or whose architecture is out of reach.
    for broken in ("load_tokenizer", "Architecture.of"):

        def fail(*_: object) -> None:
            raise ModelError("out of reach")

        with monkeypatch.context() as patch:
            patch.setattr(f"factorformer.cli._jobs.train.{broken}", fail)
            done = run(*interrupted, "--resume")
        check(done, "out of reach")
        assert "--resume" in done.stderr
        assert content() == before
    # A new run in its place that fails before it has a checkpoint of its own.
    for wrong in (("--vocabulary", 5000), ("--include", "*.nothing")):
        done = run(*interrupted, "--overwrite", *wrong)
        check(done, "nothing" if "--include" in wrong else "vocabulary")
        assert "as it was" in done.stderr
        assert content() == before
    assert [path.name for path in tmp_path.iterdir() if path.name != "whole"] == [".new.training"]
    assert run(*interrupted, "--resume").exit_code == 0


def test_a_second_process_is_kept_out(run: Any, tmp_path: Path) -> None:
    command = ("train", tmp_path / "new", *PAIRS, *options("marian"))
    with locked(tmp_path / ".new.training.lock"):
        check(run(*command), "another process")
    (tmp_path / ".new.training").mkdir()
    (tmp_path / ".new.training" / "mine.txt").write_text("not a run")
    check(run(*command), "no run")
    assert (tmp_path / ".new.training" / "mine.txt").read_text() == "not a run"


def test_numbers_have_to_be_finite(run: Any, tmp_path: Path) -> None:
    for option in ("--epochs", "--lr", "--ratio"):
        for value in ("nan", "inf"):
            done = run("train", tmp_path / "new", *PAIRS, option, value)
            assert done.exit_code == 2
            assert option in done.stderr
            assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_translation_needs_sacrebleu(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check(run("train", tmp_path / "new", *PAIRS, *options("marian")), r"factorformer\[translation\]")
