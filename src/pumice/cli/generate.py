"""`pumice data generate` and `pumice data mix`: make training rows with a teacher, or from official files."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from pumice.cli.options import expand, given
from pumice.errors import InputError, WorkError, counted, install
from pumice.files import replacing
from pumice.jsonl import print_json
from pumice.progress import ProgressBar
from pumice.synth.settings import GenerateSettings, read_settings

if TYPE_CHECKING:
    from pumice.synth.context import BadRows, Context
    from pumice.synth.endpoint import Endpoint
    from pumice.synth.journal import Journal
    from pumice.synth.kinds.base import Kind
    from pumice.synth.run import Job
    from pumice.synth.teachers import Teacher


@expand
def generate(
    context: typer.Context,
    out: Annotated[Path, Argument(help="The folder of this run: journal, rows, report.", metavar="OUT")],
    settings: GenerateSettings,
    settings_file: Annotated[
        Path | None, Option("--settings", help="Further settings, YAML.", metavar="FILE.yaml")
    ] = None,
    overrides: Annotated[
        list[str] | None, Option("--set", help="A key of that file; repeat.", metavar="KEY=VALUE")
    ] = None,
    estimate_only: Annotated[bool, Option("--estimate", help="Stop before the first call.")] = False,
    offline: Annotated[bool, Option("--offline", help="No calls: only check again what was said.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print the numbers as one JSON object.")] = False,
) -> None:
    """Have a teacher write instruction data about annotated pictures. Run it again to go on."""
    from pumice.data.rows import ImageFinder
    from pumice.synth import report
    from pumice.synth import run as runs
    from pumice.synth.checks import CheckSettings
    from pumice.synth.context import BadRows
    from pumice.synth.sources import gather
    from pumice.synth.teachers import LocalTeacher, RemoteTeacher

    # 1. Read the settings and check the teacher.
    settings = read_settings(given(context, settings), settings_file, overrides or ())
    endpoint: Endpoint | None = None
    teacher: Teacher
    if settings.teacher == "local":
        if settings.budget_tokens is not None or settings.endpoint:
            raise InputError("a local teacher costs nothing; leave the budget and the endpoint out")
        teacher = LocalTeacher(settings.model, settings.device, settings.parallel, dict(settings.options))
    else:
        endpoint = settings.make_endpoint()
        teacher = RemoteTeacher(endpoint)
    teacher.check()
    _check_libraries()
    # 2. Read the annotations and plan the requests.
    bad_rows = BadRows(settings.max_spoiled)
    finder = ImageFinder(settings.images) if settings.images else None
    contexts = gather(_sources(settings, bad_rows), finder, bad_rows, settings.limit)
    if bad_rows.count:
        text = counted(bad_rows.count, "annotation", "are unusable and left out")
        print(f"{text}; the first: {bad_rows.first[0]}", file=sys.stderr, flush=True)
    language = None if settings.language == "any" else settings.language
    job = runs.Job(
        contexts, _kinds(settings.kind), out, finder, settings.show, settings.examples, settings.told,
        settings.seed, CheckSettings(settings.unsupported, language), settings.similar,
    )  # fmt: skip
    job.check()
    journal, lock = runs.open_journal(out)
    # 3. Ask the teacher what the journal lacks, then check all replies and write rows and report.
    with lock:
        estimate = runs.estimate(job, teacher, journal, endpoint)
        print(f"{counted(len(contexts), 'picture')}: {estimate.sentence()}", file=sys.stderr, flush=True)
        if estimate_only:
            if as_json:
                print_json(vars(estimate))
            return
        stopped = ""
        if not offline and estimate.answered < estimate.requests:
            stopped = _call(job, teacher, journal, estimate.requests - estimate.answered)
        statistics = runs.finish(job, teacher, journal)
        values = statistics.to_dict()
        with replacing(out / "report.json") as file:
            file.write(json.dumps(values, indent=1) + "\n")
        report.write(out / "report.html", statistics, f"Instruction data by {teacher.model}", finder)
    if as_json:
        print_json(values)
    else:
        print(
            f"{counted(statistics.accepted, 'row', of=statistics.total)} survived; see {out / 'report.html'}"
        )
    missing = sum(counts["no reply"] for counts in statistics.reasons.values())
    if missing and not offline:
        remedy = (
            "the budget holds no further call; raise it"
            if stopped == "budget"
            else "run again to ask for them"
        )
        raise WorkError(f"{counted(missing, 'request', 'have', of=statistics.total)} no reply: {remedy}")
    if not statistics.accepted:
        raise WorkError(f"no row of {statistics.total} survived; {out / 'report.html'} says why")


def _call(job: Job, teacher: Teacher, journal: Journal, missing: int) -> str:
    """Have the missing requests answered, with a bar. Return why it ended early, or ""."""
    from pumice.synth.run import call

    calls: Counter[bool] = Counter()  # by whether they were answered
    with ProgressBar(log_seconds=30.0) as bar:

        def progress(message: dict[str, Any]) -> None:
            calls[bool(message["answered"])] += 1
            text = f"{counted(calls[False], 'call')} failed, {sum(message['spent']):,} tokens"
            bar.show(calls[True], missing, "request answered", text)

        return call(job, teacher, journal, progress)


def _check_libraries() -> None:
    from importlib.util import find_spec

    for name in ("datasketch", "py3langid"):
        if find_spec(name) is None:
            raise InputError(f"this needs {name}: {install('generate')}")


def _kinds(names_and_shares: Sequence[str]) -> list[tuple[Kind, float]]:
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


def _sources(settings: GenerateSettings, bad_rows: BadRows) -> list[Iterable[Context]]:
    from pumice.synth import sources

    found: list[Iterable[Context]] = [sources.plain(file, bad_rows) for file in settings.jsonl]
    if settings.flickr30k is not None:
        found.insert(0, sources.flickr30k(settings.flickr30k, bad_rows))
    if settings.visual_genome is not None:
        found.insert(0, sources.visual_genome(settings.visual_genome, bad_rows))
    if settings.coco_captions is not None or settings.coco_instances is not None:
        found.insert(0, sources.coco(settings.coco_captions, settings.coco_instances, bad_rows))
    if not found:
        raise InputError("no annotations are given; name --coco-captions, --jsonl or another source")
    return found


def mix(
    recipe: Annotated[Path, Argument(help="Sources, weights and a seed, YAML.", metavar="MIX.yaml")],
    out: Annotated[Path, Argument(help="The rows to write, .json or .jsonl.", metavar="OUT")],
    seed: Annotated[int | None, Option(help="Instead of the recipe's.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print the manifest.")] = False,
) -> None:
    """Build a mixture of tasks from official files, as LLaVA-1.5 has it; a manifest stands beside it."""
    from pumice.synth.mix.build import build, load

    _check_libraries()
    manifest = build(load(recipe), out, seed)
    if as_json:
        print_json(manifest)
    else:
        for source in manifest["sources"]:
            reference = source["reference"]
            comparison = "" if reference is None else f" (LLaVA-1.5 has {reference['rows']:,})"
            print(f"rows of {source['name']}: {source['rows']:,} of {source['available']:,}{comparison}")
        print(f"rows in {out}: {manifest['rows']:,}")
    for source in manifest["sources"]:
        if source["reference"] and (difference := source["reference"]["sentence"]):
            raise WorkError(difference)
