"""`pumice import`: write a model of another format as a Pumice folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from pumice.cli import options
from pumice.jsonl import print_json


def import_(
    source: Annotated[str, Argument(help="A folder, a GGUF file, or a name on the hub.", metavar="SRC")],
    target: Annotated[Path, Argument(help="The folder to write.", metavar="DST")],
    template: options.Template = None,
    tower: Annotated[
        str | None,
        Option(help="The vision tower: of an original LLaVA, or to join to a bare language model."),
    ] = None,
    base: options.Base = None,
    mmproj: options.Mmproj = None,
    dtype: Annotated[str, Option(help="Store weights as fp16, bf16 or fp32; keep: as they are.")] = "keep",
    quantize: Annotated[
        Literal["none", "int8", "int4"],
        Option(help="Store the language model in 8 or 4 bits, which a CPU opens at once."),
    ] = "none",
    as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a model of transformers, the original LLaVA, PEFT or GGUF as a Pumice folder.

    What SRC is, its contents say. A model need not be imported to be asked: `--model SRC` opens it as well.
    """
    from pumice.formats.import_ import import_model

    bits = None if quantize == "none" else quantize
    report = import_model(
        source, target, dtype=dtype, template=template, tower=tower, base=base, mmproj=mmproj, quantize=bits
    )
    summary = report.summary()
    if as_json:
        print_json({"folder": str(target), **summary})
        return
    print(f"{source} is {summary['source']}")
    for key in ("decoder", "tower", "connector", "pictures", "template", "lora"):
        if summary[key] is not None:
            print(f"  {key:<10} {summary[key]}")
    size, count = summary["bytes"] / 1e9, summary["parameters"] / 1e6
    print(f"  {'weights':<10} {count:.1f} M parameters in {', '.join(summary['types'])}, {size:.2f} GB")
    for note in summary["notes"]:
        print(f"Note: {note}")
    print(f"The model is in {target}")
