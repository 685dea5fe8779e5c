"""`pumice data generate` and `pumice data mix`: make training rows with a teacher, or from official files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pumice.errors import InputError, WorkError, install
from pumice.progress import StatusLine

if TYPE_CHECKING:
    from pumice.synth.endpoint import Endpoint
    from pumice.synth.kinds.base import Kind
    from pumice.synth.teachers import Teacher


def generate(
    out: Annotated[
        Path, typer.Argument(help="The folder of this run: journal, rows, report.", metavar="OUT")
    ],
    teacher: Annotated[
        str,
        typer.Option(
            help="An OpenAI-compatible address (http://.../v1), or `local` for --model in our engine."
        ),
    ],
    model: Annotated[str, typer.Option("--model", "-m", help="The teacher's name, or a model folder.")],
    coco_captions: Annotated[
        Path | None, typer.Option(help="COCO's captions_*.json.", show_default=False)
    ] = None,
    coco_instances: Annotated[
        Path | None, typer.Option(help="COCO's instances_*.json.", show_default=False)
    ] = None,
    visual_genome: Annotated[
        Path | None, typer.Option(help="A folder with Visual Genome's JSON files.", show_default=False)
    ] = None,
    flickr30k: Annotated[Path | None, typer.Option(help="Flickr30k's captions.", show_default=False)] = None,
    jsonl: Annotated[
        list[Path] | None, typer.Option(help="Lines of {image, captions, boxes, text}.", show_default=False)
    ] = None,
    images: Annotated[
        list[Path] | None,
        typer.Option(help="A folder of the pictures; repeat for several.", show_default=False),
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            help="conversation, detail, reasoning, short-answer, unanswerable, hard-negatives, or a file; "
            "NAME=0.3 for 30% of the pictures. All when none is given.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only so many pictures.", show_default=False)
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Show the teacher the picture too.")] = False,
    show_annotations: Annotated[
        bool, typer.Option("--told/--no-told", help="Tell the teacher the annotations.")
    ] = True,
    examples: Annotated[
        int | None,
        typer.Option(min=0, help="Worked examples in a prompt; all if not given.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Another seed asks everything anew.")] = 0,
    unsupported: Annotated[
        int | None,
        typer.Option(
            help="Things without support that a row may name; by kind if not given.", show_default=False
        ),
    ] = None,
    language: Annotated[str, typer.Option(help="What rows must be written in; `any` for no check.")] = "en",
    similar: Annotated[float, typer.Option(help="Similarity from which a row is a near-duplicate.")] = 0.8,
    max_spoiled: Annotated[int, typer.Option(min=0, help="Spoiled annotations to leave out.")] = 0,
    key_variable: Annotated[
        str, typer.Option("--key-env", help="The environment variable with the endpoint's key.")
    ] = "OPENAI_API_KEY",
    parallel: Annotated[int, typer.Option(help="Calls at once (local: answers together).")] = 16,
    per_minute: Annotated[float | None, typer.Option(help="Calls per minute.", show_default=False)] = None,
    tokens_per_minute: Annotated[
        float | None, typer.Option(help="Tokens per minute.", show_default=False)
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for one call.")] = 120.0,
    attempts: Annotated[int, typer.Option(help="Calls for one request before it is given up.")] = 10,
    backoff: Annotated[float, typer.Option(help="Seconds after the first failure; doubles each time.")] = 1.0,
    budget_tokens: Annotated[
        int | None, typer.Option(help="Tokens, in and out, that this folder may cost.", show_default=False)
    ] = None,
    budget_money: Annotated[
        float | None, typer.Option(help="Money that this folder may cost.", show_default=False)
    ] = None,
    price_in: Annotated[
        float | None, typer.Option(help="Money per million tokens in.", show_default=False)
    ] = None,
    price_out: Annotated[float | None, typer.Option(help="... and out.", show_default=False)] = None,
    image_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens that a shown picture costs at most, for the budget.")
    ] = 1600,
    options: Annotated[
        str | None,
        typer.Option(
            help='Sampling, as JSON: {"temperature": 0.7}; null removes a field.', show_default=False
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Of a local teacher.", show_default=False)] = None,
    estimate_only: Annotated[bool, typer.Option("--estimate", help="Stop before the first call.")] = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="No calls: only check again what was said.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as one JSON object.")] = False,
) -> None:
    """Have a teacher write instruction data about annotated pictures. Run it again to go on."""
    from pumice.data.rows import ImageFinder
    from pumice.files import replacing
    from pumice.synth import report
    from pumice.synth import run as runs
    from pumice.synth.checks import CheckSettings
    from pumice.synth.context import BadRows
    from pumice.synth.endpoint import Endpoint
    from pumice.synth.sources import gather
    from pumice.synth.teachers import LocalTeacher, RemoteTeacher

    # 1. Check the teacher and its options.
    sampling = _options(options)
    endpoint: Endpoint | None = None
    chosen_teacher: Teacher
    if teacher == "local":
        if budget_tokens is not None or budget_money is not None:
            raise InputError("a local teacher costs nothing; leave the budget out")
        chosen_teacher = LocalTeacher(model, device, parallel, sampling)
    else:
        if (price_in is None) != (price_out is None):
            raise InputError("give both --price-in and --price-out, or neither")
        prices = None if price_in is None or price_out is None else (price_in, price_out)
        endpoint = Endpoint(
            teacher, model, key_variable, parallel, per_minute, tokens_per_minute, timeout, attempts,
            backoff=backoff, budget_tokens=budget_tokens, budget_money=budget_money, prices=prices,
            image_tokens=image_tokens,
            options={"temperature": 0.7, **sampling},
        )  # fmt: skip
        chosen_teacher = RemoteTeacher(endpoint)
    chosen_teacher.check()
    _check_libraries()
    # 2. Read the annotations and plan the requests.
    bad_rows = BadRows(max_spoiled)
    finder = ImageFinder(images) if images else None
    kinds = _kinds(kind or [])
    sources = _sources(coco_captions, coco_instances, visual_genome, flickr30k, jsonl or [], bad_rows)
    contexts = gather(sources, finder, bad_rows, limit)
    if bad_rows.count:
        runs.note(
            f"{bad_rows.count} annotations cannot be used and are left out; the first: {bad_rows.first[0]}"
        )
    settings = CheckSettings(unsupported, None if language == "any" else language)
    job = runs.Job(contexts, kinds, out, finder, show, examples, show_annotations, seed, settings, similar)
    job.check()
    journal, lock = runs.open_journal(out)
    # 3. Ask the teacher what the journal lacks, then check all replies and write rows and report.
    with lock:
        estimate = runs.estimate(job, chosen_teacher, journal, endpoint)
        runs.note(f"{len(contexts)} pictures: {estimate.sentence()}")
        if estimate_only:
            if as_json:
                print(json.dumps(vars(estimate)))
            return
        stopped = ""
        if not offline and estimate.answered < estimate.requests:
            counter = _CallCounter(estimate.requests - estimate.answered)
            stopped = runs.call(job, chosen_teacher, journal, counter)
            counter.end()
        statistics = runs.finish(job, chosen_teacher, journal)
        values = statistics.to_dict()
        with replacing(out / "report.json") as file:
            file.write(json.dumps(values, indent=1) + "\n")
        report.write(out / "report.html", statistics, f"Instruction data by {chosen_teacher.model}", finder)
    if as_json:
        print(json.dumps(values))
    else:
        print(f"{statistics.accepted} of {statistics.total} rows survived; see {out / 'report.html'}")
    missing = sum(counts["no reply"] for counts in statistics.reasons.values())
    if missing and not offline:
        remedy = (
            "the budget holds no further call; raise it"
            if stopped == "budget"
            else "run again to ask for them"
        )
        raise WorkError(f"{missing} of {statistics.total} requests have no reply: {remedy}")


class _CallCounter:
    """Counts the calls to a teacher on a status line."""

    def __init__(self, total: int) -> None:
        self.total, self.answered, self.failed, self.spent = total, 0, 0, (0, 0)
        self.line = StatusLine(0.5, log_seconds=30.0)

    def __call__(self, message: dict[str, Any]) -> None:
        self.answered += bool(message["answered"])
        self.failed += not message["answered"]
        self.spent = tuple(message["spent"])
        self.line.show(self._text())

    def end(self) -> None:
        self.line.end(self._text())

    def _text(self) -> str:
        tokens = f"{sum(self.spent):,} tokens"
        return f"{self.answered} of {self.total} answered, {self.failed} calls failed, {tokens}"


def _options(text: str | None) -> dict[str, Any]:
    try:
        values = json.loads(text) if text else {}
    except ValueError as error:
        raise InputError(f"--options {text} is not JSON ({error}); quote it for the shell") from error
    if not isinstance(values, dict):
        raise InputError(f"--options {text} is not a JSON object; write names and values")
    return values


def _check_libraries() -> None:
    from importlib.util import find_spec

    for name in ("ijson", "datasketch", "py3langid"):
        if find_spec(name) is None:
            raise InputError(f"this needs {name}: {install('generate')}")


def _kinds(names_and_shares: list[str]) -> list[tuple[Kind, float]]:
    from pumice.synth.kinds import builtin, get

    if not names_and_shares:
        return [(kind, 1.0) for kind in builtin().values()]
    chosen = []
    for text in names_and_shares:
        name, separator, share = text.partition("=")
        try:
            chosen.append((get(name), float(share) if separator else 1.0))
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"--kind {text}: the share must be a number; write {name}=0.5") from error
    return chosen


def _sources(
    captions: Path | None,
    instances: Path | None,
    genome: Path | None,
    flickr: Path | None,
    plain: list[Path],
    bad_rows: Any,
) -> list[Any]:
    from pumice.synth import sources

    all_sources: list[Any] = []
    if captions is not None or instances is not None:
        all_sources.append(sources.coco(captions, instances, bad_rows))
    if genome is not None:
        all_sources.append(sources.visual_genome(genome, bad_rows))
    if flickr is not None:
        all_sources.append(sources.flickr30k(flickr, bad_rows))
    all_sources += [sources.plain(file, bad_rows) for file in plain]
    if not all_sources:
        raise InputError("no annotations are given; name --coco-captions, --jsonl or another source")
    return all_sources


def mix(
    recipe: Annotated[Path, typer.Argument(help="Sources, weights and a seed, YAML.", metavar="MIX.yaml")],
    out: Annotated[Path, typer.Argument(help="The rows to write, .json or .jsonl.", metavar="OUT")],
    seed: Annotated[int | None, typer.Option(help="Instead of the recipe's.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest.")] = False,
) -> None:
    """Build a mixture of tasks from official files, as LLaVA-1.5 has it; a manifest stands beside it."""
    from pumice.synth.mix.build import build, load

    _check_libraries()
    manifest = build(load(recipe), out, seed)
    if as_json:
        print(json.dumps(manifest))
    else:
        for source in manifest["sources"]:
            reference = source["reference"]
            comparison = "" if reference is None else f" (LLaVA-1.5 has {reference['rows']:,})"
            print(f"{source['name']}: {source['rows']:,} rows of {source['available']:,}{comparison}")
        print(f"{manifest['rows']:,} rows in {out}")
    differences = [
        s["reference"]["sentence"]
        for s in manifest["sources"]
        if s["reference"] and s["reference"]["sentence"]
    ]
    if differences:
        raise WorkError(differences[0])
