"""Files appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from factorformer.errors import OutputError
from factorformer.files import whole_file


def names(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir()]


def test_a_file_is_replaced_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "plan.json"
    target.write_text("old")
    with whole_file(target, "the plan") as partial:
        partial.write_text("new")
        assert target.read_text() == "old"
        assert sorted(names(tmp_path)) == [".plan.json.partial", "plan.json"]
    assert target.read_text() == "new"
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
        pytest.raises(OutputError, match=r"^cannot write the plan to '.*missing/plan.json': No such file"),
        whole_file(tmp_path / "missing" / "plan.json", "the plan") as partial,
    ):
        partial.write_text("new")
    (tmp_path / "taken").mkdir()
    with (
        pytest.raises(OutputError, match=r"^cannot write the plan to '.*taken': Is a directory$"),
        whole_file(tmp_path / "taken", "the plan") as partial,
    ):
        partial.write_text("new")
    assert names(tmp_path) == ["taken"]


def test_the_writer_of_weights_has_errors_of_its_own(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"^cannot write the weights to '.*': .*No such file"),
        whole_file(tmp_path / "missing" / "weights", "the weights") as partial,
    ):
        save_file({"weight": torch.zeros(2)}, partial)
