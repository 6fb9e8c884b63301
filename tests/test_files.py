"""Files and directories appear whole or not at all, and never at the cost of others."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from factorformer import files
from factorformer.errors import OutputError
from factorformer.files import check_file, check_files, check_output, output_directory, output_files, whole_file


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def model(folder: Path, **others: str) -> Path:
    """A directory that looks like a model's, with further files."""
    folder.mkdir(parents=True)
    content = {"config.json": '{"model_type": "bert"}', "model.safetensors": "weights", "vocab.txt": "a"}
    for name, text in {**content, **others}.items():
        (folder / name).write_text(text)
    return folder


# Files


def test_a_file_is_replaced_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "plan.json"
    target.write_text("old")
    target.chmod(0o640)
    with whole_file(target, "the plan") as partial, whole_file(target, "the plan") as other:
        assert partial != other
        partial.write_text("new")
        other.write_text("newer")
        assert target.read_text() == "old"
        assert len(names(tmp_path)) == 3
        assert partial.name.startswith(".plan.json.partial-")
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o640
    assert names(tmp_path) == ["plan.json"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_on_the_way_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "plan.json"
    target.write_text("old")

    def fail(partial: Path) -> None:
        partial.write_text("half")
        raise error

    with pytest.raises(error), whole_file(str(target), "the plan") as partial:
        fail(partial)
    assert target.read_text() == "old"
    assert names(tmp_path) == ["plan.json"]


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"the plan .*missing/plan\.json': No such file"),
        whole_file(tmp_path / "missing" / "plan.json", "the plan") as partial,
    ):
        partial.write_text("new")
    (tmp_path / "taken").mkdir()
    with (
        pytest.raises(OutputError, match=r"the plan .*taken': Is a directory$"),
        whole_file(tmp_path / "taken", "the plan") as partial,
    ):
        partial.write_text("new")
    assert names(tmp_path) == ["taken"]


def test_the_writer_of_weights_has_errors_of_its_own(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"the weights .*No such file"),
        whole_file(tmp_path / "missing" / "weights", "the weights") as partial,
    ):
        save_file({"weight": torch.zeros(2)}, partial)


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "plan.json").symlink_to(tmp_path / "real" / "plan.json")
    with whole_file(tmp_path / "plan.json", "the plan") as partial:
        partial.write_text("new")
    assert (tmp_path / "real" / "plan.json").read_text() == "new"
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with output_directory(tmp_path / "out") as partial:
        (partial / "file").write_text("content")
    assert (tmp_path / "elsewhere" / "file").read_text() == "content"


def test_a_file_that_would_fail_or_cost_an_input_is_refused(tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    data = tmp_path / "train.tsv"
    data.write_text("text\n")
    (tmp_path / "link.json").symlink_to(base / "config.json")
    refused = {
        "missing/plan.json": "no directory.*missing",
        "base": "is a directory",
        "base/config.json": "inside the input.*base",
        "base/new.json": "inside the input.*base",
        "link.json": "inside the input.*base",
        "train.tsv": "is the input.*train.tsv",
        "train.tsv/plan.json": "train.tsv' is not a directory",
    }
    for name, message in refused.items():
        with pytest.raises(OutputError, match=message):
            check_file(tmp_path / name, overwrite=True, inputs=[base, data, None, "org/name"])
    with pytest.raises(OutputError, match="exists already"):
        check_file(data, overwrite=False)
    check_file(data, overwrite=True)
    check_file(tmp_path / "plan.json", overwrite=False, inputs=[base])


def test_places_that_only_an_attempt_finds_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    for check in (check_file, check_output):
        for name, message in {
            "x" * 256: "long",
            "~/plan.json": "'~'",
            "/proc/plan.json": "/proc",
            "/dev/null": "is a (device|file)",
            "pipe": "is a (device|file)",
        }.items():
            with pytest.raises(OutputError, match=message):
                check(name, overwrite=True)
        check("x" * 255, overwrite=False)
    with output_directory("ü" * 127) as partial:
        (partial / "file").write_text("content")
    assert names(tmp_path) == ["pipe", "ü" * 127]


def test_the_writer_of_tokenizers_has_no_class_of_errors(tmp_path: Path) -> None:
    for appears in (output_directory(tmp_path / "m"), whole_file(tmp_path / "m", "the plan")):
        with pytest.raises(OutputError, match="File too large"), appears:
            raise Exception("File too large (os error 27)")
        with pytest.raises(Exception, match="a bug") as raised, output_directory(tmp_path / "m"):
            raise Exception("a bug")
        assert type(raised.value) is Exception
    assert names(tmp_path) == []


# Directories


def test_an_output_directory_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "new" / "model"
    before = os.umask(0o027)
    try:
        with output_directory(target) as partial:
            (partial / "file").write_text("content")
            assert not target.exists()
            assert partial.parent == target.parent
            assert partial.name.startswith(".")
    finally:
        os.umask(before)
    assert names(target.parent) == ["model"]
    assert (target / "file").read_text() == "content"
    assert target.stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def fail(partial: Path) -> None:
        (partial / "file").write_text("content")
        raise error

    with pytest.raises(error), output_directory(tmp_path / "new" / "model") as partial:
        fail(partial)
    assert names(tmp_path) == []


def test_errors_of_writing_and_of_reading(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"/m'.*No space left"),
        output_directory(tmp_path / "m"),
    ):
        raise OSError(28, "No space left on device")
    with pytest.raises(OutputError, match=r"could not write.*missing/file"), output_directory(tmp_path / "m") as made:
        (made / "missing" / "file").write_text("content")
    with pytest.raises(FileNotFoundError, match="vocab"), output_directory(tmp_path / "m"):
        (tmp_path / "vocab.txt").read_text()
    with pytest.raises(FileNotFoundError, match="vocab"), whole_file(tmp_path / "m", "the plan"):
        (tmp_path / "vocab.txt").read_text()
    assert names(tmp_path) == []


def test_an_existing_directory_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(OutputError, match=r"exists already.*--overwrite"), output_directory(tmp_path / "model"):
        pytest.fail("the block ran")
    with pytest.raises(OutputError, match="exists already"):
        check_output(tmp_path / "model", overwrite=False)
    check_output(tmp_path / "model", overwrite=True)
    check_output(tmp_path / "free", overwrite=False)


def test_overwriting_replaces_everything(tmp_path: Path) -> None:
    target = model(tmp_path / "model")
    with output_directory(target, overwrite=True) as partial:
        (partial / "new").write_text("new")
        assert "vocab.txt" in names(target)
    assert names(tmp_path) == ["model"]
    assert names(target) == ["new"]


def test_only_a_model_and_nothing_else_is_replaced(tmp_path: Path) -> None:
    refused = {
        "notes": ({"thesis.txt": "mine"}, "not a model directory"),
        "web": ({"config.json": '{"port": 80}'}, "not a model directory"),
        "broken": ({"config.json": "{"}, "not a model directory"),
        "mixed": ({"config.json": '{"model_type": "bert"}', "thesis.txt": "mine"}, "holds 'thesis.txt'"),
        "nested": ({"factorformer.json": "{}", "1_Pooling/config.json": "{}", "1_Pooling/my.txt": "."}, "my.txt"),
        "repository": ({"factorformer.json": "{}", ".git/config": "[core]"}, "holds '.git'"),
        "run": ({"factorformer.json": "{}", "checkpoint-4/config.json": "{}"}, "holds 'checkpoint-4'"),
    }
    for name, (content, message) in refused.items():
        for file, text in content.items():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text(text)
        with pytest.raises(OutputError, match=message), output_directory(tmp_path / name, overwrite=True):
            pytest.fail("the block ran")
        assert all((tmp_path / name / file).read_text() == text for file, text in content.items())
    check_output(tmp_path / "mixed", overwrite=True, known=["thesis.txt"])
    # What was copied from an input is not lost.
    source = model(tmp_path / "source", **{"thesis.txt": "mine"})
    check_output(tmp_path / "mixed", overwrite=True, inputs=[source])
    (source / "thesis.txt").write_text("another version")
    with pytest.raises(OutputError, match=r"thesis\.txt"):
        check_output(tmp_path / "mixed", overwrite=True, inputs=[source])


def test_no_output_at_the_cost_of_an_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = model(tmp_path / "models" / "base")
    link, cache = tmp_path / "link", model(tmp_path / "cache")
    link.symlink_to(base)
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "config.json").symlink_to(cache / "config.json")
    data = tmp_path / "data" / "train.tsv"
    model(data.parent)
    data.write_text("text\n")
    (tmp_path / "file").write_text("a file")
    inputs = [base, data, linked, None, "nyu-mll/glue:sst2:train"]
    refused = {
        base: "is the input",
        link: "is the input",
        base / "small": "inside the input",
        link / "small": "inside the input",
        base.parent: "holds the input",
        tmp_path: "holds the input",
        data.parent: "holds the input.*train.tsv",
        cache: "linked' links to",
        Path("/"): "root of the file system",
    }
    for overwrite in (True, False):
        for target, message in refused.items():
            with (
                pytest.raises(OutputError, match=message),
                output_directory(target, overwrite=overwrite, inputs=inputs),
            ):
                pytest.fail("the block ran")
    monkeypatch.chdir(base)
    for target in (".", base, "..", base.parent):
        with pytest.raises(OutputError, match="current directory"):
            check_output(target, overwrite=True)
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", str(base))
    for target in (base, base.parent):
        with pytest.raises(OutputError, match="home directory"):
            check_output(target, overwrite=True)
    check_output(base / "small", overwrite=True)


def test_a_failure_while_overwriting_keeps_the_old(tmp_path: Path) -> None:
    target = model(tmp_path / "model")
    with pytest.raises(RuntimeError), output_directory(target, overwrite=True):
        raise RuntimeError
    assert names(tmp_path) == ["model"]
    assert "vocab.txt" in names(target)


def test_a_rename_that_fails_keeps_the_old_and_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, rename = model(tmp_path / "model"), Path.rename

    def fail(self: Path, name: Path) -> Path:
        if name == target and ".partial-" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, name)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OutputError, match="result is in"), output_directory(target, overwrite=True) as partial:
        (partial / "new").write_text("new")
    assert "vocab.txt" in names(target)
    kept = next(path for path in tmp_path.iterdir() if path != target)
    assert names(kept) == ["new"]


def test_a_place_that_is_taken_meanwhile_costs_no_result(tmp_path: Path) -> None:
    target = tmp_path / "model"

    def take(partial: Path) -> None:
        (partial / "new").write_text("new")
        model(target)

    with pytest.raises(OutputError, match=r"exists already.*result is in"), output_directory(target) as partial:
        take(partial)
    assert "vocab.txt" in names(target)
    kept = next(path for path in tmp_path.iterdir() if path != target)
    assert names(kept) == ["new"]


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_file_in_the_way(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "model").write_text("a file")
    with pytest.raises(OutputError, match="is a file"), output_directory(tmp_path / "model", overwrite=overwrite):
        pytest.fail("the block ran")
    assert (tmp_path / "model").read_text() == "a file"
    with pytest.raises(OutputError, match="not a directory"), output_directory(tmp_path / "model" / "new"):
        pytest.fail("the block ran")


def test_every_file_that_the_package_writes_into_a_model_can_be_replaced(tmp_path: Path) -> None:
    from factorformer.training import rank_history

    written = {rank_history.FILE: "", files.RESULT_FILE: "{}", "training.json": "{}", "README.md": ""}
    target = model(tmp_path / "model", **written)
    (target / "1_Pooling").mkdir()
    (target / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    check_output(target, overwrite=True)


def test_two_writers_do_not_mix(tmp_path: Path) -> None:
    def write(content: str) -> None:
        for _ in range(20):
            with whole_file(tmp_path / "plan.json", "the plan") as partial:
                partial.write_text(content * 1000)

    writers = [threading.Thread(target=write, args=(letter,)) for letter in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert (tmp_path / "plan.json").read_text() in ("a" * 1000, "b" * 1000)
    assert names(tmp_path) == ["plan.json"]


def test_files_that_go_into_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model" / "onnx"
    folder.parent.mkdir()
    names = ("weights", "graph")
    with output_files(folder, names) as partial:
        (partial / "graph").write_text("one")
        (partial / "weights").write_text("two")
        assert not folder.exists()
    (folder / "other").write_text("stays")
    with pytest.raises(OutputError, match="weights' exists already"), output_files(folder, names) as partial:
        raise AssertionError
    stopped = output_files(folder, names, overwrite=True)
    (stopped.__enter__() / "graph").write_text("new")
    assert not stopped.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert {file.name: file.read_text() for file in folder.iterdir()} == {
        "graph": "one",
        "weights": "two",
        "other": "stays",
    }
    with output_files(folder, names, overwrite=True) as partial:
        (partial / "graph").write_text("three")  # which reads no weights
    assert {file.name: file.read_text() for file in folder.iterdir()} == {"graph": "three", "other": "stays"}
    assert [path.name for path in folder.parent.iterdir()] == ["onnx"]
    (folder / "weights").mkdir()
    with pytest.raises(OutputError, match="is a directory"):
        check_files(folder, names, overwrite=True)


def test_an_interruption_leaves_no_file_that_reads_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("weights", "graph"):
        (tmp_path / name).write_text("old")
    replace = Path.replace

    def interrupted(self: Path, target: Path) -> Path:
        if target.name == "graph":
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    written = output_files(tmp_path, ("weights", "graph"), overwrite=True)
    partial = written.__enter__()
    for name in ("weights", "graph"):
        (partial / name).write_text("new")
    with pytest.raises(KeyboardInterrupt):
        written.__exit__(None, None, None)
    assert [file.name for file in tmp_path.iterdir()] == ["weights"]
