"""Videos become frames: which are taken, what stands around them, and what is refused."""

from __future__ import annotations

import io
import json
import logging
import signal
import struct
import sys
import threading
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jinja2
import numpy as np
import pytest
import torch
from PIL import Image

from pumice import video
from pumice.config import IMAGE_TOKEN
from pumice.conversation import Conversation, ImagePart, Message, Video
from pumice.errors import InputError
from pumice.images import is_video, open_image
from pumice.media import VideoPolicy
from pumice.processor import Processor
from pumice.stopping import Stopped, stoppable
from pumice.tokens import Tokenizer
from pumice.video import in_words, read_frames, sample, show_videos

COLOURS = ["red", "green", "blue", "yellow", "black", "white"]


def animation(path: Path, frames: int = 6, seconds: float = 0.5) -> Path:
    first, *others = (Image.new("RGB", (40, 30), COLOURS[n % 6]) for n in range(frames))
    first.save(path, save_all=True, append_images=others, duration=round(seconds * 1000), loop=0)
    return path


def asked(path: Path, frames: int | None = None) -> Conversation:
    return Conversation((Message("user", (ImagePart(Video(str(path), frames)), "What?")),))


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_frames_of_an_animation(kind: str, tmp_path: Path) -> None:
    path = animation(tmp_path / f"a.{kind}")
    frames = read_frames(Video(path, 3), VideoPolicy())
    assert frames.times == (0.0, 1.0, 2.5) and frames.duration == 3.0
    colours = [np.asarray(open_image(image)).mean((0, 1)).round() for image in frames.images]
    np.testing.assert_allclose(colours, [(255, 0, 0), (0, 0, 255), (255, 255, 255)], atol=3)
    assert not is_video(path)  # it is a picture as well


def test_frames_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor
    from transformers.video_utils import VideoMetadata

    assert transformers
    for total, rate, most in (
        (100, 24.0, 64),
        (3000, 24.0, 64),
        (3000, 30.0, 8),
        (5, 24.0, 64),
        (500, 25.0, 4),
    ):
        metadata = VideoMetadata(total_num_frames=total, fps=rate, duration=total / rate)
        owner: Any = SimpleNamespace(num_frames=most, fps=1)
        expected = SmolVLMVideoProcessor.sample_frames(owner, metadata)
        assert sample(total, rate, 1.0, most) == expected.tolist()


def test_smolvlm2_says_the_time_of_each_frame(models: ModuleType, tmp_path: Path) -> None:
    path = animation(tmp_path / "a.gif", seconds=15)
    policy = VideoPolicy(max_frames=3, fps=1.0, longest_edge=56, timestamps=True)
    shown = show_videos(asked(path), policy).messages[0].parts
    assert [part for part in shown if isinstance(part, str)] == [
        f"You are provided the following series of three frames from a {timedelta(seconds=90)} "
        "[H:MM:SS] video.\n",
        "\nFrame from 00:00:", "\nFrame from 00:30:", "\nFrame from 01:15:", "\n\n", "What?",
    ]  # fmt: skip
    # A frame is one tile, a picture of the same size several.
    model = models.tiny(models.ARCHITECTURES["SigLIP, split (SmolVLM)"])
    processor = Processor(replace(model.config, video=policy), Tokenizer(model.tokenizer))
    prompt = processor.prompt(asked(path))
    assert [layout.tiles for layout in prompt.layouts] == [1, 1, 1]
    assert processor.pixels(prompt.images, prompt.layouts).shape[0] == 3
    picture = Conversation((Message("user", (ImagePart(str(path)), "What?")),))
    assert processor.prompt(picture).layouts[0].tiles > 1


def test_smolvlm2_is_asked_in_the_words_of_transformers(
    models: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.models.smolvlm import processing_smolvlm
    from transformers.video_utils import VideoMetadata

    path = animation(tmp_path / "a.gif", seconds=15)
    model = models.tiny(models.ARCHITECTURES["SigLIP, split (SmolVLM)"])
    policy = VideoPolicy(max_frames=3, fps=1.0, longest_edge=56, timestamps=True)
    processor = Processor(replace(model.config, video=policy), Tokenizer(model.tokenizer))
    sample = processor.prompt(asked(path))
    image = model.tokenizer.token_to_id("<image>")
    ids = np.where(sample.input_ids == IMAGE_TOKEN, image, sample.input_ids)
    # Their processor without its half that decodes, which needs torchvision, and num2words.
    monkeypatch.setattr(processing_smolvlm, "num2words", in_words, raising=False)
    owner: Any = SimpleNamespace(
        image_seq_len=processor.config.image_tokens, image_token="<image>",
        fake_image_token="<fake_token_around_image>", global_image_token="<global-img>",
    )  # fmt: skip
    metadata = VideoMetadata(total_num_frames=6, fps=1 / 15, duration=90, frames_indices=[0, 2, 5])
    inputs = {"pixel_values": np.zeros((1, 3)), "video_metadata": [metadata]}
    video_text = processing_smolvlm.SmolVLMProcessor.replace_video_token(owner, inputs, 0)
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What?"}]}]
    chat = jinja2.Template(processing_smolvlm.DEFAULT_CHAT_TEMPLATE)
    expected = chat.render(messages=messages, add_generation_prompt=True).replace("<video>", video_text)
    assert model.tokenizer.decode(ids.tolist(), skip_special_tokens=False) == expected


def test_onevision_pools_the_tokens_of_a_frame(models: ModuleType, tmp_path: Path) -> None:
    """As transformers' apply_pooling; one newline ends the video."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

    model = models.tiny(models.ARCHITECTURES["LLaVA-OneVision, anyres_max"])
    assistant = models.assistant(model)
    sample = assistant.processor.prompt(asked(animation(tmp_path / "a.gif"), 3))
    pixels = torch.from_numpy(assistant.processor.pixels(sample.images, sample.layouts))
    with torch.inference_mode():
        tokens = assistant.model.encode(pixels, sample.layouts)
        features = assistant.model.connector(assistant.model.features(pixels))
    side = int(features.shape[1] ** 0.5)
    config = SimpleNamespace(vision_config=SimpleNamespace(image_size=side, patch_size=1))
    pooled = LlavaOnevisionModel.apply_pooling(SimpleNamespace(config=config), features)
    expected = torch.cat((pooled.flatten(0, 1), assistant.model.image_newline[None]))
    torch.testing.assert_close(tokens, expected)
    assert (sample.input_ids == IMAGE_TOKEN).sum() == len(tokens)
    assert assistant.ask(Video(str(tmp_path / "a.gif"), 3), "What?", max_new_tokens=2) is not None


def test_other_models_see_several_pictures_and_a_note_says_so(
    models: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = models.tiny(models.ARCHITECTURES["CLIP + Llama, pad (LLaVA 1.5)"])
    processor = Processor(model.config, Tokenizer(model.tokenizer))
    with caplog.at_level(logging.WARNING):
        assert len(processor.prompt(asked(animation(tmp_path / "a.gif"), 4)).images) == 4
    assert "was not trained on videos" in caplog.text
    # Both where frames are pictures, and where the model knows videos.
    for policy in (None, VideoPolicy()):
        context = replace(model.config, decoder=replace(model.config.decoder, context=40), video=policy)
        fitting = r"about (1 of 4 frames fits|[023] of 4 frames fit): show fewer \(--frames\)"
        with pytest.raises(InputError, match=f"is 40; {fitting}"):
            Processor(context, Tokenizer(model.tokenizer)).prompt(asked(tmp_path / "a.gif", 4))


def test_wrong_videos(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = animation(tmp_path / "one.gif", frames=1)
    assert len(read_frames(Video(one), VideoPolicy()).images) == 1
    (tmp_path / "none.gif").write_bytes(b"")
    (tmp_path / "text.gif").write_text("no video")
    for name, words in (
        ("none.gif", "is empty"),
        ("gone.gif", "no video"),
        ("x" * 300, "no video"),
        ("text.gif", "no frame that can be read"),
    ):
        with pytest.raises(InputError, match=words):
            read_frames(Video(tmp_path / name), VideoPolicy())
    noise = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), np.uint8)
    first, *others = map(Image.fromarray, noise)
    first.save(tmp_path / "cut.gif", save_all=True, append_images=others, duration=100)
    whole = (tmp_path / "cut.gif").read_bytes()
    # Inside a frame, and between two, where nothing but the end of the file is missing.
    for end in (len(whole) * 2 // 3, whole.rindex(b"\x21\xf9\x04")):
        caplog.clear()
        (tmp_path / "cut.gif").write_bytes(whole[:end])
        with caplog.at_level(logging.WARNING):
            frames = len(read_frames(Video(tmp_path / "cut.gif"), VideoPolicy()).images)
        assert 1 <= frames < 6
        assert f"cut.gif is damaged after frame {frames} (" in caplog.text
    assert [in_words(number) for number in (0, 12, 64, 101)] == [
        "zero",
        "twelve",
        "sixty-four",
        "one hundred and one",
    ]


def test_work_that_is_stopped_ends_its_process(tmp_path: Path, started: list[Any]) -> None:
    path = animation(tmp_path / "a.gif")
    stop = threading.Event()
    stop.set()
    with stoppable(stop), pytest.raises(Stopped):
        read_frames(Video(path), VideoPolicy())
    assert [process.returncode for process in started] == [-signal.SIGKILL]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not bound both")
@pytest.mark.parametrize(
    ("name", "value", "end"), [("CPU_SECONDS", 1, -signal.SIGXCPU), ("MEMORY", 1 << 20, 1)]
)
def test_time_and_memory_are_bounded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    started: list[Any],
    name: str,
    value: int,
    end: int,
) -> None:
    """An animation of 4,000 frames of 9 megapixels, which are a few bytes each in the file."""
    pictures = [Image.new("P", (3000, 3000), number) for number in range(2)]
    output = io.BytesIO()
    pictures[0].save(output, "GIF", save_all=True, append_images=pictures[1:], duration=100)
    data = output.getvalue()
    last = data.rindex(b"\x21\xf9\x04")
    path = tmp_path / "a.gif"
    path.write_bytes(data[:last] + 4000 * data[last:-1] + data[-1:])
    monkeypatch.setattr(video, name, value)
    monkeypatch.setattr(video, "WALL_SECONDS", 60)
    with pytest.raises(InputError, match=r"a\.gif cannot be decoded within \d+ s and \d GB; give a shorter"):
        read_frames(Video(path), VideoPolicy())
    assert started[0].returncode == end


def test_frames_of_too_many_bytes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = animation(tmp_path / "a.gif")
    monkeypatch.setattr(video, "MAX_BYTES", 100)
    output = io.BytesIO()
    video._decode(str(path), 0.0, 6, output)
    assert "more than 0 MB together; give a smaller copy" in json.loads(output.getvalue())["error"]
    monkeypatch.setattr(video, "MAX_PIXELS", 1000)
    output = io.BytesIO()
    video._decode(str(path), 0.0, 6, output)
    assert json.loads(output.getvalue()) == {"error": "is 40 x 30; give a smaller copy"}


def test_a_film_is_decoded_apart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    av = pytest.importorskip("av", reason="PyAV is not installed")
    path = tmp_path / "film"
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 64, 48
        for number in range(30):
            frame = av.VideoFrame.from_image(Image.new("RGB", (64, 48), COLOURS[number // 10]))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert is_video(path)
    frames = read_frames(Video(path, 3), VideoPolicy())
    assert len(frames.images) == 3 and frames.duration == 3.0 and frames.times[0] == 0.0
    colours = [np.asarray(open_image(image)).mean((0, 1)).argmax() for image in frames.images]
    assert colours == [0, 1, 2]
    assert not caplog.records
    whole = path.read_bytes()
    with caplog.at_level(logging.WARNING):
        assert read_frames(Video(whole[: len(whole) // 2]), VideoPolicy()).duration < 2
    assert "of 3.0 s: what follows is left out" in caplog.text
    for cut in (whole[:400], b"\0\0\0\x18ftypisom" + bytes(400)):
        path.write_bytes(cut)
        with pytest.raises(InputError, match=r"no frame that can be read \(it is cut off or damaged\); give"):
            read_frames(Video(path), VideoPolicy())


def test_a_film_is_shown_upright(tmp_path: Path) -> None:
    """As a telephone stores it: lying, with a matrix in its header that turns it clockwise."""
    av = pytest.importorskip("av", reason="PyAV is not installed")
    path = tmp_path / "film.mp4"
    lying = Image.new("RGB", (64, 48), "red")
    lying.paste("blue", (0, 0, 32, 48))  # the left half, which becomes the upper one
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = lying.size
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_image(lying)))
        container.mux(stream.encode())
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40  # ISO/IEC 14496-12, TrackHeaderBox of version 0
    one = 1 << 16
    data[matrix : matrix + 36] = struct.pack(">9i", 0, one, 0, -one, 0, 0, 48 * one, 0, 1 << 30)
    [image] = read_frames(Video(bytes(data), 1), None).images
    shown = open_image(image)
    assert shown.size == (48, 64)
    assert (
        np.asarray(shown.getpixel((24, 8))).argmax() == 2
        and np.asarray(shown.getpixel((24, 56))).argmax() == 0
    )


def test_only_the_known_containers_are_opened(tmp_path: Path) -> None:
    """Libav would find the film of another container behind the beginning of a known one."""
    av = pytest.importorskip("av", reason="PyAV is not installed")
    films = {}
    for container in ("avi", "flv", "matroska", "mov", "mp4", "mpeg", "mpegts", "webm"):
        codec = {"flv": "flv1", "mpeg": "mpeg1video", "webm": "libvpx"}.get(container, "mpeg4")
        with io.BytesIO() as data:
            with av.open(data, "w", format=container) as film:
                stream = film.add_stream(codec, rate=25)
                stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
                for _ in range(30):
                    film.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (64, 48)))))
                film.mux(stream.encode())
            films[container] = data.getvalue()
    hidden = b"OggS" + 3 * films.pop("mpegts")
    for film in films.values():
        assert is_video(film) and len(read_frames(Video(film, 3), VideoPolicy()).images) == 3
    assert is_video(hidden)
    with pytest.raises(InputError, match="no frame that can be read"):
        read_frames(Video(hidden, 3), VideoPolicy())
