"""Measure answers about pictures per second, beside transformers with the same weights in the same run.

    OMP_WAIT_POLICY=ACTIVE python benchmarks/serve.py [questions] [turn] [pope] [--quick] [--theirs N]

questions: 6 short questions on each of 50 pictures, questions per second; transformers' generate gets them
in left-padded batches. turn: a second question in a conversation about a picture, seconds to the first
token; transformers gets the whole conversation again. pope: 18 yes/no questions on each of 50 pictures, by
way of what `pumice eval` asks through. Weights are random (CLIP-ViT-B/16 at 224 px, an MLP, SmolLM2-135M),
greedy, fp32, answers of a fixed length; the answers of both are compared. A ratio above 1 is in our favour.
--theirs gives transformers the first N pictures only, which takes minutes off: it reads every question from
its first token on, so that its questions per second do not depend on how many there are.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pumice.assistant import SLOTS, Assistant, conversation_of, load
from pumice.config import ConnectorConfig, DecoderConfig, ImagePolicy, ModelConfig, VisionConfig
from pumice.engine.reply import Reply
from pumice.evaluate.files import ImageFile
from pumice.evaluate.run import LocalAnswerer
from pumice.evaluate.task import SHORT, Question
from pumice.formats.export import export
from pumice.formats.load import open_model
from pumice.formats.pumice.folder import save
from pumice.model.llava import Llava
from pumice.storage.parts import LoadedParts
from pumice.storage.tensors import as_lazy

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from architectures import CLIP_MEAN, CLIP_STD, picture

CONFIG = ModelConfig(
    decoder=DecoderConfig(
        vocab_size=49152, width=576, depth=30, heads=9, kv_heads=3, head_dim=64, mlp_width=1536,
        context=2048, rope_theta=100000.0, tied_head=True,
    ),
    vision=VisionConfig(
        kind="clip", image_size=224, width=768, stride=16, depth=12, heads=12, mlp_width=3072
    ),
    connector=ConnectorConfig(),
    image=ImagePolicy("squash", CLIP_MEAN, CLIP_STD),
    template="chatml",
)  # fmt: skip

QUESTIONS = (
    "What is this?",
    "What color is it?",
    "Is it day or night?",
    "How many people are there?",
    "Where was this taken?",
    "What is in the background?",
)
THINGS = (
    "dog", "cat", "person", "car", "chair", "table", "tree", "bottle", "bird", "boat", "horse", "cup", "bus",
    "train", "clock", "ball", "book", "bed",
)  # fmt: skip
SAID = "It is a small dog on a lawn."  # the answer of the first turn
TOKENS = {"questions": 5, "pope": 2}  # of an answer: a word or two and the end, "Yes" and the end
BATCHES = (6, 18)  # questions in one batch of transformers; the faster counts


def random_model(folder: Path) -> LoadedParts:
    """The model of all figures, random, in a folder."""
    tokenizer = open_model("pumice-tiny").processor.tokenizer.backend
    torch.manual_seed(0)
    model = Llava(CONFIG)
    torch.nn.init.normal_(model.decoder.embed.weight, std=0.1)
    for parameter in model.decoder.blocks.parameters():
        if parameter.dim() == 2:  # so large that what is seen decides what is said
            torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)
    state = {name: value.detach() for name, value in model.state_dict().items()}
    save(folder, CONFIG, state, tokenizer=tokenizer.to_str())
    return LoadedParts(CONFIG, {name: as_lazy(value) for name, value in state.items()}, tokenizer, {})


def make(folder: Path) -> tuple[Assistant, Any, Any]:
    """(ours, their model, their processor) with the same random weights."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    export(random_model(folder / "ours"), "hf", folder / "theirs")
    ours = load(folder / "ours", device="cpu", quantize=None, dtype=torch.float32)
    theirs = LlavaForConditionalGeneration.from_pretrained(folder / "theirs", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder / "theirs")
    processor.tokenizer.padding_side, processor.tokenizer.pad_token = "left", "<|im_end|>"
    return ours, theirs, processor


def their_prompt(processor: Any, turns: Sequence[str]) -> str:
    """A conversation about one picture, as their template writes it."""
    first, *rest = turns
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": first}]}
    ]
    for number, text in enumerate(rest):
        role = "user" if number % 2 else "assistant"
        messages.append({"role": role, "content": [{"type": "text", "text": text}]})
    text: str = processor.apply_chat_template(messages, add_generation_prompt=True)
    return text


def their_answers(
    model: Any, processor: Any, rows: Sequence[tuple[Image.Image, str]], tokens: int, batch: int
) -> list[str]:
    answers: list[str] = []
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        texts = [their_prompt(processor, [question]) for _, question in part]
        inputs = processor(images=[image for image, _ in part], text=texts, return_tensors="pt", padding=True)
        with torch.inference_mode():
            generated = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=None)
        answers += processor.batch_decode(
            generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=False
        )
    return answers


def timed(work: Any, *arguments: Any) -> tuple[Any, float]:
    gc.collect()
    start = time.perf_counter()
    done = work(*arguments)
    return done, time.perf_counter() - start


def shown(count: int) -> list[Image.Image]:
    return [picture(320 + 8 * (n % 7), 240 + 8 * (n % 5), seed=n) for n in range(count)]


def report(name: str, ours: str, theirs: str, ratio: float, aim: str, same: str) -> None:
    print(f"| {name} | {ours} | {theirs} | {ratio:.2f} | {aim} | {same} |", flush=True)


def compare(
    name: str, ours: Sequence[Any], seconds: float, pair: tuple[Any, Any],
    rows: Sequence[tuple[Image.Image, str]], tokens: int, first: int,
) -> None:  # fmt: skip
    """Our answers and their time against transformers' best batch size, tried on the first pictures.

    first: how many rows transformers gets.
    """
    model, processor = pair
    best = BATCHES[0]
    if len(BATCHES) > 1:
        tries = {
            b: timed(their_answers, model, processor, rows[: max(BATCHES)], tokens, b)[1] for b in BATCHES
        }
        best = min(tries, key=lambda b: tries[b])
    theirs, their_seconds = timed(their_answers, model, processor, rows[:first], tokens, best)
    same = sum(ours_one == their_one for ours_one, their_one in zip(ours, theirs, strict=False))
    speed, their_speed = len(rows) / seconds, len(theirs) / their_seconds
    some = "" if len(theirs) == len(rows) else f", the first {len(theirs)}"
    report(
        f"{name}, questions/s", f"{speed:.2f}", f"{their_speed:.2f} (batches of {best}{some})",
        speed / their_speed, ">= 6", f"{same} of {len(theirs)}, {len(set(ours))} different",
    )  # fmt: skip


def warm(ours: Assistant, image: Image.Image) -> None:
    """The first call of either costs more."""
    ours.ask_many([(image, QUESTIONS[0])], max_new_tokens=2)
    ours.engine.forget()


def questions(ours: Assistant, pair: tuple[Any, Any], pictures: int, theirs: int) -> None:
    tokens = TOKENS["questions"]
    rows = [(image, question) for image in shown(pictures) for question in QUESTIONS]
    warm(ours, rows[0][0])
    answers, seconds = timed(lambda: ours.ask_many(rows, max_new_tokens=tokens))
    name = f"{len(QUESTIONS)} questions on each of {pictures} pictures"
    compare(name, answers, seconds, pair, rows, tokens, theirs * len(QUESTIONS))


def pope(ours: Assistant, pair: tuple[Any, Any], pictures: int, theirs: int) -> None:
    tokens = TOKENS["pope"]
    with tempfile.TemporaryDirectory() as folder:
        asked, rows = [], []
        for number, image in enumerate(shown(pictures)):
            path = Path(folder) / f"{number}.png"
            image.save(path)
            source = ImageFile(path.name, lambda path=path: path)
            for thing in THINGS:
                text = f"Is there a {thing} in the image?\n{SHORT}"
                asked.append(Question(f"{number} {thing}", (source,), text))
                rows.append((image, text))
        warm(ours, rows[0][0])
        answerer = LocalAnswerer(ours, "ours", slots=SLOTS)
        answers, seconds = timed(lambda: list(answerer.answer(asked, tokens)))
    name = f"{len(THINGS)} questions on each of {pictures} pictures"
    compare(name, answers, seconds, pair, rows, tokens, theirs * len(THINGS))


class Saying:
    """A constraint on an answer: these tokens, so that a random model says something that people would."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = list(ids)

    def allowed(self) -> torch.Tensor:
        return torch.arange(CONFIG.decoder.vocab_size) == self.ids[0]

    def accept(self, token: int) -> None:
        del self.ids[0]


def turn(ours: Assistant, pair: tuple[Any, Any], pictures: int, _: int) -> None:
    model, processor = pair
    our_times, their_times, same = [], [], 0
    for image in shown(pictures):
        first: list[dict[str, Any]] = [
            {
                "role": "user",
                "content": [{"type": "image", "image": image}, {"type": "text", "text": QUESTIONS[0]}],
            }
        ]
        ids = ours.processor.tokenizer.backend.encode(SAID).ids
        prompt = ours.prompt(conversation_of(first), max_new_tokens=len(ids))
        prompt = dataclasses.replace(prompt, constraint=lambda ids=ids: Saying(ids))
        reply = "".join(Reply(ours.engine, ours.processor.tokenizer.decode, prompt))
        assert reply == SAID
        again = [*first, {"role": "assistant", "content": reply}, {"role": "user", "content": QUESTIONS[1]}]
        (piece, took) = timed(lambda again=again: "".join(ours.stream(again, max_new_tokens=1)))
        our_times.append(took)
        text = their_prompt(processor, [QUESTIONS[0], reply, QUESTIONS[1]])

        def ask_them(text: str = text, image: Image.Image = image) -> str:
            inputs = processor(images=image, text=text, return_tensors="pt")
            with torch.inference_mode():
                generated = model.generate(**inputs, max_new_tokens=1, do_sample=False, eos_token_id=None)
            answer: str = processor.decode(generated[0, -1], skip_special_tokens=False)
            return answer

        their_piece, took = timed(ask_them)
        their_times.append(took)
        same += piece == their_piece
    ours_median, theirs_median = statistics.median(our_times), statistics.median(their_times)
    report(
        "second turn, seconds to the first token", f"{ours_median:.3f}", f"{theirs_median:.3f}",
        theirs_median / ours_median, ">= 10", f"{same} of {pictures}",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    figures = {"questions": (questions, 50, 4), "turn": (turn, 12, 5), "pope": (pope, 50, 2)}
    parser.add_argument("figures", nargs="*", help=f"of {', '.join(figures)}; all when none is named")
    parser.add_argument("--quick", action="store_true", help="fewer pictures: about a minute for each figure")
    parser.add_argument("--theirs", type=int, help="pictures that transformers gets; all when not given")
    arguments = parser.parse_args()
    if unknown := set(arguments.figures) - set(figures):
        parser.error(f"there is no figure {', '.join(sorted(unknown))}; use {', '.join(figures)}")
    with tempfile.TemporaryDirectory() as folder:
        ours, *pair = make(Path(folder))
        policy = os.environ.get("OMP_WAIT_POLICY", "not set")
        print(f"threads {torch.get_num_threads()}, OMP_WAIT_POLICY {policy}")
        print("| figure | pumice | transformers | ratio | aim | same answers |\n|---|---|---|---|---|---|")
        for name in arguments.figures or figures:
            run, many, few = figures[name]
            pictures = few if arguments.quick else many
            run(ours, (pair[0], pair[1]), pictures, min(pictures, arguments.theirs or pictures))


if __name__ == "__main__":
    main()
