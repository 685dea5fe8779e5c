"""`pumice eval`: score answers to a benchmark, from a file or from a model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from pumice.cli import options
from pumice.errors import InputError, check_known, counted
from pumice.files import replacing
from pumice.jsonl import print_json
from pumice.progress import LOG_SECONDS, ProgressBar

if TYPE_CHECKING:
    from pumice.evaluate.result import AnswerSet, QuestionSet
    from pumice.evaluate.run import Answerer
    from pumice.evaluate.task import Task

SLOTS = 16


def evaluate(
    task: Annotated[str | None, Argument(help="A benchmark; --list names them.")] = None,
    data: Annotated[Path | None, Option(help="The folder with the official files.", metavar="DIR")] = None,
    predictions: Annotated[
        Path | None, Option(help="Answers to score (ours or LLaVA's); with --model, where they are kept.")
    ] = None,
    model: Annotated[
        str | None, Option("--model", "-m", help="A model folder, a built-in name, or http://HOST/v1.")
    ] = None,
    model_name: Annotated[str | None, Option(help="The model's name at an address.")] = None,
    split: Annotated[str | None, Option(help="Another split than the first.")] = None,
    json_file: Annotated[
        Path | None, Option("--json", help="Write the result here; - prints it.", metavar="FILE")
    ] = None,
    report: Annotated[
        Path | None, Option(help="Write a page with numbers and pictures.", metavar="FILE")
    ] = None,
    other_results: Annotated[
        list[Path] | None, Option("--with", help="Results of other tasks for the page; repeat.")
    ] = None,
    compare: Annotated[
        Path | None, Option(help="Other answers, which those of --predictions are measured against.")
    ] = None,
    submission: Annotated[Path | None, Option(help="Write what the benchmark's server takes.")] = None,
    reference: Annotated[
        str | None, Option(help="Whose published number this should be, such as LLaVA-1.5-7B.")
    ] = None,
    limit: Annotated[int | None, Option(help="Only the first questions; marked as partial.")] = None,
    allow_missing: Annotated[
        bool, Option("--allow-missing", help="Score what there is; marked as partial.")
    ] = False,
    reviews: Annotated[Path | None, Option(help="The judge's replies: read, and new ones added.")] = None,
    judge_url: Annotated[str | None, Option(help="The judge's OpenAI-compatible address.")] = None,
    judge_model: Annotated[str | None, Option(help="The judge's name there.")] = None,
    max_new_tokens: Annotated[
        int | None, Option(min=1, help="The longest answer, in tokens; else the benchmark's own.")
    ] = None,
    boxes: Annotated[
        str | None,
        Option(
            help="How answers write boxes: padded, picture, qwen, pixels; by default as --model does.",
            metavar="FORM",
        ),
    ] = None,
    slots: Annotated[
        int | None, Option(min=1, help=f"Questions answered at a time; {SLOTS} if not given.")
    ] = None,
    device: options.Device = None,
    show_list: Annotated[bool, Option("--list", help="Name the benchmarks and their files.")] = False,
) -> None:
    """Score answers to a benchmark, or let a model answer and score it.

    pumice eval pope --data pope/ --predictions answers.jsonl
    """
    from pumice.evaluate import result
    from pumice.evaluate.run import check_images, run
    from pumice.evaluate.tasks import get_task

    # 1. Check all options before a model is loaded.
    if show_list:
        _print_list()
        return
    if task is None:
        raise InputError(
            "there is no task; write for example: pumice eval pope --data DIR --predictions FILE"
        )
    benchmark = get_task(task, split)
    if data is None:
        raise InputError(
            f"--data is missing; {task} needs {benchmark.source.expected_files} from {benchmark.source.url}"
        )
    if predictions is None:
        raise InputError("--predictions is missing; name the file of answers (with --model it is written)")
    if reference is not None:
        if not benchmark.source.published:
            raise InputError(f"no numbers of {task} are published; leave out --reference")
        check_known(reference, benchmark.source.published, f"no number of {reference!r} is known for {task}")
    answering = {
        "--max-new-tokens": max_new_tokens, "--model-name": model_name, "--slots": slots, "--device": device
    }  # fmt: skip
    for option, value in answering.items():
        if value is not None and model is None:
            raise InputError(f"{option} is for a model that answers; add --model, or leave it out")
    if device is not None and model is not None and model.startswith(("http://", "https://")):
        raise InputError(f"--device is for a model of this machine, not for {model}; leave it out")
    for option, given in (("--reference", reference), ("--with", other_results)):
        if given and compare is not None:
            raise InputError(f"{option} does nothing beside --compare; leave it out")
    if other_results and report is None:
        raise InputError("--with adds results to a page; add --report FILE, or leave it out")
    if boxes is not None and not benchmark.has_boxes:
        raise InputError(f"{task} has no boxes; leave out --boxes")
    if compare is not None and model is not None:
        raise InputError("--compare is for two files of answers; leave out --model")
    if compare is not None and predictions.exists() and compare.exists() and predictions.samefile(compare):
        raise InputError(f"--predictions and --compare are one file, '{compare}'; name two files of answers")
    _check_outputs(json_file, report, submission)
    _check_no_overwrite(
        [predictions, data, compare, reviews, *(other_results or ())], [json_file, report, submission]
    )
    other_values = [result.read_result(path) for path in other_results or ()]
    _set_judge(benchmark, reviews, judge_url, judge_model)
    _set_boxes(benchmark, boxes, model)

    # 2. Read the questions, and let the model answer them.
    asked = result.read_questions(benchmark, data, limit, keep_images=model is not None)
    if model is not None:
        if missing := check_images(asked.questions, allow_missing=allow_missing):
            print(
                f"pumice: {counted(missing, 'picture', 'are')} missing; no question about a missing one is "
                "answered",
                file=sys.stderr,
            )
        answerer = _answerer(model, model_name, device, slots or SLOTS)
        with ProgressBar(log_seconds=LOG_SECONDS) as bar:
            scores_here = run(
                benchmark, asked.questions, answerer, predictions,
                allow_missing=allow_missing, progress=bar.show, max_new_tokens=max_new_tokens,
            )  # fmt: skip
        if not scores_here:
            return  # another process of torchrun scores the answers
    answers = result.read_answers(asked, predictions, allow_missing=allow_missing)
    # 3. Write a submission, compare two files of answers, or score one.
    if submission is not None:
        benchmark.submission(answers.answered, submission, data)
        print(f"wrote {submission}", file=sys.stderr)
    if compare is not None:
        _compare(benchmark, data, asked, answers, predictions, compare, json_file, report, allow_missing)
        return
    try:
        score = benchmark.score(answers.answered)
    except InputError:
        if submission is None:
            raise
        print(f"{benchmark.title} {benchmark.split} is scored by its server", file=sys.stderr)
        return
    values = result.make_result(benchmark, asked, answers, score, reference)
    if report is not None:
        from pumice.evaluate.report import cards, page

        example_cards = cards(benchmark, data, answers.answered, score.values, answers.model)
        with replacing(report) as file:
            file.write(page([values, *other_values], example_cards))
    _print(values, json_file, result.format_result(values))


def _print(values: dict[str, Any], json_file: Path | None, words: str) -> None:
    from pumice.evaluate.files import write_json

    if json_file is not None and str(json_file) == "-":
        print_json(values)
        return
    if json_file is not None:
        write_json(json_file, values, indent=2)
    print(words)


def _check_outputs(json_file: Path | None, report: Path | None, submission: Path | None) -> None:
    for path in (json_file, report):
        if path is not None and path.is_dir():
            raise InputError(f"'{path}' is a folder; name a file")
    for path in (json_file, report, submission):
        if path is not None and str(path) != "-" and not path.absolute().parent.is_dir():
            raise InputError(f"the folder '{path.parent}' of '{path.name}' does not exist; make it first")


def _check_no_overwrite(inputs: Sequence[Path | None], outputs: Sequence[Path | None]) -> None:
    """Raise InputError if an output is also an input or another output."""
    used_paths = {path.resolve() for path in inputs if path is not None}
    for path in outputs:
        if path is None or str(path) == "-":
            continue
        if path.resolve() in used_paths:
            raise InputError(f"'{path}' is named twice, and would be overwritten; name another file")
        used_paths.add(path.resolve())


def _set_judge(task: Task, reviews: Path | None, url: str | None, model: str | None) -> None:
    from pumice.evaluate.judge import Judge, JudgedTask
    from pumice.evaluate.run import endpoint_at

    if (url is None) != (model is None):
        raise InputError("--judge-url and --judge-model belong together; give both")
    if not isinstance(task, JudgedTask):
        if url is not None or reviews is not None:
            raise InputError(f"{task.name} needs no judge; leave out --judge-url and --reviews")
        return
    endpoint = endpoint_at(url, model, parallel=4) if url is not None and model is not None else None
    if endpoint is not None or reviews is not None:
        task.judge = Judge(reviews, endpoint)


def _set_boxes(task: Task, form: str | None, model: str | None) -> None:
    """Say how answers write boxes: as --boxes names it, else as the model of this machine writes them."""
    from pumice.media import check_box_form

    if form is not None:
        check_box_form(form)
    if model is not None and not model.startswith(("http://", "https://")) and task.has_boxes:
        from pumice.formats.read import read_model

        task.box_model = read_model(model).config
        task.box_form = task.box_model.boxes
    task.box_form = form or task.box_form


def _answerer(model: str, model_name: str | None, device: str | None, slots: int) -> Answerer:
    from pumice.evaluate.run import EndpointAnswerer, LocalAnswerer, endpoint_at

    if model.startswith(("http://", "https://")):
        if model_name is None:
            raise InputError("--model is an address; name its model there with --model-name")
        return EndpointAnswerer(endpoint_at(model, model_name, slots))
    options.share_cores()
    from pumice.assistant import load

    return LocalAnswerer(load(model, device=device), model_name or model, slots)


def _compare(
    task: Task,
    data: Path,
    asked: QuestionSet,
    first: AnswerSet,
    first_path: Path,
    second_path: Path,
    json_file: Path | None,
    report: Path | None,
    allow_missing: bool,
) -> None:
    from pumice.evaluate import compare
    from pumice.evaluate.result import read_answers

    second = read_answers(asked, second_path, allow_missing=allow_missing)
    same_name = first_path.name == second_path.name
    files = (str(first_path), str(second_path)) if same_name else (first_path.name, second_path.name)
    names = (first.model, second.model)
    if names[0] == names[1]:
        names = (f"{names[0]} in {files[0]}", f"{names[1]} in {files[1]}")
    # Only questions that both files answer can be compared.
    both_answered = first.answered, second.answered
    common_ids = set.intersection(*({question.id for question, _ in answered} for answered in both_answered))
    first_answers, second_answers = (
        [answer for answer in answered if answer.question.id in common_ids] for answered in both_answered
    )
    if not common_ids:
        raise InputError(
            f"{files[0]} and {files[1]} answer no question in common; compare answers to the same"
        )
    values = compare.compare(task, first_answers, second_answers, names, files)
    values["partial"] = len(common_ids) < asked.total
    values["why_partial"] = counted(len(common_ids), "question", of=asked.total) if values["partial"] else ""
    words = compare.format_comparison(values) + (
        f"\n  PARTIAL: {values['why_partial']}" if values["partial"] else ""
    )
    _print(values, json_file, words)
    if report is not None:
        from pumice.evaluate.report import compare_page, compared_cards

        with replacing(report) as file:
            file.write(compare_page(values, compared_cards(task, data, first_answers, second_answers, names)))


def _print_list() -> None:
    from pumice.evaluate.tasks import registry

    for name, task in registry().items():
        print(f"{name:<18} {task.title}: {task.headline}; splits {', '.join(task.splits)}")
        print(f"{'':<18} {task.source.version}, {task.source.url}")
        for line in task.source.files:
            print(f"{'':<18}   {line}")
