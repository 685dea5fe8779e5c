"""`pumice plan`: estimate the memory and the time of a training run."""

from __future__ import annotations

import shutil
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from pumice.errors import InputError, counted
from pumice.jsonl import print_json

if TYPE_CHECKING:
    from pumice.train.plan.asking import AskPlan
    from pumice.train.plan.estimate import Plan


def plan(
    recipe: Annotated[Path | None, Argument(help="A recipe, YAML.", metavar="RECIPE.yaml")] = None,
    ask: Annotated[
        str | None, Option(help="Say instead what the answers of this model take here.", metavar="MODEL")
    ] = None,
    gpu: Annotated[
        str | None, Option(help="a100-80g, h100, rtx4090, ...; this machine if not given.")
    ] = None,
    gpu_memory: Annotated[float | None, Option(min=0.1, help="Memory of the GPU in GB.")] = None,
    processes: Annotated[int | None, Option(min=1, help="GPUs that share the run.", show_default="1")] = None,
    rows: Annotated[int | None, Option(min=1, help="Rows of an epoch, where they are not here.")] = None,
    overrides: Annotated[
        list[str] | None,
        Option("--set", help="Another value for a key of the recipe; repeat.", metavar="KEY=VALUE"),
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Print the plan as one JSON object.")] = False,
) -> None:
    """Say what a recipe takes before it runs, or what answers take: memory and time.

    Status 1 when it does not fit.
    """
    if (recipe is None) == (ask is None):
        raise InputError("give a recipe, or --ask MODEL, and not both")
    if ask is not None:
        values = {
            "--gpu": gpu, "--gpu-memory": gpu_memory, "--processes": processes, "--rows": rows,
            "--set": overrides,
        }  # fmt: skip
        if given := [name for name, value in values.items() if value]:
            raise InputError(f"{given[0]} is for recipes; --ask times this machine: leave it out")
        from pumice.train.plan.asking import plan_ask

        costs = plan_ask(ask)
        lines = describe_ask(costs, shutil.get_terminal_size().columns)
        _tell(costs, as_json, lines, any(cost.fits is not False for cost in costs.costs))
        return
    assert recipe is not None
    from pumice.formats.read import BUILT_IN

    if recipe.is_dir() or (BUILT_IN / recipe).is_dir():
        raise InputError(
            f"{recipe} is no recipe; `pumice plan --ask {recipe}` says what the answers of a model take"
        )
    from pumice.train.plan.estimate import plan as make_plan
    from pumice.train.recipe import load_recipe, recipe_path

    estimate = make_plan(
        load_recipe(recipe, overrides or []),
        recipe_path(recipe),
        gpu=gpu,
        gpu_memory=gpu_memory,
        processes=processes or 1,
        rows=rows,
    )
    _tell(estimate, as_json, describe(estimate), estimate.fits is not False)


def _tell(plan: Plan | AskPlan, as_json: bool, lines: list[str], fits: bool) -> None:
    """Print a plan, and end with status 1 where it does not fit."""
    if as_json:
        print_json(plan.to_dict())
    else:
        print("\n".join(lines))
    if not fits:
        raise typer.Exit(1)


def describe_ask(plan: AskPlan, columns: int = 80) -> list[str]:
    """Return the costs of answers as lines of text: a column for each kind of weights, or a paragraph.

    columns: of the terminal; what does not fit there side by side stands one below the other.
    """
    free = "memory unknown" if plan.free is None else f"{plan.free / 1e9:.1f} GB free"
    threads = f", {plan.kernel}, {counted(plan.threads, 'thread')}" if plan.device == "cpu" else ""
    costs = plan.costs
    rows = [("--quantize", [cost.quantize for cost in costs])]
    for part in (part for part, size in costs[0].memory.items() if size):
        rows.append((part, [f"{cost.memory[part] / 1e9:.2f} GB" for cost in costs]))
    rows.append(("in all", [f"{cost.total / 1e9:.2f} GB" for cost in costs]))
    if plan.free is not None:
        rows.append(("", ["fits" if cost.fits else "does not fit" for cost in costs]))
    rows.append(("first word", [f"{cost.first_word:.1f} s" for cost in costs]))
    rows.append(("then", [f"{cost.tokens_per_second:.1f} tokens/s" for cost in costs]))
    lines = [
        f"{plan.model} on {plan.device}{threads}, {free}",
        f"a question about a new picture: {plan.prompt_tokens} tokens, {plan.image_tokens} of the picture"
        if plan.image_tokens
        else f"a question: {plan.prompt_tokens} tokens; the model sees no pictures",
    ]
    lines += [line for note in plan.notes for line in textwrap.wrap(f"note: {note}", columns)]
    if 20 + 16 * len(costs) > columns:
        for number in range(len(costs)):
            lines += ["", *(f"{name:<20}{values[number]:>16}" for name, values in rows)]
        return lines
    return [
        *lines,
        "",
        *(f"{name:<20}" + "".join(f"{value:>16}" for value in values) for name, values in rows),
    ]


def describe(plan: Plan) -> list[str]:
    """Return the plan as lines of text."""
    from pumice.train.plan.estimate import EXTRAPOLATED

    device = plan.device
    memory = "memory unknown" if device.memory is None else f"{device.memory / 1e9:.1f} GB"
    devices = (
        "" if plan.processes == 1 else f" x {plan.processes}, " + ("shards" if plan.sharded else "copies")
    )
    hint = ""
    if plan.planned_pack != plan.pack_tokens:
        hint = f", the largest of these rows (pack_tokens is {plan.pack_tokens})"
    lines = [f"{plan.recipe} on {device.name}{devices}, {memory}", "", "parameters"]
    for part, count in plan.parameters.items():
        lines.append(f"  {part:<14}{count / 1e6:10.1f} M")
    lines += [
        f"  {'learning':<14}{plan.learning / 1e6:10.1f} M",
        "",
        f"memory at packs of {plan.planned_pack} tokens{hint}",
    ]
    lines += [f"  {kind:<14}{size / 1e9:10.2f} GB" for kind, size in plan.memory.items() if size]
    lines.append(f"  {'in all':<14}{plan.total / 1e9:10.2f} GB  {_verdict(plan)}")
    if plan.largest_pack:
        foretold = EXTRAPOLATED * plan.planned_pack // 64 * 64
        least = "at least " if plan.largest_pack >= foretold else ""
        lines.append(f"  largest pack that fits: {least}{plan.largest_pack} tokens (pack_tokens)")
    lines += ["", f"disk: {plan.disk / 1e9:.2f} GB, {plan.checkpoint / 1e9:.2f} GB a checkpoint"]
    speed = f"time: {plan.tokens_per_second:,.0f} tokens/s"
    if plan.seconds is not None:
        speed += f"; steps: {plan.steps:,} ({plan.steps_per_epoch:,} an epoch), {_time(plan.seconds)}"
    else:
        speed += "; --rows N tells steps and hours"
    lines.append(speed)
    return lines + [f"note: {note}" for note in plan.notes]


def _verdict(plan: Plan) -> str:
    if plan.fits is None:
        return ""
    if plan.fits:
        return "fits"
    if plan.largest_pack:
        return "does not fit: lower pack_tokens"
    return "does not fit, whatever the pack: learn less (stage.lora, stage.base), checkpoint, or share it"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
