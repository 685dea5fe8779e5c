"""The self-test: runs a small random model on the CPU and on the default device, then pumice-tiny."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from pumice.cli.checks import Finding
from pumice.errors import InputError, WorkError

SMALL_MODEL = "HuggingFaceTB/SmolVLM-256M-Instruct"
SLOW = 10.0  # seconds; on an idle laptop the self-test takes less


def self_test() -> list[Finding]:
    """Run a tiny random model on the CPU and on the default device, then pumice-tiny."""
    import torch

    from pumice.formats.load import find_device
    from pumice.storage.download import WHEELS, cached

    start = time.perf_counter()
    devices = dict.fromkeys([torch.device("cpu"), find_device()])
    findings = [
        _attempt(f"random model, {device.type}", partial(_test_random_model, device)) for device in devices
    ]
    if all(cached(part) is not None for part in WHEELS.values()):
        findings.append(_attempt("pumice-tiny", _test_pumice_tiny))
    else:
        remedy = 'pumice ask "Hello" fetches them'
        findings.append(
            Finding("pumice-tiny", "not tested: its parts are not downloaded yet", "note", remedy)
        )
    seconds = time.perf_counter() - start
    is_slow = seconds > SLOW
    remedy = "close what else is running; see the threads above" if is_slow else ""
    findings.append(
        Finding("time", f"{seconds:.1f} s", "note" if is_slow else "ok", remedy, round(seconds, 2))
    )
    return findings


def _attempt(name: str, run: Callable[[], Finding]) -> Finding:
    try:
        return run()
    except InputError as error:
        return Finding(name, str(error), "problem", "do what the message says")
    except Exception as error:  # the self-test reports every failure
        reason = str(error) if isinstance(error, WorkError) else f"{type(error).__name__}: {error}"
        remedy = "use --device cpu; if that fails too, report it with the output of this command"
        return Finding(name, " ".join(reason.split()), "problem", remedy, value=False)


def _test_random_model(device: Any) -> Finding:
    """Compare a tiny random model's logits with the CPU's, and its answer with one without a KV cache."""
    from pumice.assistant import Assistant
    from pumice.conversation import Conversation, user_message
    from pumice.engine.generate import naive_generate

    processor, model = _tiny_model()
    question, image = "What is this?", _draw_circle()
    expected = Assistant(model, processor).logits(image, question)
    assistant = Assistant(model.to(device), processor)
    logits = assistant.logits(image, question).cpu()
    difference = float((logits - expected).abs().max() / expected.abs().max())
    if not difference < 1e-2:
        raise WorkError(f"its logits differ from the CPU's by {difference:.1%}")
    prompt = assistant.prompt(Conversation((user_message(question, [image]),)), max_new_tokens=8)
    reference = processor.tokenizer.decode(naive_generate(assistant.model, prompt))
    answer = assistant.ask(image, question, max_new_tokens=8)
    if answer != reference:
        raise WorkError(f"answers {answer!r} instead of {reference!r}")
    says = "forward pass, and a greedy answer equal to the one without a cache"
    return Finding(f"random model, {device.type}", says, value=True)


def _tiny_model() -> tuple[Any, Any]:
    """Return the processor and the model of a random LLaVA with 0.3 M parameters and a byte tokenizer."""
    import tokenizers
    import torch

    from pumice.config import ConnectorConfig, DecoderConfig, ModelConfig, VisionConfig
    from pumice.model.llava import Llava
    from pumice.processor import Processor
    from pumice.tokens import Tokenizer

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: token_id for token_id, token in enumerate([*specials, *letters])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
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
            if parameter.dim() == 2:  # large weights, so that every step gives another token
                torch.nn.init.normal_(parameter, std=0.3)
    return Processor(config, Tokenizer(tokenizer)), model.requires_grad_(False).eval()


def _test_pumice_tiny() -> Finding:
    """Ask pumice-tiny about a drawing, opened as `pumice ask` opens it."""
    from pumice.assistant import load

    start = time.perf_counter()
    assistant = load("pumice-tiny")
    opened = time.perf_counter()
    question = "What colour is the circle?"
    answer = assistant.ask(_draw_circle(), question, max_new_tokens=32)
    answered = time.perf_counter()
    if not answer.strip():
        raise InputError("gives an empty answer; delete the cache of its parts (above)")
    timing = f"opened in {opened - start:.1f} s, answered in {answered - opened:.1f} s"
    says = f"{timing}; to {question!r} of a drawing it said {answer!r} (small models err)"
    larger = "a better small model, untested on its published weights: --model " + SMALL_MODEL
    return Finding("pumice-tiny", says, remedy=larger, value=answer)


def _draw_circle() -> Any:
    """Return a picture of a red circle on white."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (96, 96), "white")
    ImageDraw.Draw(image).ellipse((16, 16, 80, 80), fill="red")
    return image
