"""The command line, with one file per group of commands.

Exit status: 0 done, 1 the work failed, 2 wrong input, 130 interrupted. Heavy libraries are imported
inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import io
import sys
import warnings
from typing import Annotated, Any

import typer
from typer import Option
from typer.core import TyperGroup

from pumice import __version__
from pumice.cli import (
    ask,
    chat,
    check,
    data,
    doctor,
    evaluate,
    explain,
    export,
    importing,
    plan,
    serve,
    train,
)
from pumice.errors import InputError, WorkError

_MORE_MEMORY = "close other programs, or use a smaller model; `pumice plan` says what it takes"


def _out_of_memory(error: Exception) -> bool:
    """Return whether there was no memory. PyTorch and safetensors say so in words."""
    words = ("allocate memory", "not enough memory")  # the first also of a file that cannot be mapped
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(text in str(error) for text in words)
    )


class Commands(TyperGroup):
    """The group of commands. It turns an error of any command into one line and an exit status."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            error.message = error.message.replace("Value error, ", "")  # a mark of pydantic's
            if not error.message:  # an argument is missing: say what to give
                error.message = getattr(error.param, "help", None) or ""
            raise
        except InputError as error:
            raise self._end(str(error), 2) from error
        except KeyboardInterrupt as error:
            raise self._end("interrupted", 130) from error
        except BrokenPipeError:
            # The reader of our output, such as `head`, has ended. Python must not report it again at exit.
            sys.stdout = io.StringIO()
            raise typer.Exit(1) from None
        except (OSError, WorkError) as error:
            raise self._end(str(error), 1) from error
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0] or "Python could get no more"
            raise self._end(f"no memory is left ({reason}); {_MORE_MEMORY}", 1) from error

    @staticmethod
    def _end(message: str, status: int) -> typer.Exit:
        print(f"pumice: {' '.join(message.split())}", file=sys.stderr)
        return typer.Exit(status)


app = typer.Typer(
    name="pumice",
    cls=Commands,
    help="LLaVA, light: train, fine-tune, question and measure a visual language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(requested: bool) -> None:
    if requested:
        print(f"pumice {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command("ask")(ask.ask)
app.command("chat")(chat.chat)
app.command("train")(train.train)
app.command("plan")(plan.plan)
app.command("import")(importing.import_)
app.command("export")(export.export)
app.command("check")(check.check)
app.command("eval")(evaluate.evaluate)
app.command("serve")(serve.serve)
app.command("explain")(explain.explain)
app.command("doctor")(doctor.doctor)
app.add_typer(data.app, name="data")


def main() -> int:
    """The `pumice` command."""
    # Pillow also warns of large pictures; our own message is enough.
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # show ? for characters that the terminal lacks
    app()  # ends with SystemExit
    return 0
