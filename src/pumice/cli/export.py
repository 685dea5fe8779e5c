"""`pumice export`: write a model in the format of another program."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from pumice.cli import options
from pumice.jsonl import print_json


@options.expand
def export(
    source: Annotated[str, Argument(help="A folder, a built-in model, or a name on the hub.", metavar="SRC")],
    target: Annotated[Path, Argument(help="A new folder.", metavar="DST")],
    to: Annotated[
        str, Option(help="hf (transformers, vLLM), llava (the original code), gguf, ollama, peft.")
    ],
    dtype: Annotated[
        str | None,
        Option(help="Not gguf: store weights as fp16, bf16 or fp32; keep: as they are.", show_default="keep"),
    ] = None,
    kind: Annotated[
        str | None,
        Option(
            "--type",
            help="gguf, ollama: f32, f16, bf16, q8_0, q4_0, q4_k_m, q5_k_m, q6_k; keep: few bits as stored.",
            show_default="f16",
        ),
    ] = None,
    tower_kind: Annotated[
        str | None,
        Option("--mmproj-type", help="The same of the half that sees: f16, q8_0 or f32.", show_default="f16"),
    ] = None,
    class_token: Annotated[
        str | None,
        Option(
            help="shifted: for a CLIP in a llama.cpp that puts its class token last.", show_default="first"
        ),
    ] = None,
    tower_name: Annotated[
        str | None, Option(help="llava: the hub name from which its code builds the tower.")
    ] = None,
    drop_lora: Annotated[
        bool, Option("--drop-lora", help="Leave LoRA adapters out, do not merge them.")
    ] = False,
    *,
    opening: Annotated[options.Opening, "template", "tower", "base", "mmproj"],
    as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a model for transformers, llama.cpp, Ollama, PEFT or the original LLaVA code."""
    from pumice.formats.export import export as write
    from pumice.formats.read import read_model

    model = read_model(
        source, template=opening.template, tower=opening.tower, base=opening.base, mmproj=opening.mmproj
    )
    written = write(
        model, to, target, dtype=dtype, kind=kind, tower_kind=tower_kind, class_token=class_token,
        drop_lora=drop_lora, tower=tower_name,
    )  # fmt: skip
    notes = [*model.notes, *written.notes]
    if as_json:
        files = sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file())
        print_json({"folder": str(target), "files": files, "notes": notes})
        return
    print(f"The model is in {target}")
    for note in notes:
        print(f"Note: {note}")
