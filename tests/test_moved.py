"""Public names that moved still work, with a warning that names the new place. Other old names fail."""

from __future__ import annotations

import importlib
import sys

import pytest

import pumice
from pumice import moved
from pumice.formats.pumice import folder
from pumice.serve import explanation
from pumice.synth import journal
from pumice.synth.kinds import base

OLD = ["pumice.generate.kinds.base", "pumice.generate.journal", *moved.MODULES]


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the old names that other tests have imported."""
    for name in [name for name in sys.modules if name.startswith(("pumice.generate", "pumice.weights"))]:
        monkeypatch.delitem(sys.modules, name)
    for name in moved.MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.parametrize("old", OLD)
def test_an_old_module_is_the_new_one(old: str) -> None:
    new = moved.MODULES.get(old, old.replace("generate", "synth"))
    with pytest.warns(DeprecationWarning, match=f"^{old} is now {new}$"):
        module = importlib.import_module(old)
    assert module is importlib.import_module(new)
    assert module.__name__ == module.__spec__.name == new


def test_old_and_new_names_share_one_set_of_classes() -> None:
    with pytest.warns(DeprecationWarning):
        old_base = importlib.import_module("pumice.generate.kinds.base")
        old_package = importlib.import_module("pumice.generate")
    assert old_base.Kind is base.Kind
    assert old_package.journal is journal


def test_statements_of_users() -> None:
    names: dict[str, object] = {}
    with pytest.warns(DeprecationWarning, match="pumice.formats.pumice.folder") as warnings:
        exec(compile("from pumice.weights.folder import save", "user.py", "exec"), names)
    assert names["save"] is folder.save
    assert {warning.filename for warning in warnings} == {"user.py"}  # the user's line, not one of Pumice's
    with pytest.warns(
        DeprecationWarning, match=r"is now pumice\.serve\.explanation\.explanation_json"
    ) as warnings:
        exec(compile("from pumice.explain.page import explanation_json", "user.py", "exec"), names)
    assert names["explanation_json"] is explanation.explanation_json
    assert {warning.filename for warning in warnings} == {"user.py"}


@pytest.mark.parametrize(
    "name",
    ["pumice.weights.read", "pumice.weights.folders", "pumice.answers", "pumice.structured", "pumice.doctor"],
)
def test_other_old_modules_end_in_an_import_error(name: str) -> None:
    with pytest.raises(ModuleNotFoundError, match=f"No module named '{name}'"):
        importlib.import_module(name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_names_that_never_existed_end_in_pythons_own_errors() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'pumice\.generate\.nothing'"):
        importlib.import_module("pumice.generate.nothing")
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec("from pumice.explain.page import nothing")
    with pytest.raises(ImportError, match="cannot import name 'read'"):
        exec("from pumice.weights import read")


def test_public_names_have_not_moved() -> None:
    assert pumice.load.__module__ == pumice.Assistant.__module__ == "pumice.assistant"
    assert pumice.InputError.__module__ == "pumice.errors"
