"""The self-test: small models run for real, a random one on each kind of device and pumice-tiny."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from pumice.cli.checks.finding import Finding
from pumice.errors import InputError

SLOW = 10.0  # seconds that it may take on an idle laptop


def self_test() -> list[Finding]:
    """Run small models for real: tiny random ones on every device here, then pumice-tiny."""
    import torch

    from pumice.formats.load import find_device
    from pumice.storage.download import WHEELS, kept

    start = time.perf_counter()
    places = dict.fromkeys([torch.device("cpu"), find_device()])
    found = [_attempt(f"random model, {place.type}", partial(_random, place)) for place in places]
    if all(kept(part) is not None for part in WHEELS.values()):
        found.append(_attempt("pumice-tiny", _embedded))
    else:
        remedy = 'pumice ask "Hello" fetches them'
        found.append(Finding("pumice-tiny", "not tested: its parts are not here yet", "note", remedy))
    seconds = time.perf_counter() - start
    slow = seconds > SLOW
    remedy = "close what else is running; see the threads above" if slow else ""
    found.append(Finding("time", f"{seconds:.1f} s", "note" if slow else "ok", remedy, round(seconds, 2)))
    return found


def _attempt(name: str, run: Callable[[], Finding]) -> Finding:
    try:
        return run()
    except InputError as error:
        return Finding(name, str(error), "problem", "do what the message says")
    except Exception as error:  # whatever breaks here is what we were asked to find
        said = " ".join(f"{type(error).__name__}: {error}".split())
        remedy = "run it on --device cpu; if that fails too, report it with the output of this command"
        return Finding(name, said, "problem", remedy)


def _random(device: Any) -> Finding:
    """A greedy answer of a tiny random model, against the same without any cache, and on the CPU."""
    import torch

    from pumice.assistant import Assistant
    from pumice.conversation import Conversation, user_message
    from pumice.engine.generate import naive_generate

    name = f"random model, {device.type}"
    processor, model = _tiny()
    plain = Assistant(model, processor)
    question, picture = "What is this?", _drawing()
    expected = plain.logits(picture, question)
    if device.type != "cpu":
        plain = Assistant(model.to(device), processor)
        worst = float((plain.logits(picture, question).cpu() - expected).abs().max() / expected.abs().max())
        if not worst < 1e-2:
            remedy = "use --device cpu, and update torch and the driver"
            return Finding(name, f"its logits differ from the CPU's by {worst:.1%}", "problem", remedy, worst)
    prompt = plain.prompt(Conversation((user_message(question, [picture]),)), max_new_tokens=8)
    reference = processor.tokenizer.decode(naive_generate(plain.model, prompt))
    said = plain.ask(picture, question, max_new_tokens=8)
    if not bool(torch.isfinite(expected).all()) or said != reference:
        remedy = "report it with the output of this command"
        return Finding(name, f"answers {said!r} instead of {reference!r}", "problem", remedy, value=False)
    return Finding(name, "forward pass, and a greedy answer equal to the one without a cache", value=True)


def _tiny() -> tuple[Any, Any]:
    """The processor and the modules of a random LLaVA of 0.3 M parameters whose words are bytes."""
    import tokenizers
    import torch

    from pumice.config import ConnectorConfig, DecoderConfig, ModelConfig, VisionConfig
    from pumice.model.llava import Llava
    from pumice.processor import Processor
    from pumice.tokens import Tokenizer

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: number for number, word in enumerate([*specials, *letters])}
    words = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = tokenizers.decoders.ByteLevel()
    words.add_special_tokens(specials)
    decoder = DecoderConfig(
        len(vocabulary), width=64, depth=2, heads=4, kv_heads=2, head_dim=16, mlp_width=128, tied_head=True
    )
    vision = VisionConfig(
        "clip", image_size=56, width=32, stride=14, depth=2, heads=2, mlp_width=64, layer=-2
    )
    config = ModelConfig(decoder, vision, ConnectorConfig(), template="chatml", stop_token_ids=(2,))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Llava(config)
        for parameter in model.decoder.parameters():
            if parameter.dim() == 2:  # weights so large that it says something else at every step
                torch.nn.init.normal_(parameter, std=0.3)
    return Processor(config, Tokenizer(words)), model.requires_grad_(False).eval()


def _embedded() -> Finding:
    """pumice-tiny, as `pumice ask` opens it, on a drawn picture."""
    from pumice.assistant import load

    start = time.perf_counter()
    assistant = load("pumice-tiny")
    opened = time.perf_counter()
    question = "What colour is the circle?"
    answer = assistant.ask(_drawing(), question, max_new_tokens=32)
    answered = time.perf_counter()
    if not answer.strip():
        remedy = "delete the cache of its parts (above), so that they are fetched again"
        return Finding("pumice-tiny", "gives an empty answer", "problem", remedy)
    took = f"opened in {opened - start:.1f} s, answered in {answered - opened:.1f} s"
    says = f"{took}; to {question!r} of a drawing it said {answer!r} (small models err)"
    return Finding("pumice-tiny", says, value=answer)


def _drawing() -> Any:
    """A red circle on white."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (96, 96), "white")
    ImageDraw.Draw(picture).ellipse((16, 16, 80, 80), fill="red")
    return picture
