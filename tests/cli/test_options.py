"""A command has an option for each field of its settings, and gets them as the class that describes them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from pumice.cli import options
from pumice.cli.options import Sampling

LONGER = Sampling(max_new_tokens=512)


@dataclass(frozen=True)
class Wall:
    """Settings with a field that is required, a list, and a field that is no option."""

    colour: Annotated[str, typer.Option(help="Its colour.")]
    stones: Annotated[tuple[str, ...], typer.Option("--stone", help="One of its stones.")] = ()
    height: Annotated[float, typer.Option("--height", "-h", min=0, help="In metres.")] = 2.5
    built: bool = False


def run(function: Any, *words: str) -> Any:
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(options.expand(function))
    return CliRunner().invoke(app, list(words), terminal_width=200)


def test_fields_are_options() -> None:
    seen: list[Any] = []

    def build(place: str, wall: Wall, *, sampling: Annotated[Sampling, "seed"], dry: bool = False) -> None:
        seen.append((place, wall, sampling, dry))

    result = run(build, "here", "--colour", "red", "--stone", "a", "--stone", "b", "--seed", "3", "--dry")
    assert result.exit_code == 0, result.output
    assert seen == [("here", Wall("red", ("a", "b")), Sampling(seed=3), True)]
    shown = run(build, "--help").output
    assert "Its colour.  [required]" in shown
    assert "-h, --height" in shown
    assert "[default: 2.5; x>=0]" in shown
    assert "--built" not in shown
    assert "--temperature" not in shown  # of Sampling, only the seed is taken
    assert run(build, "here", "--colour", "red", "--height", "-1").exit_code == 2


def test_a_command_may_have_other_defaults() -> None:
    seen: list[Sampling] = []

    def talk(sampling: Sampling = LONGER) -> None:
        seen.append(sampling)

    assert run(talk).exit_code == 0
    assert run(talk, "--temperature", "0.5", "--stop", "x").exit_code == 0
    assert seen == [LONGER, Sampling(max_new_tokens=512, temperature=0.5, stop=("x",))]
    assert "[default: 512]" in run(talk, "--help").output


@pytest.mark.parametrize(
    ("sampling", "given"),
    [
        (Sampling(), {"max_new_tokens": 256, "stop": (), "seed": None}),
        (Sampling(top_k=0), {"max_new_tokens": 256, "top_k": 0, "stop": (), "seed": None}),
    ],
)
def test_what_the_model_decides_is_not_given(sampling: Sampling, given: dict[str, Any]) -> None:
    assert sampling.given() == given


@pytest.mark.parametrize(("load", "policy"), [(0.4, "ACTIVE"), (0.6, "PASSIVE")])
def test_threads_spin_where_the_cores_that_may_be_used_are_idle(
    monkeypatch: pytest.MonkeyPatch, load: float, policy: str
) -> None:
    """On a machine of 64 cores, of which this process may use one."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5}, raising=False)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0, 0), raising=False)
    options.share_cores()
    assert os.environ.pop("OMP_WAIT_POLICY") == policy
