"""Read, decode and tokenise rows from JSON Lines, parquet and tar, beside `datasets` and transformers.

    python benchmarks/data.py speed                 rows/s of a whole pass to ids and pixels, in one thread
    python benchmarks/data.py size --rows 665000    memory, and time to start, over many rows in 200 files
    python benchmarks/data.py size --rows 665000 --files 0      the same for one JSON Lines file and pictures

Rows are made here: pictures of a photograph's size, with noise that compresses like one. Every row is read
once. The peer gets the same parquet files, the same tokenizer and the same picture policy (CLIP's at 336
pixels). The numbers of ids and the pixels are compared.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIDE = 336
WORDS = "a the cat dog bird tree house river on in beside small large red green blue walks sleeps"


def picture(number: int, size: tuple[int, int]) -> bytes:
    """A JPEG that is as hard to decode as a photograph: smooth areas and some noise."""
    random = np.random.default_rng(number)
    coarse = Image.fromarray(random.integers(0, 255, (9, 12, 3), np.uint8)).resize(
        size, Image.Resampling.BICUBIC
    )
    noisy = np.asarray(coarse, np.int16) + random.integers(-12, 12, (size[1], size[0], 3))
    buffer = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def texts(number: int) -> list[str]:
    random = np.random.default_rng([number, 1])
    return [" ".join(random.choice(WORDS.split(), count)) for count in (12, 60)]


def write_rows(folder: Path, count: int) -> dict[str, Path]:
    """Write `count` rows in every format, and return the paths."""
    from pumice.data.convert import convert
    from pumice.data.rows import ImageFinder, Rows

    (folder / "images").mkdir()
    with (folder / "rows.jsonl").open("w") as file:
        for number in range(count):
            (folder / "images" / f"{number:06}.jpg").write_bytes(picture(number, (640, 480)))
            question, answer = texts(number)
            turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
            file.write(
                json.dumps({"id": str(number), "image": f"images/{number:06}.jpg", "conversations": turns})
                + "\n"
            )
    paths = {"JSON Lines": folder / "rows.jsonl"}
    for name, form in (("parquet", "parquet"), ("WebDataset", "webdataset")):
        convert(Rows(folder / "rows.jsonl"), folder / form, form, ImageFinder(folder))
        paths[name] = folder / form
    return paths


def make_processor(folder: Path) -> Any:
    """Our processor with CLIP's policy and a byte-level tokenizer, which is also saved for the peer."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    from pumice import tokens
    from pumice.config import DecoderConfig, ImagePolicy, ModelConfig, VisionConfig
    from pumice.processor import Processor

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator([WORDS], trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet))
    backend.add_special_tokens(
        [AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>", "<image>")]
    )
    backend.save(str(folder / "tokenizer.json"))
    config = ModelConfig(
        decoder=DecoderConfig(
            vocab_size=backend.get_vocab_size(), width=48, depth=1, heads=4, kv_heads=2, head_dim=12,
            mlp_width=96, context=2048,
        ),
        vision=VisionConfig(
            kind="clip", image_size=SIDE, stride=14, width=48, depth=1, heads=4, mlp_width=96
        ),
        image=ImagePolicy(
            mode="crop", resample="bicubic", mean=(0.48145466, 0.4578275, 0.40821073),
            std=(0.26862954, 0.26130258, 0.27577711),
        ),
        template="chatml",
    )  # fmt: skip
    return Processor(config, tokens.Tokenizer(backend))


def ours(path: Path, folder: Path, processor: Any) -> Iterator[tuple[int, np.ndarray]]:
    from pumice.data.rows import ImageFinder, Rows

    rows, finder = Rows(path), ImageFinder(folder)
    for row in rows:
        sample = processor.training_sample(row.conversation(finder))
        yield len(sample.input_ids), processor.pixels(sample.images, sample.layouts)


def peer(path: Path, folder: Path) -> Iterator[tuple[int, np.ndarray]]:
    """The same rows through `datasets` and a LlavaProcessor of transformers."""
    from datasets import Image as ImageFeature
    from datasets import List, load_dataset
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="<|im_end|>")
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template,
    )  # fmt: skip
    files = str(path / "*.parquet")
    rows = load_dataset("parquet", data_files=files, split="train", streaming=True).cast_column(
        "images", List(ImageFeature())
    )
    names = {"human": "user", "gpt": "assistant"}
    for row in rows:
        messages = [{"role": names[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
        text = processor.apply_chat_template(messages, tokenize=False)
        batch = processor(images=row["images"], text=text, return_tensors="np")
        yield batch["input_ids"].shape[1], batch["pixel_values"]


def measure(
    name: str, rows: Callable[[], Iterator[tuple[int, np.ndarray]]], count: int, rounds: int
) -> float:
    """Return the rows/s of the best of some passes."""
    best = 0.0
    for _ in range(rounds):
        start = time.perf_counter()
        read = sum(1 for _ in rows())
        assert read == count, (read, count)
        best = max(best, count / (time.perf_counter() - start))
    print(f"{name:<46} {best:8.1f} rows/s", flush=True)
    return best


def speed(count: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["PUMICE_CACHE"] = str(folder / "cache")
        paths = write_rows(folder, count)
        processor = make_processor(folder)
        first, other = (
            next(ours(paths["parquet"], folder, processor)),
            next(peer(paths["parquet"], folder)),
        )
        difference = float(np.abs(first[1] - np.asarray(other[1], np.float32)).max())
        print(f"{first[0]} and {other[0]} tokens, pixels differ by at most {difference:.1e}")
        best = {
            form: measure(f"pumice, {form}", lambda path=path: ours(path, folder, processor), count, rounds)
            for form, path in paths.items()
        }
        reference = measure(
            "datasets + transformers, parquet", lambda: peer(paths["parquet"], folder), count, rounds
        )
        for form, value in best.items():
            print(f"{form}: {value / reference:.2f} x")


def resident() -> float:
    """Return this process's own memory in MB, without pages of files."""
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith("RssAnon")).split()[1]) / 1024


def write_many(folder: Path, rows: int, files: int) -> None:
    import pyarrow
    from pyarrow import parquet

    pictures = [picture(n, (32, 24)) for n in range(500)]
    per_file = -(-rows // files)
    for file in range(files):
        numbers = range(file * per_file, min(rows, (file + 1) * per_file))
        values = [
            {
                "id": str(n),
                # A comment in the file makes each picture another one.
                "image": {"bytes": pictures[n % 500] + str(n // 3).encode(), "path": None},
                "conversations": [
                    {"from": "human", "value": f"<image>\nWhat is {n}?"},
                    {"from": "gpt", "value": f"Number {n}."},
                ],
            }
            for n in numbers
        ]
        table = pyarrow.Table.from_pylist(values)
        parquet.write_table(table, folder / f"train-{file:05}-of-{files:05}.parquet", row_group_size=500)


def write_jsonl(folder: Path, rows: int) -> None:
    """Write one file of rows, two about each picture. Pictures are links to 500 files."""
    pictures = [folder / f"{n}.jpg" for n in range(500)]
    words = [texts(n) for n in range(500)]
    for n, path in enumerate(pictures):
        path.write_bytes(picture(n, (32, 24)))
    with (folder / "rows.jsonl").open("w") as file:
        for n in range(rows):
            name = f"images/{n // 2 % 1000:03}/{n // 2:09}.jpg"
            if n % 2 == 0:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.link(pictures[n // 2 % 500], folder / name)
            question, answer = words[n % 500]
            turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
            file.write(json.dumps({"id": str(n), "image": name, "conversations": turns}) + "\n")


def size(rows: int, files: int, step: int) -> None:
    """Start twice, then pass over all rows in the order of an epoch, each time in a process of its own.

    files: of parquet; 0 writes one of JSON Lines.
    """
    with tempfile.TemporaryDirectory(dir=os.environ.get("PUMICE_BENCHMARK_DIR")) as name:
        folder = Path(name)
        environment = os.environ | {"PUMICE_CACHE": str(folder / "cache")}
        path = folder / "rows"
        path.mkdir()
        if files:
            write_many(path, rows, files)
        else:
            write_jsonl(path, rows)
            path /= "rows.jsonl"
        for what in ("first start", "second start", "pass"):
            command = [sys.executable, __file__, "one", str(path), what, "--step", str(step)]
            subprocess.run(command, check=True, env=environment)


def one(path: Path, what: str, step: int) -> None:
    from pumice.data.mixture import Mixture
    from pumice.data.rows import ImageFinder, Rows
    from pumice.images import read_image

    before, start = resident(), time.perf_counter()
    rows, finder = Rows(path), ImageFinder(path.parent)
    mixture = Mixture([(rows, 1.0)])
    groups = mixture.groups(0)
    bad = rows.bad_rows(finder)
    seconds = time.perf_counter() - start
    print(
        f"{what}: {len(rows)} rows, {len(groups)} groups, {bad.sum()} bad, {seconds:.1f} s, "
        f"{resident() - before:.0f} MB",
        flush=True,
    )
    if what != "pass":
        return
    start, shown = time.perf_counter(), 0
    for number in range(len(groups)):
        for source, index in groups[number]:
            row = mixture.rows[source][index]
            shown += 1
            assert read_image(row.find(row.image[0], finder))
        if number % step == 0:
            print(
                f"  {shown} rows, {resident() - before:.0f} MB, "
                f"{shown / (time.perf_counter() - start):.0f} rows/s",
                flush=True,
            )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"  {shown} rows, {resident() - before:.0f} MB above the start, peak of the process {peak:.0f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, default in (("speed", 400), ("size", 665_000)):
        sub = commands.add_parser(name)
        sub.add_argument("--rows", type=int, default=default)
        sub.add_argument("--rounds", type=int, default=2)
        sub.add_argument("--files", type=int, default=200)
        sub.add_argument("--step", type=int, default=40_000)
    sub = commands.add_parser("one")
    sub.add_argument("path", type=Path)
    sub.add_argument("what")
    sub.add_argument("--step", type=int)
    options = parser.parse_args()
    if options.command == "speed":
        speed(options.rows, options.rounds)
    elif options.command == "size":
        size(options.rows, options.files, options.step)
    else:
        one(options.path, options.what, options.step)
