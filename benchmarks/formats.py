"""Every format against every architecture: the numbers, the answers and the bytes that come back.

    python benchmarks/formats.py [--types] [--json] [--only PART ...]

For each architecture a tiny random model is written in Pumice's own folder, exported to each format, read
back from it, and, where they are installed, run by transformers (hf), PEFT (peft) and llama.cpp (gguf, by
the package xllamacpp). A cell says:

    difference   the largest absolute difference of logits on one picture and question; for llama.cpp of
                 log-probabilities, which is what it gives
    greedy       whether the next tokens are the same
    bytes        whether importing what was exported gives every tensor back, bit for bit
    refused      why the format cannot hold the model

--types writes every type of GGUF instead, of models 256 wide, with the half that sees in f16, and reads it
back. A cell says how far the logits of what was read back are from the model's, and how far Pumice's
quantised weights and llama.cpp are from what was read back (see `TypeCell`).
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image
from torch import Tensor

from pumice.assistant import Assistant
from pumice.conversation import Conversation, user_message
from pumice.engine.generate import naive_generate
from pumice.errors import InputError
from pumice.formats.export import FORMATS, export, merge_and_compare
from pumice.formats.gguf import write as gguf_write
from pumice.formats.load import build
from pumice.formats.read import read_model
from pumice.model.vision import ViT
from pumice.storage.parts import LoadedParts

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from architectures import ARCHITECTURES, assistant, picture, tiny

QUESTION = "What is in the picture?"
NEW_TOKENS = 12


_WORDS = {True: "equal", False: "different", None: "-"}


@dataclass
class Cell:
    """One format of one architecture; None where nothing was measured."""

    refused: str | None = None
    difference: float | None = None
    greedy: bool | None = None
    bytes: bool | None = None
    skipped: str | None = None  # what would have to be installed to run it
    note: str | None = None


def measure(name: str, to: str, folder: Path) -> Cell:
    """Export one architecture to one format under `folder`, and run what there is to run."""
    model = tiny(ARCHITECTURES[name])
    target = folder / to
    try:
        export(model, to, target, kind="f32" if to in ("gguf", "ollama") else None)
    except InputError as error:
        return Cell(refused=str(error).partition(": ")[2])
    size = model.config.vision.image_size
    # llama.cpp resizes by filters of its own; a picture of the tower's size needs none.
    shown = picture(size, size) if to == "gguf" else picture(200, 120)
    if to == "llava":
        return Cell(bytes=same_bytes(model, target))
    if to == "hf":
        return run(model, shown, lambda: transformers(target, shown), same_bytes(model, target))
    if to == "gguf":
        return run_llama_cpp(model, shown, target)
    export(model, "hf", folder / "base", drop_lora=True)
    back = read_model(target, base=str(folder / "base"))
    return run(model, shown, lambda: transformers(folder / "base", shown, target), same(model, back))


def run(
    model: LoadedParts,
    shown: Image.Image,
    reference_answer: Callable[[], tuple[Tensor, list[int]]],
    same: bool,
) -> Cell:
    """Ours beside theirs: logits, or what is left of them, and the next tokens."""
    try:
        logits, tokens = reference_answer()
    except ImportError as error:
        return Cell(bytes=same, skipped=str(error.name))
    own, following = own_answer(model, shown)
    if tokens[-1] in model.config.stop_token_ids:
        tokens = tokens[:-1]
    vocabulary = own.shape[-1]  # an added <image> has rows behind ours
    return Cell(
        difference=(own - logits[..., :vocabulary]).abs().max().item(),
        greedy=tokens == following != [],
        bytes=same,
    )


def run_llama_cpp(model: LoadedParts, shown: Image.Image | None, folder: Path) -> Cell:
    """As `run`, of log-probabilities of the tokens that llama.cpp wrote.

    A CLIP is compared with what llama.cpp makes of it as well; the closer of both counts.
    """
    same = same_decoder_bytes(model, folder)
    try:
        steps, tokens = llama_cpp(folder, shown)
    except ImportError as error:
        return Cell(bytes=same, skipped=str(error.name))

    def compare(note: str | None = None) -> Cell:
        answering = assistant(model)
        prompt = answering.prompt(question(shown), max_new_tokens=NEW_TOKENS)
        ids = torch.cat((prompt.input_ids, torch.tensor(tokens[:-1], dtype=torch.long)))
        with torch.inference_mode():
            hidden = answering.model(ids[None], prompt.encode_images())[0, len(prompt.input_ids) - 1 :]
            own = answering.model.decoder.logits(hidden).log_softmax(-1)
        differences = [(own[number] - row).abs().max().item() for number, row in steps.items()]
        stops = [number for number, token in enumerate(tokens) if token in model.config.stop_token_ids]
        written = tokens[: stops[0]] if stops else tokens
        return Cell(
            difference=max(differences),
            greedy=written == naive_generate(answering.model, prompt) != [],
            bytes=same,
            note=note,
        )

    cell = compare()
    if shown is None or model.config.vision.kind != "clip":
        return cell
    with class_token_last():
        other = compare()
    assert cell.difference is not None and other.difference is not None
    if cell.difference <= other.difference:
        return cell
    as_it_is = f"{cell.difference:.1e}, tokens {_WORDS[cell.greedy]}"
    return replace(other, note=f"with the class token last; as the model is {as_it_is}")


@contextlib.contextmanager
def class_token_last() -> Iterator[None]:
    """What llama.cpp has made of a CLIP since May 2025 (its issue 25814).

    The class token stands behind the patches, whose positions are therefore those of their neighbours, and
    the first feature is left out in its place.
    """

    def forward(self: ViT, pixels: Tensor) -> Tensor:
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        x = self.pre_norm(torch.cat((x, self.class_token.expand(len(x), 1, -1)), 1) + self.positions)
        for block in self.blocks[: self.running]:
            x = block(x)
        return x[:, 1:]

    with patch.object(ViT, "forward", forward):
        yield


def own_answer(model: LoadedParts, shown: Image.Image | None) -> tuple[Tensor, list[int]]:
    """Logits (T, V) of the question, and the greedy tokens after it."""
    answering = assistant(model)
    prompt = answering.prompt(question(shown), temperature=0.0, max_new_tokens=NEW_TOKENS)
    return answering.logits(shown, QUESTION), naive_generate(answering.model, prompt)


def question(shown: Image.Image | None) -> Conversation:
    return Conversation((user_message(QUESTION, [] if shown is None else [shown]),))


def transformers(folder: Path, shown: Image.Image, adapter: Path | None = None) -> tuple[Tensor, list[int]]:
    """The same from transformers, through its processor and its chat template."""
    from transformers import AutoModelForImageTextToText

    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    processor = _processor(folder)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=shown, text=text, return_tensors="pt")
    with torch.inference_mode():
        logits = model(**inputs).logits[0]
        generated = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return logits, generated[0, inputs["input_ids"].shape[1] :].tolist()


def _processor(folder: Path) -> Any:
    """transformers' processor; LlavaOnevision's without its half for videos, which needs torchvision."""
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    values = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    if values.pop("processor_class") != "LlavaOnevisionProcessor":
        return AutoProcessor.from_pretrained(folder)
    from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

    tokenizer, images = AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    with patch.object(LlavaOnevisionProcessor, "check_argument_for_proper_class"):
        return LlavaOnevisionProcessor(images, tokenizer, chat_template=tokenizer.chat_template, **values)


def llama_cpp(folder: Path, shown: Image.Image | None) -> tuple[dict[int, Tensor], list[int]]:
    """The greedy tokens from llama.cpp, and log-probabilities (V,) by the number of the token.

    It gives none of a token that is but a part of a character, and does not number the others.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    [params.model.path] = map(str, folder.glob("model-*.gguf"))
    for file in folder.glob("mmproj-*.gguf"):
        params.mmproj.path = str(file)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 512, 1, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # f16 when not said
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    content: list[dict[str, Any]] = [{"type": "text", "text": QUESTION}]
    if shown is not None:
        stream = io.BytesIO()
        shown.save(stream, "PNG")
        data = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
        content.insert(0, {"type": "image_url", "image_url": {"url": data}})
    reply = xllamacpp.Server(params).handle_chat_completions(
        {
            "messages": [{"role": "user", "content": content}],
            "max_tokens": NEW_TOKENS,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": 1000,
            "return_tokens": True,
            "verbose": True,
        }
    )
    tokens: list[int] = reply["__verbose"]["tokens"]
    steps: dict[int, Tensor] = {}
    for entry in reply["choices"][0]["logprobs"]["content"]:
        if tokens.count(entry["id"]) == 1:  # else it could be either's
            row = {other["id"]: other["logprob"] for other in entry["top_logprobs"]}
            steps[tokens.index(entry["id"])] = torch.tensor([row[index] for index in sorted(row)])
    return steps, tokens


def same(model: LoadedParts, back: LoadedParts) -> bool:
    """Whether every tensor came back, bit for bit."""
    return all(
        name in back.state and torch.equal(tensor.read(), back.state[name].read()[: tensor.shape[0]])
        for name, tensor in model.state.items()
    )


def same_bytes(model: LoadedParts, folder: Path) -> bool:
    config, state = merge_and_compare(model.config, model.state)
    return same(replace(model, config=config, state=state), read_model(folder, template=config.template))


def same_decoder_bytes(model: LoadedParts, folder: Path) -> bool:
    """Of GGUF only the language model is read back."""
    config, state = merge_and_compare(model.config, model.state)
    decoder = {name: tensor for name, tensor in state.items() if name.startswith("decoder.")}
    [file] = folder.glob("model-*.gguf")
    return same(replace(model, config=config, state=decoder), read_model(file, template=config.template))


def chosen(only: list[str]) -> list[str]:
    """Names of architectures that contain one of `only`, or all."""
    return [name for name in ARCHITECTURES if not only or any(part in name for part in only)]


def table(only: list[str]) -> dict[str, dict[str, Cell]]:
    """architecture -> format -> cell, of the architectures that `only` chooses."""
    cells: dict[str, dict[str, Cell]] = {}
    for name in chosen(only):
        cells[name] = {}
        for to in FORMATS:
            if to == "peft" and ARCHITECTURES[name].config.lora is None:
                continue
            if to == "ollama":  # writes the files of gguf, and a Modelfile
                continue
            with tempfile.TemporaryDirectory() as folder:
                cells[name][to] = measure(name, to, Path(folder))
    return cells


GGUF_TYPES = [kind for kind in gguf_write.TYPES if kind != "keep"]
_GAIN = 0.25  # of the wide model's matrices: a random network enlarges every rounding error otherwise


@dataclass
class TypeCell:
    """One type of GGUF of one architecture: largest differences; None where nothing was measured.

    read_back: of logits, between the model and what was read back, its weights restored to floats.
    answering: of logits, between the weights restored and the few bits that Pumice answers from on a CPU.
    llama_cpp: of log-probabilities, between the weights restored and llama.cpp. greedy: whether the next
    tokens of these two are the same.
    """

    refused: str | None = None
    read_back: float | None = None
    answering: float | None = None
    llama_cpp: float | None = None
    greedy: bool | None = None
    note: str | None = None


def wide(name: str) -> LoadedParts:
    """A model of the architecture whose language model has rows of whole blocks of K-quants, 256 weights."""
    architecture = ARCHITECTURES[name]
    decoder = replace(architecture.config.decoder, width=256, heads=16, head_dim=16, mlp_width=512)
    model = tiny(replace(architecture, config=replace(architecture.config, decoder=decoder)))
    for weight, tensor in model.state.items():
        if weight.startswith("decoder.") and len(tensor.shape) == 2 and "lora_a" not in weight:
            model.state[weight] = tensor.map(lambda values: values * _GAIN)
    return model


def measure_type(name: str, kind: str, folder: Path, run_others: bool = True) -> TypeCell:
    """Write one type of GGUF under `folder`, read it back, and compare. run_others: also run llama.cpp."""
    model, target = wide(name), folder / kind
    try:
        export(model, "gguf", target, kind=kind)
    except InputError as error:
        return TypeCell(refused=str(error).partition(": ")[2] or str(error))
    size = model.config.vision.image_size
    shown = picture(size, size)
    back = read_model(target)
    exact, restored = (assistant(parts).logits(shown, QUESTION) for parts in (model, back))
    again = replace(back, sources={})  # so that no copy is kept
    opened = build(again, kind, torch.device("cpu"), torch.float32, merge=True, quantize="int8")
    answering = Assistant(opened.model, opened.processor).logits(shown, QUESTION)
    cell = TypeCell(read_back=_distance(exact, restored), answering=_distance(restored, answering))
    if not run_others:
        return cell
    native = run_llama_cpp(back, shown, target)
    return replace(cell, llama_cpp=native.difference, greedy=native.greedy, note=native.note)


def _distance(some: Tensor, other: Tensor) -> float:
    return (some - other).abs().max().item()


def types_table(only: list[str]) -> dict[str, dict[str, TypeCell]]:
    """architecture -> type of GGUF -> cell. Types of K-quants need llama-cpp-python."""
    cells: dict[str, dict[str, TypeCell]] = {}
    for name in chosen(only):
        cells[name] = {}
        for kind in GGUF_TYPES:
            with tempfile.TemporaryDirectory() as folder:
                cells[name][kind] = measure_type(name, kind, Path(folder))
    return cells


def printed_types(cells: dict[str, dict[str, TypeCell]]) -> Iterator[str]:
    """A table in Markdown. A cell: read_back, answering, llama_cpp; a star if greedy tokens differ."""
    yield f"| architecture | {' | '.join(GGUF_TYPES)} |"
    yield "|---" * (1 + len(GGUF_TYPES)) + "|"
    for name, kinds in cells.items():
        row = [_printed_type(kinds[kind]) for kind in GGUF_TYPES]
        if len(set(row)) == 1:  # refused whatever the type
            row[1:] = [""] * (len(row) - 1)
        last = " (class token last)" if any(cell.note for cell in kinds.values()) else ""
        yield f"| {name}{last} | {' | '.join(row)} |"


def _printed_type(cell: TypeCell) -> str:
    if cell.refused is not None:
        return f"refused: {cell.refused}"
    numbers = (cell.read_back, cell.answering, cell.llama_cpp)
    written = ", ".join("-" if number is None else f"{number:.2g}" for number in numbers)
    return written + "*" * (cell.greedy is False)


def printed(cells: dict[str, dict[str, Cell]]) -> Iterator[str]:
    """A table in Markdown."""
    yield "| architecture | format | largest difference | greedy tokens | bytes |"
    yield "|---|---|---|---|---|"
    for name, formats in cells.items():
        for to, cell in formats.items():
            if cell.refused is not None:
                yield f"| {name} | {to} | refused: {cell.refused} | | |"
                continue
            difference = "-" if cell.difference is None else f"{cell.difference:.1e}"
            note = f" ({cell.skipped} is not installed)" if cell.skipped else ""
            note += f" ({cell.note})" if cell.note else ""
            yield f"| {name} | {to} | {difference}{note} | {_WORDS[cell.greedy]} | {_WORDS[cell.bytes]} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--only", nargs="*", default=[], help="architectures whose name has one of these parts"
    )
    parser.add_argument("--types", action="store_true", help="every type of GGUF, written and read back")
    options = parser.parse_args()
    cells: Any = (types_table if options.types else table)(options.only)
    if options.json:
        plain = {name: {to: asdict(cell) for to, cell in row.items()} for name, row in cells.items()}
        print(json.dumps(plain, indent=1))
    else:
        print("\n".join((printed_types if options.types else printed)(cells)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
