"""Whatever goes wrong: one line, exit code 2, no traceback, nothing left behind."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedModel, T5Config, T5ForSequenceClassification

COMMAND = [sys.executable, "-W", "ignore", "-c", "from factorformer.cli import main; main()"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "wihtened"], "'wihtened'.*'whitened'"),
        (["--ratio", "1000"], "ask for at most"),
        (["--ratio", "0.5"], "at least 1"),
        (["--include", "*.nothing"], "nothing'.*no"),
        (["--method", "whitened"], "'whitened'.*text"),
        (["--method", "fwsvd", "--calibration", "texts.txt"], "--label"),
        (["--method", "fwsvd", "--train", "train.jsonl", "--label", "label"], "factorformer finetune"),
        (["--calibration", "nothing.jsonl"], r"nothing\.jsonl"),
        (["--calibration", "empty.jsonl"], r"empty\.jsonl' is empty"),
        (["--calibration", "broken.jsonl"], "broken.jsonl', line 2, column 2"),
        (["--calibration", "train.jsonl", "--text", "txt"], r"train\.jsonl.*'txt'.*'text'"),
        (["--train", "train.jsonl", "--label", "labels"], r"train\.jsonl.*column 'labels'"),
        (["--train", "train.jsonl", "--label", "label", "--eval", "unseen.jsonl"], r"training.*\['never'\]"),
        (["--train", "train.jsonl"], "labels.*teacher"),
        (["--distill", "minilm"], "--train"),
        (["--label", "label"], "--train, --eval.*--calibration"),
        (["--task", "regression"], "--label"),
        (["--calibration", "nulls.jsonl"], "nulls.jsonl', line 2, column 'text': no text"),
        (["--calibration", "long.txt", "--max-length", "64"], r"'long\.txt'.*42 tokens.*24 positions"),
        (["--eval", "train.jsonl", "--label", "label"], "classification head"),
        (["--train", "texts.txt", "--distill", "nowhere/else"], "nowhere/else"),
        (["--plan", "nothing.json"], r"plan.*nothing\.json"),
        (["--method", "shapeshifter"], "`factorformer train`"),
        (["--eval", "two.txt"], r"'two\.txt'.* 2 texts.*at least 3"),
        (["--train", "words.jsonl", "--label", "label"], "words.jsonl', line 1, column 'text'"),
        (["--plan", "train.jsonl"], r"plan.*train\.jsonl"),
    ],
)
def test_compress_refuses(
    run: Any,
    base: Path,
    tables: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tables)
    done = run("compress", base, tmp_path / "small", *arguments)
    check(done, message)
    assert list(tmp_path.iterdir()) == []


def check(done: Any, message: str) -> None:
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert re.search(message, done.stderr)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./nowhere", "directory.*nowhere|nowhere.*directory"),
        ("no/such/path", "directory.*no/such/path|no/such/path.*directory"),
        ("somebody/unknown-model", "unknown-model.*Hub"),
        ("texts.txt", r"directory.*texts\.txt|texts\.txt.*directory"),
        (".", "no config.json"),
    ],
)
def test_models_that_are_not_there(
    run: Any, tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, message: str
) -> None:
    monkeypatch.chdir(tables)
    for command in (["compress", model, tmp_path / "small"], ["inspect", model], ["plan", model]):
        check(run(*command), message)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_numbers(run: Any, base_copy: Path, tmp_path: Path) -> None:
    weights = load_file(base_copy / "model.safetensors")
    weights["encoder.layer.1.output.dense.weight"][0, 0] = float("nan")
    save_file(weights, base_copy / "model.safetensors", metadata={"format": "pt"})
    check(run("compress", base_copy, tmp_path / "small"), "encoder.layer.1.output.dense.weight")
    assert not (tmp_path / "small").exists()


def test_missing_truncated_and_unknown_models(run: Any, base_copy: Path, tmp_path: Path) -> None:
    weights = base_copy / "model.safetensors"
    content = load_file(weights)
    key = "encoder.layer.0.output.dense.weight"
    save_file({k: v for k, v in content.items() if k != key}, weights, metadata={"format": "pt"})
    check(run("compress", base_copy, tmp_path / "small"), key)
    data = tmp_path / "rows.tsv"
    data.write_text("text\tlabel\na film\tx\na book\ty\n")
    check(run("finetune", base_copy, tmp_path / "small", "--train", data), key)
    weights.write_bytes(weights.read_bytes()[:1000])
    check(run("compress", base_copy, tmp_path / "small"), "cannot load")
    config = json.loads((base_copy / "config.json").read_text())
    (base_copy / "config.json").write_text(json.dumps({**config, "architectures": ["BertOracle"]}))
    check(run("compress", base_copy, tmp_path / "small"), "cannot load")
    (base_copy / "config.json").write_text("{")
    check(run("compress", base_copy, tmp_path / "small"), "config.json")
    assert not (tmp_path / "small").exists()
    save_file(content, weights, metadata={"format": "pt"})
    (base_copy / "config.json").write_text(json.dumps({**config, "architectures": ["BertOracle"]}))
    done = run("compress", base_copy, tmp_path / "small")
    assert done.exit_code == 0
    assert "BertModel" in done.stderr


def test_a_model_without_tokenizer_needs_no_text(run: Any, base_copy: Path, tables: Path, tmp_path: Path) -> None:
    for file in base_copy.glob("tokenizer*"):
        file.unlink()
    assert run("compress", base_copy, tmp_path / "small", "--ratio", 2).exit_code == 0
    check(
        run("compress", base_copy, tmp_path / "other", "--ratio", 2, "--calibration", tables / "texts.txt"),
        "has no tokenizer",
    )


def test_a_broken_list_of_modules(run: Any, base_copy: Path, tmp_path: Path) -> None:
    (base_copy / "modules.json").write_text("[1")
    check(run("compress", base_copy, tmp_path / "small", "--ratio", 2), "modules.json")
    assert not (tmp_path / "small").exists()


def test_compressing_twice(run: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found out from the configuration: no weight is read."""
    assert run("compress", base, tmp_path / "small", "--ratio", 2).exit_code == 0
    monkeypatch.setattr("factorformer.hf.checkpoint.load", lambda *_, **__: pytest.fail("weights were read"))
    monkeypatch.setattr("factorformer.hf.source.load", lambda *_, **__: pytest.fail("weights were read"))
    check(run("compress", tmp_path / "small", tmp_path / "smaller"), "compressed already")
    check(run("plan", tmp_path / "small"), "compressed already")


def test_teachers_that_do_not_fit(run: Any, base: Path, trained: Path, tables: Path, tmp_path: Path) -> None:
    training = ("--train", tables / "train.jsonl", "--label", "label")
    check(run("compress", trained, tmp_path / "a", *training, "--distill", base), "classification head")
    scores = ("--train", tables / "train.jsonl", "--label", "score")
    check(run("finetune", base, tmp_path / "b", *scores, "--distill", trained), "other labels")


def test_evaluate_refuses(run: Any, base: Path, trained: Path, tables: Path) -> None:
    check(run("evaluate", base, "--data", tables / "train.jsonl"), "factorformer finetune")
    check(run("evaluate", trained, "--data", tables / "unseen.jsonl"), r"unseen\.jsonl.*'never'.* line 5\b")
    (tables / "blank.tsv").write_text("text\tlabel\na\tplus\n\nb\tnever\n")
    check(run("evaluate", trained, "--data", tables / "blank.tsv"), r"blank\.tsv.*'never'.* line 4\b")
    check(run("evaluate", trained, "--data", tables / "empty.jsonl"), "empty")


def test_a_plan_file_is_not_replaced(run: Any, base: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.touch()
    check(run("plan", base, "--ratio", 2, "--output", file), "exists already")
    missing = tmp_path / "no" / "plan.json"
    check(run("plan", base, "--ratio", 2, "--output", missing), f"directory '{missing.parent}'")
    assert run("plan", base, "--ratio", 2, "--output", file, "--overwrite").exit_code == 0


def test_a_plan_that_does_not_fit(run: Any, base: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    assert run("plan", base, "--ratio", 2, "--output", file).exit_code == 0
    content = file.read_text()
    file.write_text(content.replace("encoder.layer.1.", "encoder.layer.7."))
    check(run("compress", base, tmp_path / "small", "--plan", file), "encoder.layer.7.")
    plan = json.loads(content)
    plan["entries"][0]["shape"] = [32, 16]
    plan["entries"][0]["spec"]["rank"] = 2
    file.write_text(json.dumps(plan))
    check(run("compress", base, tmp_path / "small", "--plan", file), "does not fit the model")
    # A value of another type.
    plan = json.loads(content)
    plan["entries"][0]["spec"] = "low_rank"
    file.write_text(json.dumps(plan))
    check(run("compress", base, tmp_path / "small", "--plan", file), "'spec' cannot be 'low_rank'")


def test_a_seed_that_is_too_large(run: Any, base: Path, tmp_path: Path) -> None:
    done = run("compress", base, tmp_path / "small", "--seed", 99999999999)
    assert done.exit_code == 2
    assert "--seed" in done.stderr
    assert "Traceback" not in done.stderr


def test_texts_longer_than_the_model_reads(run: Any, base: Path, trained: Path, tables: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.jsonl"
    rows = [{"text": "a film " * 20, "label": label} for label in ("plus", "minus")]
    long.write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = "--max-length of at most 24"
    check(run("finetune", base, tmp_path / "out", "--train", long), message)
    check(run("finetune", base, tmp_path / "out", "--train", tables / "train.jsonl", "--eval", long), message)
    check(run("evaluate", trained, "--data", long), message)
    assert run("evaluate", trained, "--data", long, "--max-length", 24).exit_code == 0


def test_encoder_decoders_do_not_follow_a_teacher(run: Any, base: Path, tables: Path, tmp_path: Path) -> None:
    source = tmp_path / "t5"
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 18}
    labels = {"num_labels": 2, "id2label": {0: "minus", 1: "plus"}, "label2id": {"minus": 0, "plus": 1}}
    config = T5Config(**sizes, **labels, decoder_start_token_id=0, eos_token_id=3)
    T5ForSequenceClassification(config).save_pretrained(source)
    AutoTokenizer.from_pretrained(base).save_pretrained(source)
    training = ("--train", tables / "train.jsonl", "--label", "label", "--distill", source)
    for command in ("compress", "finetune"):
        check(run(command, source, tmp_path / "small", *training), "encoder and a decoder")


def test_ctrl_c(run: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", interrupt)
    done = run("compress", base, tmp_path / "small", "--ratio", 2)
    assert done.exit_code == 130
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_while_writing(run: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: PreTrainedModel, directory: Path, **_: object) -> None:
        (directory / "half").touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
    check(run("compress", base, tmp_path / "small", "--ratio", 2), "No space left on device")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="limits of file sizes are of POSIX")
def test_a_file_system_that_takes_no_more(
    run: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real writer of weights meets a real limit."""
    import resource

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        done = run("compress", base, tmp_path / "small", "--ratio", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert done.exit_code == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def interruptible() -> None:
    """In a new process: SIGINT interrupts, whatever is done with it here (shells ignore it in what `&` starts)."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


# Two processes for the imports of one: the child has the id that is printed, and an output directory of its own.
TWICE = """
import os, sys
import factorformer.cli._jobs.compress, factorformer.tasks.finetuning, transformers.models.bert.modeling_bert
from factorformer.cli import main
child = os.fork()
if child:
    print("child:", child, file=sys.stderr, flush=True)
else:
    sys.argv[3] += "-child"
main()
"""


def test_a_killed_process_leaves_no_output(base: Path, tables: Path, tmp_path: Path) -> None:
    training = ["--train", str(tables / "train.jsonl"), "--label", "label", "--epochs", "100000"]
    arguments = ["compress", str(base), str(tmp_path / "small"), "--ratio", "2", *training]
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", TWICE, *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=interruptible,
    )
    assert process.stderr is not None
    child, started = 0, 0
    try:
        # The note is printed once everything is imported; some time later it is somewhere in the middle of the work.
        while started < 2 or not child:
            line = process.stderr.readline()
            assert line, "the process ended before it started"
            started += line.count("method:")
            if line.startswith("child:"):
                child = int(line.split()[1])
        time.sleep(1)
        assert process.poll() is None
        os.kill(child, signal.SIGKILL)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=900)
    finally:
        process.kill()
        if child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
    assert process.returncode == 130
    assert stdout == ""
    assert "Traceback" not in stderr
    assert not (tmp_path / "small").exists()
    assert not (tmp_path / "small-child").exists()


def test_errors_of_ours_keep_their_traceback(run: Any, base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def bug(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("factorformer.files.check_output", bug)
    with pytest.raises(RuntimeError, match="a bug"):
        run("compress", base, tmp_path / "small")
    assert torch.is_grad_enabled()
