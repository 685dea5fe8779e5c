"""What every test gets: few threads, no network beyond this machine, the same examples each run."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import itertools
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import tokenizers
from hypothesis import settings
from PIL import Image

from pumice import images

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

# Before torch is imported: results to the last bit depend on the number of threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # numbers are a CPU's; for a GPU there is benchmarks/gpu.py
# What programs learn from here about the terminal would change what they print.
for name in ("COLUMNS", "LINES", "TERM", "NO_COLOR", "FORCE_COLOR", "PYTHONIOENCODING"):
    os.environ.pop(name, None)

settings.register_profile("pumice", deadline=None, derandomize=True, database=None)
settings.load_profile("pumice")


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """A connection to anything but this machine is an error that names the address."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test tried to connect to {address}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", local_only)
        yield


@pytest.fixture(scope="session", autouse=True)
def interrupts_are_heard() -> Iterator[None]:
    """SIGINT as Python has it, here and in processes that tests start, though nohup or `&` ignores it."""
    before = signal.getsignal(signal.SIGINT)
    if before == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def bounded_work() -> Iterator[None]:
    """The test fails after a minute of its own processor time, where a slow pattern would take days."""
    if not hasattr(signal, "setitimer"):  # Windows
        yield
        return

    def fail(*_: object) -> None:
        raise AssertionError("a minute of processor time was not enough")

    before = signal.signal(signal.SIGVTALRM, fail)
    signal.setitimer(signal.ITIMER_VIRTUAL, 60)
    yield
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, before)


@pytest.fixture
def replaced_when_opened(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, Sequence[bytes]], None]:
    """Replaces a picture file by the next of `contents` each time that it has been opened."""

    def begin(path: Path, contents: Sequence[bytes]) -> None:
        following, opened = itertools.cycle(contents), images._open_file

        def open_file(source: Any, name: str) -> Any:
            file = opened(source, name)
            if isinstance(source, str | os.PathLike) and Path(source) == path:
                other = path.with_suffix(".new")
                other.write_bytes(next(following))
                os.replace(other, path)
            return file

        path.write_bytes(next(following))
        monkeypatch.setattr(images, "_open_file", open_file)

    return begin


@dataclass(frozen=True)
class BadRow:
    """One row that cannot be used, as it is written in a file, and what a check says of it."""

    text: str
    kind: str
    reason: str


@pytest.fixture
def bad_rows(tmp_path: Path) -> tuple[Path, list[BadRow]]:
    """A folder of pictures, sound and spoiled, and more than twenty kinds of spoiled rows about them."""
    folder = tmp_path / "spoiled-pictures"
    folder.mkdir()
    noise = bytes(range(256)) * 48
    picture = Image.frombytes("RGB", (64, 64), noise)
    for name in ("good.png", "cut.png", "cut.jpg"):
        picture.save(folder / name)
    for name in ("cut.png", "cut.jpg"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])
    (folder / "empty.png").touch()
    (folder / "page.jpg").write_text("<html>404 Not Found</html>")
    (folder / "folder.png").mkdir()
    pixels = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + pixels + struct.pack(">I", zlib.crc32(pixels))
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header)

    ask, text, answer = ("human", "<image>\nWhat?"), ("human", "What?"), ("gpt", "A cat.")

    def row(image: Any, *turns: tuple[str, Any], **more: Any) -> str:
        turns_json = [{"from": speaker, "value": value} for speaker, value in turns or (ask, answer)]
        return json.dumps({"id": "r", "image": image, "conversations": turns_json} | more)

    listed = [
        ('{"id": "torn", "conversations": [', "malformed row", "not JSON"),
        ('["a list"]', "malformed row", "expected an object"),
        ("42", "malformed row", "expected an object"),
        ("[" * 100_000, "malformed row", "not JSON"),
        (row(None, id={"a": 1}), "malformed row", "'id' must be"),
        ('{"id": "bare"}', "malformed row", "'conversations' is missing"),
        (row(None, conversations=[]), "malformed row", "an empty list"),
        (row(None, conversations="What? A cat."), "malformed row", "must be a list"),
        (row(None, conversations=["What?"]), "malformed row", "turn 1 must be an object"),
        (row(None, text, ("gpt", 42)), "malformed row", "turn 2 must have the texts"),
        (row(None, text, ("bot", "A cat.")), "malformed row", "no turn is from 'gpt'"),
        (row(7), "malformed row", "'image' must be"),
        (row([""]), "malformed row", "'image' must be"),
        (row(None, text, text, answer), "roles out of order", "takes turns"),
        (row(None, text, answer, text), "roles out of order", "no answer to learn from"),
        (row(None, ("tool", "x"), answer), "unknown speaker", "'tool'"),
        (row(None, text, ("gpt", " \n")), "empty answer", "empty answer"),
        (row(None, text, ("gpt", "A \ud83d.")), "broken text", "half of a character"),
        (row(None, ask, answer), "placeholder count", "1 <image> placeholder for 0 pictures"),
        (row(["good.png"] * 2, ask, answer), "placeholder count", "1 <image> placeholder for 2 pictures"),
        (row("good.png", ("human", "<image><image>"), answer), "placeholder count", "2 <image>"),
        (row("gone.png"), "picture missing", "gone.png"),
        (row("../good.png"), "picture missing", "leads out of"),
        (row("a" * 5000 + ".png"), "picture missing", "aaa"),
        (row("nul\0.png"), "picture missing", "nul"),
        (row("folder.png"), "picture missing", "folder.png"),
        (row("cut.png"), "picture unreadable", "cut.png"),
        (row("cut.jpg"), "picture unreadable", "cut.jpg"),
        (row("empty.png"), "picture unreadable", "empty.png"),
        (row("page.jpg"), "picture unreadable", "page.jpg"),
        (row("bomb.png"), "picture unreadable", "bomb.png"),
    ]
    return folder, [BadRow(*values) for values in listed]


@pytest.fixture(scope="session")
def learned() -> Callable[[Sequence[int], Sequence[int]], list[list[int]]]:
    def learned(ids: Sequence[int], labels: Sequence[int]) -> list[list[int]]:
        """Runs of supervised ids, each of which is its own label."""
        runs: list[list[int]] = [[]]
        for number, label in zip(ids, labels, strict=True):
            if label == -100:
                runs.append([])
            else:
                assert label == number
                runs[-1].append(label)
        return [run for run in runs if run]

    return learned


TESTS = Path(__file__).parent
BENCHMARKS = TESTS.parent / "benchmarks"


@pytest.fixture(scope="session")
def models() -> ModuleType:
    """tests/architectures.py: tiny random models of every architecture."""
    return _module(TESTS, "architectures")


@pytest.fixture(scope="session")
def formats() -> ModuleType:
    """benchmarks/formats.py: exporting them, and running them elsewhere."""
    return _module(BENCHMARKS, "formats")


@pytest.fixture(scope="session")
def sentencepiece_file() -> Path:
    """A real SentencePiece model, that of Mistral 7B, in the package mistral-common (not imported)."""
    spec = importlib.util.find_spec("mistral_common")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("mistral-common is not installed")
    return Path(spec.submodule_search_locations[0]) / "data" / "tokenizer.model.v1"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The processes that are started."""
    processes: list[Any] = []
    start = subprocess.Popen

    def recorded(*arguments: Any, **options: Any) -> Any:
        processes.append(start(*arguments, **options))
        return processes[-1]

    monkeypatch.setattr(subprocess, "Popen", recorded)
    return processes


@pytest.fixture(scope="session")
def processes() -> ModuleType:
    """benchmarks/processes.py: one run on one process, on many, and killed."""
    return _module(BENCHMARKS, "processes")


@pytest.fixture(scope="session")
def load_script() -> Iterator[Callable[[Path], ModuleType]]:
    """A function that loads a script as a new module, named after its folder, too: several are `run`."""
    with pytest.MonkeyPatch.context() as patch:

        def load(path: Path) -> ModuleType:
            name = f"{path.parent.name}_{path.stem}".replace("-", "_")
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            patch.setitem(sys.modules, name, module)  # dataclasses look their module up
            with pytest.MonkeyPatch.context() as paths:  # as if it was run
                paths.syspath_prepend(path.parent)
                spec.loader.exec_module(module)
            return module

        yield load


def _module(folder: Path, name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        return importlib.import_module(name)


FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The Chromium of this machine."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("there is no Chromium here")
    with playwright.sync_playwright() as running:
        launched = running.chromium.launch(executable_path=path, args=FLAGS)
        yield launched
        launched.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """An empty page, on which no script may fail."""
    context = browser.new_context()
    context.set_default_timeout(120_000)  # milliseconds
    new_page = context.new_page()
    faults: list[str] = []
    new_page.on("pageerror", lambda error: faults.append(str(error)))
    yield new_page
    context.close()
    assert faults == []


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder like any other, small and random: 4 image tokens, a byte-level vocabulary, ChatML."""
    import torch

    from pumice.config import ConnectorConfig, DecoderConfig, ModelConfig, VisionConfig
    from pumice.formats.pumice.folder import save
    from pumice.model.llava import Llava

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=specials,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["user assistant system What is in the picture? A dog runs."] * 4, trainer)
    config = ModelConfig(
        decoder=DecoderConfig(
            vocab_size=320,
            width=64,
            depth=2,
            heads=4,
            kv_heads=2,
            head_dim=16,
            mlp_width=96,
            context=256,
            tied_head=True,
        ),
        vision=VisionConfig(image_size=64, variant="lite0"),
        connector=ConnectorConfig(kind="mlp2x_gelu"),
        template="chatml",
        stop_token_ids=(2,),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Llava(config)
        for parameter in model.decoder.parameters():
            if parameter.dim() == 2:  # weights so large that it says something else at every step
                torch.nn.init.normal_(parameter, std=0.3)
        # Norms that know the sizes of features: otherwise they vanish, and all pictures look alike.
        norms = [each for each in model.tower.modules() if isinstance(each, torch.nn.BatchNorm2d)]
        for norm in norms:
            norm.train().momentum = None  # takes the mean of this one batch
        with torch.no_grad():
            model.tower(torch.randn(8, 3, 64, 64))
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save(folder, config, model.state_dict(), tokenizer=tokenizer.to_str())
    return folder


def with_generation(source: Path, folder: Path, **generation: float) -> Path:
    """A copy of a model whose folder says how answers are drawn."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    config["generation"] = generation
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def penalising(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, whose folder says that what was said becomes less likely."""
    folder = tmp_path_factory.mktemp("penalising") / "model"
    return with_generation(tiny_folder, folder, repetition_penalty=9.0)


@pytest.fixture(scope="session")
def searching(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, whose folder asks for beam search."""
    folder = tmp_path_factory.mktemp("searching") / "model"
    return with_generation(tiny_folder, folder, num_beams=3, length_penalty=0.5)


@pytest.fixture(scope="session")
def drawing(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, whose folder says that words are drawn."""
    folder = tmp_path_factory.mktemp("drawing") / "model"
    return with_generation(tiny_folder, folder, temperature=0.7)


@pytest.fixture(scope="session")
def stand_in(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder named pumice-tiny, small and random, with adapters as that has them."""
    from pumice.config import LoraConfig
    from pumice.formats.load import open_model
    from pumice.formats.pumice.folder import save
    from pumice.model.adapters import add_lora

    opened = open_model(tiny_folder, merge=False)
    lora = LoraConfig(rank=2, targets=("q", "v"))
    add_lora(opened.model.decoder, lora)
    config = dataclasses.replace(opened.model.config, lora=lora)
    folder = tmp_path_factory.mktemp("stand-in") / "pumice-tiny"
    tokenizer = (tiny_folder / "tokenizer.json").read_text(encoding="utf-8")
    save(folder, config, opened.model.state_dict(), tokenizer=tokenizer)
    return folder
