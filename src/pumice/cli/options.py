"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[str, typer.Option("--model", "-m", help="A built-in model's name or a model folder.")]
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
