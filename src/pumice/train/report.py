"""Report a training run: a progress bar, `metrics.jsonl`, and a plot of the loss at the end."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from pumice.errors import CAUSE, install, wrong_input
from pumice.files import hold, replacing, whole_lines
from pumice.progress import ProgressBar, can_redraw
from pumice.train.recipe import Recipe
from pumice.train.trackers import TRACKERS, WRITTEN

# Files in the run's folder.
CHECKPOINTS, LOCK, RECIPE, METRICS, PLOT = "checkpoints", ".lock", "recipe.yaml", "metrics.jsonl", "loss.png"
LOG_SECONDS = 30.0  # between two lines where no bar can be drawn
# The types of what is read back of an event.
_NUMBERS, _TEXTS = ("step", "loss", "held_out_loss"), ("question", "reference", "answer")


class TrainingReport:
    """Lines for people on stderr, one JSON object per event in `metrics.jsonl`."""

    def __init__(
        self,
        recipe: Recipe,
        description: list[str],
        step: int,
        steps: int,
        peak: float | None = None,
        enabled: bool = True,
    ) -> None:
        """Open the report of a run that starts or resumes at `step` of `steps`.

        description: lines to print first. peak: FLOP/s of all devices together; None where unknown.
        enabled: False on every process but the first, so that each line appears once.
        """
        # 1. Open the files. A resumed run first removes the metrics of the steps that it will repeat.
        self.peak, self.enabled, self.steps = peak, enabled, steps
        self.path = recipe.output / METRICS
        if enabled:
            recipe.output.mkdir(parents=True, exist_ok=True)
            self._drop_after(step)
            # The file holds every default and override, so that it alone repeats the run.
            with replacing(recipe.output / RECIPE) as file:
                yaml.safe_dump(recipe.stored(), file, sort_keys=False, allow_unicode=True)
        # 2. Say what learns before the first step, while stopping costs nothing.
        for line in description:
            self.print(line)
        if step:
            self.print(f"resuming at step {step} of {steps}")
        if find_spec("matplotlib") is None:
            self.print(
                f"no {PLOT} at the end, as it needs matplotlib ({install('plot')}); with it, the same "
                "command draws the picture of a finished run"
            )
        self._bar = ProgressBar(log_seconds=LOG_SECONDS)
        # The time left follows from the steps of this process alone; earlier ones may have run elsewhere.
        self._first_step, self._started = step, time.monotonic()
        self._trackers = [TRACKERS[name](recipe) for name in recipe.trackers if enabled]

    def __enter__(self) -> TrainingReport:
        if self.enabled:
            self._bar.show(self._first_step, self.steps, "step")
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        for tracker in self._trackers:
            tracker.close()

    def step(
        self, step: int, values: dict[str, Any], tokens: int, seconds: float, flops: float | None = None
    ) -> None:
        """Report one optimiser step. seconds: its time; flops: floating-point operations that it needs."""
        speed = tokens / seconds
        event = {"step": step, **values, "tokens": tokens, "seconds": seconds}
        note = f"loss {values['loss']:.3f}  {speed:.0f} tokens/s"
        if flops and self.peak:
            event["peak_share"] = flops / seconds / self.peak
            note += f"  {event['peak_share']:.0%} of peak"
        self._write(event)
        if not can_redraw() and step < self.steps:  # a bar says itself what is left
            elapsed = time.monotonic() - self._started
            note += "  " + time_left((self.steps - step) * elapsed / (step - self._first_step))
        if self.enabled:
            self._bar.show(step, self.steps, "step", note)

    def held_out(self, step: int, loss: float) -> None:
        """Report the mean loss of the held-out rows, in nats per supervised token."""
        self._write({"step": step, "held_out_loss": loss})
        self.print(f"step {step}: held-out loss {loss:.4f}")

    def answer(self, step: int, question: str, reference: str, answer: str) -> None:
        """Report the model's answer to a held-out question beside the row's own answer."""
        self._write({"step": step, "question": question, "reference": reference, "answer": answer})
        self.print(f"  {question!r}\n    reference: {reference!r}\n    answer:    {answer!r}")

    def print(self, line: str) -> None:
        """Print a line for people."""
        if self.enabled:
            print(line, file=sys.stderr, flush=True)

    def answers(self) -> list[dict[str, Any]]:
        """Return the sample answers of the first and of the last measurement: before and after."""
        events = [event for event in read_metrics(self.path) if "answer" in event]
        first_and_last = {event["step"] for event in (events[:1] + events[-1:])}
        return [event for event in events if event["step"] in first_and_last]

    def _write(self, event: dict[str, Any]) -> None:
        if not self.enabled:
            return
        # Trackers draw curves, so they get the numbers alone; questions and answers stay in the file.
        numbers = {key: value for key, value in event.items() if isinstance(value, int | float)}
        for tracker in self._trackers:
            tracker.log(event["step"], {k: float(v) for k, v in numbers.items() if k != "step"})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    def _drop_after(self, step: int) -> None:
        """Drop the metrics after `step`: the resumed run writes them again. Drop all at step 0."""
        events = [event for event in read_metrics(self.path) if step and event["step"] <= step]
        # A crash during this write leaves the old file whole.
        with replacing(self.path) as file:
            file.writelines(json.dumps(event) + "\n" for event in events)


@contextlib.contextmanager
def output_folder(output: Path, has_begun: Callable[[], bool]) -> Iterator[None]:
    """Make a run's output folder, and lock it so that no second run writes there.

    What the run wrote is removed if it ends before its first step. In any case the lock is removed, and so
    are folders that the run made, also above `output`, and that hold nothing. has_begun: whether it has done
    a step, or resumes. Raises InputError if the folder cannot be made or another run uses it.
    """
    with contextlib.ExitStack() as stack:
        with wrong_input(OSError, f"the output folder {output} cannot be made: {CAUSE}; name another"):
            new = [*takewhile(lambda path: not path.exists(), (output, *output.parents))]
            stack.callback(_remove_empty, new)
            before: set[Path] = set() if new else {*output.iterdir()}
            (output / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            lock = hold(output / LOCK, f"using the output folder {output}")

        def clear() -> None:
            names = () if has_begun() else (CHECKPOINTS, RECIPE, METRICS, *WRITTEN)
            for path in {output / name for name in names} - before:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
            _remove_empty({output / CHECKPOINTS} - before)

        stack.callback((output / LOCK).unlink, missing_ok=True)  # Windows removes no open file
        stack.enter_context(lock)
        # While it holds the lock: afterwards another run may have begun to write there.
        stack.callback(clear)
        yield


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # it holds something, or is gone
            folder.rmdir()


def draw_loss(output: Path) -> None:
    """Draw `loss.png` of a run in its folder; do nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return  # as was said before the first step
    events = read_metrics(output / METRICS)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, style in (("loss", {"lw": 0.8, "alpha": 0.6}), ("held_out_loss", {"lw": 2, "marker": "o"})):
        points = [(e["step"], e[key]) for e in events if key in e]
        if points:
            label = key.replace("_", "-").replace("-loss", " loss")
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set(xlabel="optimiser step", ylabel="loss per supervised token (nats)")
    axes.legend()
    figure.savefig(output / PLOT, dpi=120)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the events of a metrics file, without a last line that a crash cut off.

    Returns an empty list without a file. Raises InputError where another line is damaged.
    """
    if not path.exists():
        return []
    damaged = (ValueError, RecursionError)
    with wrong_input(damaged, f"{path} is damaged ({CAUSE}); remove it; the checkpoints do not need it"):
        events = [json.loads(line) for line in whole_lines(path)]
        if not all(map(_is_event, events)):
            raise ValueError("a line is no event of a step")
    return events


def _is_event(event: Any) -> bool:
    """Return whether a line of a metrics file holds what the report wrote, as far as it is read back."""
    if not isinstance(event, dict) or type(event.get("step")) is not int or abs(event["step"]) > 1 << 53:
        return False
    numbers, texts = ([event[key] for key in keys if key in event] for keys in (_NUMBERS, _TEXTS))
    if texts and len(texts) < len(_TEXTS):
        return False
    return all(type(n) in (int, float) for n in numbers) and all(isinstance(text, str) for text in texts)


def time_left(seconds: float) -> str:
    return f"{seconds / 60:.0f} min left" if seconds >= 60 else f"{seconds:.0f} s left"
