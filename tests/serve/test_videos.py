"""Videos over HTTP: the answer is that of Python, limits hold, and wrong ones are named by their field."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asking import data_uri, picture, post, user_message
from PIL import Image
from test_limits import error_of

from pumice import video
from pumice.assistant import conversation_of, load
from pumice.conversation import Video
from pumice.formats.pumice import folder as model_folder
from pumice.images import image_size
from pumice.media import Frames, VideoPolicy
from pumice.serve import images
from pumice.serve.errors import ApiError
from pumice.serve.images import PictureFile, count_tiles, read_images
from pumice.serve.messages import VideoUrl
from pumice.serve.settings import ServerSettings
from pumice.serve.work import Account, Memory, Workers

FIELD = "messages.0.content.0.video_url"


def animation(frames: int = 3, side: int = 40) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (frames, side, side, 3), np.uint8)
    first, *others = map(Image.fromarray, noise)
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=500)
    return buffer.getvalue()


def at(address: str) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": address}}


def video_part(data: bytes) -> dict[str, Any]:
    return at(f"data:video/mp4;base64,{base64.b64encode(data).decode()}")


def asked(*parts: Any, text: str = "What?") -> dict[str, Any]:
    content = [*parts, {"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 8}


def test_a_video_is_answered_as_in_python(server: str, tiny_folder: Path) -> None:
    assistant = load(tiny_folder, device="cpu", quantize=None)
    clip = animation()
    expected = assistant.ask(Video(clip), "What?", max_new_tokens=8)
    asked_so = conversation_of([{"role": "user", "content": asked_in_python(clip)}])
    prompt = len(assistant.prompt(asked_so).input_ids)
    answer = post(server, asked(video_part(clip))).json()
    assert answer["choices"][0]["message"]["content"] == expected
    assert answer["usage"]["prompt_tokens"] == prompt
    # A part may also hold the bare address; the picture of the same file is its first frame alone.
    bare = {"type": "video_url", "video_url": video_part(clip)["video_url"]["url"]}
    assert post(server, asked(bare)).json()["usage"]["prompt_tokens"] == prompt
    one = post(server, asked({"type": "image_url", "image_url": data_uri(clip, "gif")})).json()
    assert one["usage"]["prompt_tokens"] < prompt


def asked_in_python(clip: bytes) -> list[dict[str, Any]]:
    return [{"type": "image", "image": Video(clip)}, {"type": "text", "text": "What?"}]


def test_pictures_videos_and_a_second_turn(server: str) -> None:
    first = user_message("One.", picture(1))
    second = {"role": "user", "content": [video_part(animation(2)), {"type": "text", "text": "And these?"}]}
    body = {"messages": [first, {"role": "assistant", "content": "A."}, second], "max_tokens": 4}
    answer = post(server, body)
    assert answer.status_code == 200, answer.text
    explained = post(
        server, {"messages": [*body["messages"], {"role": "assistant", "content": "dog"}]}, "/explain"
    ).json()
    assert len(explained["pictures"]) == 3  # the picture and both frames


@pytest.fixture(scope="module")
def small(local: Any) -> Iterator[str]:
    with local(max_pixels=10_000, max_images=2) as url:
        yield url


@pytest.mark.parametrize(
    ("part", "code", "message"),
    [
        (at("http://a.b/c.mp4"), "invalid_video_url", f"'{FIELD}' begins with 'http://a.b/c"),
        (at("clip.mp4"), "invalid_video_url", "give a video as data:video/mp4"),
        (at("data:video/mp4;base64,$$"), "invalid_video_url", f"'{FIELD}': '$$' is not base64"),
        (video_part(b""), "invalid_video", "the video is empty (0 bytes)"),
        (video_part(b"no video"), "invalid_video", "no frame that can be read"),
        (video_part(animation()[:20]), "invalid_video", "no frame that can be read"),
        (video_part(animation(2, side=120)), "image_too_large", "is 120 x 120, more than 0.01 megapixels"),
    ],
)
def test_wrong_videos(small: str, part: dict[str, Any], code: str, message: str) -> None:
    error = error_of(post(small, asked(part)), 400)
    assert (error["param"], error["code"]) == (FIELD, code)
    assert message in error["message"]
    assert tempfile.gettempdir() not in error["message"]


def test_frames_are_checked_beside_the_event_loop(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []

    def size(data: bytes) -> tuple[int, int]:
        threads.append(threading.current_thread().name)
        return image_size(data)

    monkeypatch.setattr(images, "image_size", size)
    assert post(server, asked(video_part(animation(3)))).status_code == 200
    assert [name.startswith("pumice-videos") for name in threads] == [True] * 3


def test_frames_count_in_the_memory_of_requests() -> None:
    url = VideoUrl(url=video_part(animation())["video_url"]["url"])

    async def read(account: Account) -> Any:
        workers = Workers()
        try:
            return await read_images([("a", url)], ServerSettings().check(), None, workers, account, None)
        finally:
            workers.close()

    account = Account(Memory(1 << 20))
    (file,) = asyncio.run(read(account))
    assert account.taken == sum(map(len, file.data.source.images)) > 0
    with pytest.raises(ApiError) as caught:
        asyncio.run(read(Account(Memory(account.taken - 1))))
    assert caught.value.status == 413


def test_videos_count_as_pictures_do(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error = error_of(post(small, asked(*[video_part(animation())] * 3)), 400)
    assert "3 pictures; show at most 2" in error["message"]
    monkeypatch.setattr(video, "CPU_SECONDS", 0)  # what the message says
    monkeypatch.setattr(video, "WALL_SECONDS", 0)
    error = error_of(post(small, asked(video_part(animation()))), 400)
    assert "cannot be decoded within 0 s" in error["message"] and error["code"] == "invalid_video"


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_a_smolvlm2_is_served(quantize: Any, models: Any, local: Any, tmp_path: Path) -> None:
    """A picture in tiles, then a video in a second turn: as in Python, whole and streamed."""
    loaded = models.tiny(models.ARCHITECTURES["SigLIP, split (SmolVLM)"])
    policy = VideoPolicy(max_frames=2, fps=1.0, longest_edge=56, timestamps=True)
    state = {name: tensor.read() for name, tensor in loaded.state.items()}
    config = replace(loaded.config, video=policy)
    model_folder.save(tmp_path, config, state, tokenizer=loaded.tokenizer.to_str())
    clip, shown = animation(4), picture(1)
    messages = [
        {"role": "user", "content": [{"type": "image", "image": shown}, {"type": "text", "text": "One."}]},
        {"role": "assistant", "content": "A."},
        {"role": "user", "content": asked_in_python(clip)},
    ]
    expected = "".join(load(tmp_path, device="cpu", quantize=quantize).stream(messages, max_new_tokens=8))
    second = {"role": "user", "content": [video_part(clip), {"type": "text", "text": "What?"}]}
    body = {"messages": [user_message("One.", shown), messages[1], second], "max_tokens": 8}
    with local(folder=tmp_path, quantize=quantize) as url:
        answer = post(url, body).json()
        assert answer["choices"][0]["message"]["content"] == expected
        lines = post(url, {**body, "stream": True}).text.splitlines()
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        deltas = [choice["delta"] for event in events for choice in event["choices"]]
        assert "".join(delta.get("content") or "" for delta in deltas) == expected


def test_frames_that_become_pictures_count_their_tiles(models: Any) -> None:
    config = models.tiny(models.ARCHITECTURES["SigLIP, split (SmolVLM)"]).config
    frames = PictureFile(Video(Frames((b"", b""), (0.0, 1.0), 2.0)), ((300, 200), (300, 200)))
    shown = count_tiles([PictureFile(b"", ((300, 200),))], config)
    assert shown > 1 and count_tiles([frames], config) == 2 * shown
    assert count_tiles([frames], replace(config, video=VideoPolicy())) == 2
