"""Take frames of a video: animations by Pillow, everything else by PyAV, in a process with bounds.

    python -m pumice.video

reads one JSON object from standard input, {"path", "fps", "max_frames"}, and writes one line of JSON and then
the frames as PNG files.
"""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from pumice.conversation import Conversation, ImagePart, Video
from pumice.errors import InputError, install
from pumice.images import MAX_PIXELS, open_image
from pumice.media import VideoPolicy
from pumice.stopping import limit_process

_LOG = logging.getLogger(__name__)
MAX_FRAMES = 10_000  # of an animation; a longer one is cut
CPU_SECONDS, WALL_SECONDS, MEMORY = 120, 600, 3 * 2**30
_FRAME_SECONDS = 0.1  # of an animation that does not say how long it shows a frame
_CONTAINERS = {0: (b"\x1aE\xdf\xa3", b"FLV\x01", b"\x00\x00\x01\xba", b"OggS"), 4: (b"ftyp", b"moov")}
_INTRO = "You are provided the following series of {} frames from a {} [H:MM:SS] video.\n"
_ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


@dataclass(frozen=True)
class Frames:
    """Frames of a video with the seconds at which each is shown, and the seconds of the whole."""

    images: tuple[Image.Image, ...]
    times: tuple[float, ...]
    duration: float


def is_video(source: Any) -> bool:
    """Return whether a file, or its bytes, is a video by its contents; an animation is a picture as well."""
    head = source[:12] if isinstance(source, bytes) else b""
    if isinstance(source, str | Path) and Path(source).is_file():
        with Path(source).open("rb") as file:
            head = file.read(12)
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return True
    return any(head[start:].startswith(marks) for start, marks in _CONTAINERS.items())


def sample(total: int, rate: float, fps: float, max_frames: int) -> list[int]:
    """Return the numbers of the frames to take, of `total` at `rate` frames a second.

    With fps, as transformers' SmolVLMVideoProcessor: fps frames a second up to max_frames, without the first
    and last second of a long video. Without, max_frames evenly.
    """
    duration, first, last = total / rate, 0, total - 1
    count = min(round(fps * duration), max_frames) if fps else min(max_frames, total)
    if fps and duration - 2 > max_frames * fps:
        first, last = int(rate), min(int(total - rate), total - 1)
    if first >= last:
        first, last = 0, total - 1
    return sorted(set(np.linspace(first, last, max(count, 1), dtype=int).tolist()))


def read_frames(video: Video, policy: VideoPolicy) -> Frames:
    """Take frames of a video as the policy says; `video.frames` overrides how many.

    Raises InputError if it cannot be opened or has no frame. A damaged end is left out, and a note says so.
    """
    fps, count = (0.0, video.frames) if video.frames else (policy.fps, policy.max_frames)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video"
        if isinstance(video.source, bytes):
            path.write_bytes(video.source)
        else:
            path = Path(video.source)
        if not path.is_file() or not path.stat().st_size:
            raise InputError(f"there is no video {video.name}, or it is empty; check the path")
        if is_video(path):
            return _decode_apart(str(path), video.name, fps, count)
        return _animation(path, video.name, fps, count)


def show_videos(conversation: Conversation, policy: VideoPolicy | None) -> Conversation:
    """Return the conversation with the frames of each video in its place, and their texts.

    policy: None for a model that was not trained on videos: frames are then pictures, and a note says so.
    """
    if not any(isinstance(image.source, Video) for image in conversation.images):
        return conversation
    if policy is None:
        _LOG.warning("the model was not trained on videos: their frames are shown as pictures")
    return conversation.with_parts(lambda part: _shown(part, policy))


def _shown(part: ImagePart, policy: VideoPolicy | None) -> tuple[str | ImagePart, ...]:
    if not isinstance(part.source, Video):
        return (part,)
    frames = read_frames(part.source, policy or VideoPolicy(max_frames=8))
    if policy is None:
        return tuple(map(ImagePart, frames.images))
    last = len(frames.images) - 1
    images = [ImagePart(image, "last" if n == last else "frame") for n, image in enumerate(frames.images)]
    if not policy.timestamps:
        return tuple(images)
    # The words of transformers' SmolVLMProcessor.
    length = str(timedelta(seconds=int(frames.duration)))
    parts: list[str | ImagePart] = [_INTRO.format(in_words(len(images)), length)]
    for image, seconds in zip(images, frames.times, strict=True):
        parts += [f"\nFrame from {int(seconds // 60):02d}:{int(seconds % 60):02d}:", image]
    return (*parts, "\n\n")


def in_words(number: int) -> str:
    """Return a number below 1000 in English, as num2words writes it."""
    if number < 20:
        return _ONES[number]
    if number < 100:
        return _TENS[number // 10 - 2] + (f"-{_ONES[number % 10]}" if number % 10 else "")
    rest = f" and {in_words(number % 100)}" if number % 100 else ""
    return f"{_ONES[number // 100]} hundred{rest}"


def _animation(path: Path, name: str, fps: float, count: int) -> Frames:
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise InputError(f"{name} is {image.width} x {image.height}; give a smaller copy")
            # Durations stand in the frames, so all are decoded once, and the chosen ones kept.
            starts: list[float] = []
            end, rest = 0.0, ""
            try:
                for number in range(MAX_FRAMES):
                    image.seek(number)
                    image.load()
                    starts.append(end)
                    end += image.info.get("duration", 0) / 1000 or _FRAME_SECONDS
            except Exception as error:  # EOFError is the end; decoders raise anything else on damaged data
                rest = "" if isinstance(error, EOFError) else str(error)
        if not starts:
            raise InputError(f"{name} has no frame that can be read ({rest}); give another")
        if rest:
            _LOG.warning(
                "%s is damaged after frame %d (%s): what follows is left out", name, len(starts), rest
            )
        numbers = sample(len(starts), len(starts) / end, fps, count)
        images = []
        with Image.open(path) as image:  # anew: a damaged end leaves it in no state to go back
            for number in numbers:
                image.seek(number)
                images.append(open_image(image.convert("RGBA")))
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{name} is no video that can be read ({error}); give GIF, WebP, MP4 or WebM"
        ) from error
    return Frames(tuple(images), tuple(starts[number] for number in numbers), end)


def _decode_apart(path: str, name: str, fps: float, count: int) -> Frames:
    """Decode in another process, whose time and memory are bounded: decoders read strangers' files."""
    if importlib.util.find_spec("av") is None:
        raise InputError(f"{name} is a video, which needs the package av: {install('video')}")
    request = {"path": path, "fps": fps, "max_frames": count}
    try:
        process = subprocess.run(
            [sys.executable, "-m", __name__], input=json.dumps(request).encode(), capture_output=True,
            timeout=WALL_SECONDS, check=True,
        )  # fmt: skip
    except subprocess.SubprocessError as error:
        raise InputError(
            f"{name} cannot be decoded within {CPU_SECONDS} s and {MEMORY >> 30} GB; give a shorter "
            "or smaller one"
        ) from error
    output = io.BytesIO(process.stdout)
    answer = json.loads(output.readline())
    if "error" in answer:
        raise InputError(f"{name} {answer['error']}")
    if answer["note"]:
        _LOG.warning("%s %s", name, answer["note"])
    images = tuple(open_image(output.read(size)) for size in answer["sizes"])
    return Frames(images, tuple(answer["times"]), answer["duration"])


def _decode(path: str, fps: float, max_frames: int, output: BinaryIO) -> None:
    """Write the chosen frames of a video: a line of JSON, then PNG files."""
    import av

    note, times = "", []
    try:
        with av.open(path) as container:
            stream = container.streams.video[0]
            rate = float(stream.average_rate or stream.guessed_rate or 24)
            # Headers err, so frames are counted by decoding, small and without colour.
            try:
                for number, frame in enumerate(container.decode(stream)):
                    times.append(frame.time if frame.time is not None else number / rate)
            except av.FFmpegError as error:
                note = f"is damaged after frame {len(times)} ({error}): what follows is left out"
        if not times:
            raise ValueError("it holds no frame")
        numbers = set(sample(len(times), rate, fps, max_frames))
        files = []
        with av.open(path) as container:
            for number, frame in enumerate(container.decode(video=0)):
                if number in numbers:
                    file = io.BytesIO()
                    Image.fromarray(frame.to_ndarray(format="rgb24")).save(file, "PNG", compress_level=1)
                    files.append(file.getvalue())
                if number >= max(numbers):
                    break
    except (av.FFmpegError, IndexError, ValueError) as error:
        output.write(json.dumps({"error": f"has no frame that can be read ({error}); give another"}).encode())
        return
    answer = {
        "sizes": [len(file) for file in files], "times": [times[n] for n in sorted(numbers)],
        "duration": len(times) / rate, "note": note,
    }  # fmt: skip
    output.write(json.dumps(answer).encode() + b"\n" + b"".join(files))


if __name__ == "__main__":
    limit_process(CPU_SECONDS, MEMORY)
    request = json.load(sys.stdin)
    _decode(request["path"], request["fps"], request["max_frames"], sys.stdout.buffer)
