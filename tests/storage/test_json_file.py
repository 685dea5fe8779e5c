"""JSON files that are damaged, or written to do harm, end in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from pumice.errors import InputError
from pumice.storage.json_file import Keys, read_json


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"width": ' + "1" * 5000 + "}", "[]", "7"])
def test_what_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json (is not JSON|should hold a JSON object)") as caught:
        read_json(tmp_path / "config.json")
    assert len(str(caught.value)) < 500


def test_what_is_missing_or_no_text_is_not_called_json_that_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(InputError) as caught:
        read_json(path, "copy it again")
    assert str(caught.value) == f"{path} is missing; copy it again"
    path.write_bytes(b"\xff")
    with pytest.raises(InputError) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path} cannot be read: ")


def test_a_byte_order_mark_and_line_ends_of_windows_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{\r\n"width": 7\r\n}\r\n')
    assert read_json(tmp_path / "config.json") == {"width": 7}


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "1" + "0" * 400])
def test_numbers_are_finite(tmp_path: Path, number: str) -> None:
    (tmp_path / "config.json").write_text(f'{{"eps": {number}}}')
    with pytest.raises(InputError, match="eps: expected a finite number"):
        Keys.of(tmp_path / "config.json").get("eps", float)


def test_a_long_value_is_shown_shortened(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"width": "' + "x" * 10_000 + '"}')
    with pytest.raises(
        InputError, match=r"width should be a whole number, not 'x+\.\.\. \(10002 characters\)"
    ):
        Keys.of(tmp_path / "config.json").get("width", int)
