"""Which folder a model's name means."""

from __future__ import annotations

from pathlib import Path

import pytest

from pumice.errors import InputError
from pumice.weights.read import BUILT_IN, find_model


def test_a_folder_without_a_model_does_not_hide_a_built_in_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "pumice-tiny"
    folder.mkdir()  # as recipes/pumice-tiny is
    assert find_model("pumice-tiny") == BUILT_IN / "pumice-tiny"
    (folder / "config.json").write_text("{}")
    assert find_model("pumice-tiny") == Path("pumice-tiny")


def test_a_folder_that_is_no_model_and_a_name_that_is_nothing(tmp_path: Path) -> None:
    assert find_model(tmp_path) == tmp_path  # opening it says what it lacks
    with pytest.raises(InputError, match=r"no model 'nothing'.*pumice-tiny"):
        find_model("nothing")
