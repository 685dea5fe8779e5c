"""`pumice data`: look at rows, check and convert them, and make new ones."""

from __future__ import annotations

import typer

from pumice.cli import data_check, data_convert, data_show, generate

app = typer.Typer(help="Make training rows, and look at them before they are learned.", no_args_is_help=True)
app.command("show")(data_show.show)
app.command("check")(data_check.check)
app.command("convert")(data_convert.convert)
app.command("generate")(generate.generate)
app.command("mix")(generate.mix)
