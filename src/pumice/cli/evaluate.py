"""`pumice eval`: scores answers to a benchmark, made before or by a model now."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pumice.cli import options
from pumice.errors import InputError
from pumice.progress import StatusLine

if TYPE_CHECKING:
    from pumice.evaluate.result import Asked, Given
    from pumice.evaluate.run import Answerer
    from pumice.evaluate.task import Task


def evaluate(
    task: Annotated[
        str | None, typer.Argument(help="A benchmark; --list names them.", show_default=False)
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="The folder with the official files.", metavar="DIR", show_default=False),
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(
            help="Answers to score (ours or LLaVA's); with --model, where they are kept.", show_default=False
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="A model folder, a built-in name, or http://HOST/v1.", show_default=False
        ),
    ] = None,
    model_name: Annotated[
        str | None, typer.Option(help="The model's name at an address.", show_default=False)
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Another split than the first.", show_default=False)
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", help="Write the result here; - prints it.", metavar="FILE", show_default=False
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Write a page with numbers and pictures.", metavar="FILE", show_default=False),
    ] = None,
    beside: Annotated[
        list[Path] | None, typer.Option("--with", help="Results of other tasks for the page; repeat.")
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            help="Other answers, which those of --predictions are measured against.", show_default=False
        ),
    ] = None,
    submission: Annotated[
        Path | None, typer.Option(help="Write what the benchmark's server takes.", show_default=False)
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="Whose published number this should be, such as LLaVA-1.5-7B.", show_default=False),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Only the first questions; marked as partial.", show_default=False)
    ] = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Score what there is; marked as partial.")
    ] = False,
    reviews: Annotated[
        Path | None, typer.Option(help="The judge's replies: read, and new ones added.", show_default=False)
    ] = None,
    judge_url: Annotated[
        str | None, typer.Option(help="The judge's OpenAI-compatible address.", show_default=False)
    ] = None,
    judge_model: Annotated[
        str | None, typer.Option(help="The judge's name there.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="The longest answer, in tokens; else the benchmark's own.", show_default=False
        ),
    ] = None,
    slots: Annotated[int, typer.Option(min=1, help="Questions answered at a time.")] = 16,
    device: options.Device = None,
    show_list: Annotated[bool, typer.Option("--list", help="Name the benchmarks and their files.")] = False,
) -> None:
    """Score answers to a benchmark, or let a model answer and score it.

    pumice eval pope --data pope/ --predictions answers.jsonl
    """
    from pumice.evaluate import result
    from pumice.evaluate.published import PUBLISHED
    from pumice.evaluate.tasks import get_task
    from pumice.files import replacing

    if show_list:
        _print_list()
        return
    if task is None:
        raise InputError(
            "there is no task; write for example: pumice eval pope --data DIR --predictions FILE"
        )
    chosen = get_task(task, split)
    if data is None:
        raise InputError(f"--data is missing; {task} needs {chosen.source.files} from {chosen.source.url}")
    if predictions is None:
        raise InputError("--predictions is missing; name the file of answers (with --model it is written)")
    if reference is not None and reference not in PUBLISHED:
        raise InputError(f"no numbers of {reference!r} are known; use one of {', '.join(PUBLISHED)}")
    if max_new_tokens is not None and model is None:
        raise InputError("--max-new-tokens is for a model that answers; add --model, or leave it out")
    if compare is not None and model is not None:
        raise InputError("--compare is for two files of answers; leave out --model")
    if compare is not None and predictions.exists() and compare.exists() and predictions.samefile(compare):
        raise InputError(f"--predictions and --compare are one file, '{compare}'; name two files of answers")
    _check_outputs(json_file, report, submission)
    _check_apart([predictions, data, compare, reviews, *(beside or ())], [json_file, report, submission])
    others = [result.read_result(path) for path in beside or ()]
    _set_judge(chosen, reviews, judge_url, judge_model)

    asked = result.read_questions(chosen, data, limit, keep_images=model is not None)
    if model is not None and not _answer(
        chosen, asked, predictions, model, model_name, device, slots, allow_missing, max_new_tokens
    ):
        return  # another process of torchrun goes on
    given = result.read_answers(asked, predictions, allow_missing=allow_missing)
    if submission is not None:
        chosen.submission(given.answered, submission, data)
        print(f"wrote {submission}", file=sys.stderr)
    if compare is not None:
        _compare(chosen, data, asked, given, predictions, compare, json_file, report, allow_missing)
        return
    try:
        score = chosen.score(given.answered)
    except InputError:
        if submission is None:
            raise
        print(f"{chosen.title} {chosen.split} is scored by its server", file=sys.stderr)
        return
    found = result.make_result(chosen, asked, given, score, reference)
    if report is not None:
        from pumice.evaluate.report import cards, page

        shown = cards(chosen, data, given.answered, score.values, given.model)
        with replacing(report) as file:
            file.write(page([found, *others], shown))
    _print(found, json_file, result.in_words(found))


def _print(found: dict[str, Any], json_file: Path | None, words: str) -> None:
    from pumice.evaluate.files import write_json

    if json_file is not None and str(json_file) == "-":
        print(json.dumps(found, ensure_ascii=False))
        return
    if json_file is not None:
        write_json(json_file, found, indent=2)
    print(words)


def _check_outputs(json_file: Path | None, report: Path | None, submission: Path | None) -> None:
    for path in (json_file, report):
        if path is not None and path.is_dir():
            raise InputError(f"'{path}' is a folder; name a file")
    for path in (json_file, report, submission):
        if path is not None and str(path) != "-" and not path.absolute().parent.is_dir():
            raise InputError(f"the folder '{path.parent}' of '{path.name}' does not exist; make it first")


def _check_apart(inputs: Sequence[Path | None], outputs: Sequence[Path | None]) -> None:
    """No output takes the place of what is read, or of another output."""
    taken = {path.resolve() for path in inputs if path is not None}
    for path in outputs:
        if path is None or str(path) == "-":
            continue
        if path.resolve() in taken:
            raise InputError(f"'{path}' is named twice, and would be written over; name another file")
        taken.add(path.resolve())


def _set_judge(task: Task, reviews: Path | None, url: str | None, model: str | None) -> None:
    from pumice.evaluate.endpoint import Endpoint
    from pumice.evaluate.judge import Judge, JudgedTask

    if (url is None) != (model is None):
        raise InputError("--judge-url and --judge-model belong together; give both")
    if not isinstance(task, JudgedTask):
        if url is not None or reviews is not None:
            raise InputError(f"{task.name} needs no judge; leave out --judge-url and --reviews")
        return
    endpoint = Endpoint(url, model) if url is not None and model is not None else None
    if endpoint is not None or reviews is not None:
        task.judge = Judge(reviews, endpoint)


def _answer(
    task: Task,
    asked: Asked,
    path: Path,
    model: str,
    model_name: str | None,
    device: str | None,
    slots: int,
    allow_missing: bool,
    max_new_tokens: int | None,
) -> bool:
    """Lets the model answer into `path`; False where another process goes on."""
    from pumice.evaluate.run import check_pictures, run

    missing = check_pictures(asked.questions, allow_missing=allow_missing)
    if missing:
        print(f"pumice: {missing} pictures are missing; their questions stay unanswered", file=sys.stderr)
    answerer = _answerer(model, model_name, device, slots)
    started = time.monotonic()
    first: list[int] = []
    line = StatusLine()

    def progress(done: int, total: int) -> None:
        first[:] = first or [done - 1]
        rate = (time.monotonic() - started) / max(1, done - first[0])
        line.show(f"{done} of {total}, {rate * (total - done):.0f} s left  ")

    try:
        return run(
            task, asked.questions, answerer, path,
            allow_missing=allow_missing, progress=progress, max_new_tokens=max_new_tokens,
        )  # fmt: skip
    finally:
        if first:
            line.end()


def _answerer(model: str, model_name: str | None, device: str | None, slots: int) -> Answerer:
    from pumice.evaluate.run import EndpointAnswerer, LocalAnswerer

    if model.startswith(("http://", "https://")):
        from pumice.evaluate.endpoint import Endpoint

        if model_name is None:
            raise InputError("--model is an address; say which model is meant there with --model-name")
        return EndpointAnswerer(Endpoint(model, model_name), workers=slots)
    options.share_cores()
    from pumice.assistant import load

    return LocalAnswerer(load(model, device=device), model_name or model, slots)


def _compare(
    task: Task,
    data: Path,
    asked: Asked,
    first: Given,
    mine: Path,
    other: Path,
    json_file: Path | None,
    report: Path | None,
    allow_missing: bool,
) -> None:
    from pumice.evaluate import compare
    from pumice.evaluate.result import read_answers
    from pumice.files import replacing

    second = read_answers(asked, other, allow_missing=allow_missing)
    files = (mine.name, other.name) if mine.name != other.name else (str(mine), str(other))
    names = (first.model, second.model)
    if names[0] == names[1]:
        names = (f"{names[0]} (first)", f"{names[1]} (second)")
    told = first.answered, second.answered
    both = set.intersection(*({question.id for question, _ in said} for said in told))
    ours, theirs = ([answer for answer in said if answer.question.id in both] for said in told)
    if not both:
        raise InputError(
            f"{files[0]} and {files[1]} answer no question in common; compare answers to the same"
        )
    found = compare.compare(task, ours, theirs, names, files)
    found["partial"] = len(both) < asked.total
    found["why_partial"] = f"{len(both)} of {asked.total} questions" if found["partial"] else ""
    words = compare.in_words(found) + (f"\n  PARTIAL: {found['why_partial']}" if found["partial"] else "")
    _print(found, json_file, words)
    if report is not None:
        from pumice.evaluate.report import compare_page, compared_cards

        with replacing(report) as file:
            file.write(compare_page(found, compared_cards(task, data, ours, theirs, names)))


def _print_list() -> None:
    from pumice.evaluate.tasks import registry

    for name, task in registry().items():
        print(f"{name:<18} {task.title}: {task.headline}; splits {', '.join(task.splits)}")
        print(f"{'':<18} {task.source.version}, {task.source.url}")
        for line in task.source.layout:
            print(f"{'':<18}   {line}")
