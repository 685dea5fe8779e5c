"""Every format against every architecture: the numbers, the answers and the bytes that come back.

    python benchmarks/formats.py [--json] [--types] [--only PART ...]

For each architecture a tiny random model is written in Pumice's own folder, exported to each format, read
back from it, and, where they are installed, run by transformers (hf), PEFT (peft) and llama.cpp (gguf, by
the package xllamacpp). A cell says:

    difference   the largest absolute difference of logits on one picture and question; for llama.cpp of
                 log-probabilities, which is what it gives
    greedy       whether the next tokens are the same
    bytes        whether importing what was exported gives every tensor back, bit for bit
    refused      why the format cannot hold the model

--types writes every type of GGUF instead, of models 256 wide, with the half that sees in f16, and reads it
back: how far the logits are from the model's, and llama.cpp's log-probabilities from those of what
was read back.
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

from pumice.conversation import Conversation, user_message
from pumice.engine.generate import naive_generate
from pumice.errors import InputError
from pumice.formats.export import FORMATS, export, merge_and_compare
from pumice.formats.gguf import write as gguf_write
from pumice.formats.read import read_model
from pumice.model.vision import ViT
from pumice.storage.parts import LoadedParts

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from architectures import ARCHITECTURES, Architecture, assistant, picture, tiny

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
        export(model, to, target, kind="f32")
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


def table(only: list[str]) -> dict[str, dict[str, Cell]]:
    """architecture -> format -> cell, of architectures whose name contains one of `only`, or all."""
    names = [name for name in ARCHITECTURES if not only or any(part in name for part in only)]
    cells: dict[str, dict[str, Cell]] = {}
    for name in names:
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


def wide(architecture: Architecture) -> Architecture:
    """The same with a language model whose matrices have rows of whole blocks of K-quants, 256 weights."""
    decoder = replace(architecture.config.decoder, width=256, heads=16, head_dim=16, mlp_width=512)
    return replace(architecture, config=replace(architecture.config, decoder=decoder))


def types_table(only: list[str]) -> Iterator[str]:
    """A table in Markdown of GGUF's types. Those of K-quants need llama-cpp-python."""
    yield "| architecture | type | logits, read back | llama.cpp beside what was read back | greedy tokens |"
    yield "|---|---|---|---|---|"
    for name in (name for name in ARCHITECTURES if not only or any(part in name for part in only)):
        model = tiny(wide(ARCHITECTURES[name]))
        size = model.config.vision.image_size
        shown = picture(size, size)
        for kind in GGUF_TYPES:
            with tempfile.TemporaryDirectory() as folder:
                target = Path(folder) / "pair"
                try:
                    export(model, "gguf", target, kind=kind)
                except InputError as error:
                    yield f"| {name} | {kind} | refused: {str(error).partition(': ')[2] or error} | | |"
                    break
                back = read_model(target)
                own, _ = own_answer(model, shown)
                again, _ = own_answer(back, shown)
                cell = run_llama_cpp(back, shown, target)
                native = "-" if cell.difference is None else f"{cell.difference:.1e}"
                last = " (class token last)" if cell.note else ""
                difference = (own - again).abs().max().item()
                yield f"| {name} | {kind} | {difference:.1e} | {native}{last} | {_WORDS[cell.greedy]} |"


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
    if options.types:
        for line in types_table(options.only):
            print(line, flush=True)
        return 0
    cells = table(options.only)
    if options.json:
        plain = {name: {to: asdict(cell) for to, cell in row.items()} for name, row in cells.items()}
        print(json.dumps(plain, indent=1))
    else:
        print("\n".join(printed(cells)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
