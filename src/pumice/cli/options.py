"""Options that several commands share."""

from __future__ import annotations

import os
from typing import Annotated

import typer


def share_cores() -> None:
    """Let OpenMP's threads sleep between two products; call it before torch is imported.

    Decoding is hundreds of small products per token. Threads that spin while they wait gain a little on
    an idle machine and lose very much beside another busy process, a training run say: 1900 instead of
    50 ms per token were measured. A value that is already set stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


Model = Annotated[str, typer.Option("--model", "-m", help="A built-in model, a folder, or a name on the hub.")]
Device = Annotated[
    str | None, typer.Option(help="cuda, mps or cpu; the best one here if not given.", show_default=False)
]
MaxNewTokens = Annotated[int, typer.Option(help="The longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest word each time; 1 draws freely.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest words of this probability together.")]
TopK = Annotated[int, typer.Option(help="Draw from this many likeliest words; 0 is all.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1, words already said become less likely.")]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="End the answer before this text; repeat as needed.", show_default=False),
]
Seed = Annotated[
    int | None, typer.Option(help="Draw the same answer again (with a temperature).", show_default=False)
]
