"""Take frames of a video, by Pillow of an animation, else by PyAV, in a process with bounds.

    python -m pumice.video

reads {"path": ..., "fps": ..., "max_frames": ..., "cpu_seconds": ..., "memory": ...} from standard input, and
writes one line of JSON and then the frames as PNG files.
"""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import os
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from pumice.conversation import Conversation, ImagePart, StoredImage, Video
from pumice.errors import InputError, install
from pumice.images import MAX_PIXELS, is_video, open_image
from pumice.media import Frames, VideoPolicy
from pumice.stopping import limit_process, run_bounded

_LOG = logging.getLogger(__name__)
MAX_FRAMES = 10_000  # of an animation; a longer one is cut
MAX_BYTES = 400 << 20  # of the frames' files together
CPU_SECONDS, WALL_SECONDS, MEMORY = 120, 600, 3 * 2**30
PICTURE_FRAMES = 8  # of a video, shown as pictures to a model that was not trained on videos
_FRAME_SECONDS = 0.1  # of an animation that does not say how long it shows a frame
# Libav's readers of the videos that `is_video` knows. Others, of playlists for one, open further files or
# addresses.
_LIBAV = {"format_whitelist": "avi,flv,matroska,mov,mpeg,ogg", "protocol_whitelist": "file"}
_INTRO = "You are provided the following series of {} frames from a {} [H:MM:SS] video.\n"
_ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


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


def read_frames(video: Video, policy: VideoPolicy | None) -> Frames:
    """Take frames of a video as the policy says; `video.frames` overrides how many.

    policy: None for a model that was not trained on videos. Raises InputError if it cannot be opened or has
    no frame, and Stopped when the work is stopped. A damaged end is left out, and a note says so.
    """
    if isinstance(video.source, Frames):
        return video.source
    policy = policy or VideoPolicy(max_frames=PICTURE_FRAMES)
    fps, count = (0.0, video.frames) if video.frames else (policy.fps, policy.max_frames)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video"
        if isinstance(video.source, bytes | StoredImage):
            data = video.source if isinstance(video.source, bytes) else video.source.load()
            name = "the video" if isinstance(video.source, bytes) else video.name
            if not data:
                raise InputError(f"{name} is empty (0 bytes); give the whole file")
            path.write_bytes(data)
        else:
            path = Path(video.source)
        if not os.path.isfile(path) or not path.stat().st_size:  # False for an overlong path
            raise InputError(f"there is no video {video.name}, or it is empty; check the path")
        if is_video(path) and importlib.util.find_spec("av") is None:
            raise InputError(f"{video.name} is a video, which needs the package av: {install('video')}")
        # In a process whose time and memory are bounded: decoders read strangers' files.
        request = {"path": str(path), "fps": fps, "max_frames": count}
        bounds = {"cpu_seconds": CPU_SECONDS, "memory": MEMORY}
        data, ended = run_bounded(__name__, request | bounds, WALL_SECONDS)
    if not ended:
        raise InputError(
            f"{video.name} cannot be decoded within {CPU_SECONDS} s and {MEMORY >> 30} GB; give a shorter "
            "or smaller one"
        )
    output = io.BytesIO(data)
    answer = json.loads(output.readline())
    # Libraries name the file, which may be a copy of ours.
    if "error" in answer:
        raise InputError(f"{video.name} {answer['error']}".replace(str(path), video.name))
    if answer["note"]:
        _LOG.warning("%s", f"{video.name} {answer['note']}".replace(str(path), video.name))
    return Frames(tuple(map(output.read, answer["sizes"])), tuple(answer["times"]), answer["duration"])


def show_videos(conversation: Conversation, policy: VideoPolicy | None) -> Conversation:
    """Return the conversation with the frames of each video in its place, and their texts.

    policy: None for a model that was not trained on videos: frames are then pictures.
    """
    return conversation.with_parts(lambda part: _shown(part, policy))


def _shown(part: ImagePart, policy: VideoPolicy | None) -> tuple[str | ImagePart, ...]:
    if not isinstance(part.source, Video):
        return (part,)
    frames = read_frames(part.source, policy)
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


def _decode(path: str, fps: float, max_frames: int, output: BinaryIO) -> None:
    """Write the chosen frames of a video: a line of JSON, then PNG files."""
    take = _take_film if is_video(path) else _take_animation
    try:
        frames, note = take(path, fps, max_frames)
    except ValueError as error:
        output.write(json.dumps({"error": str(error)}).encode())
        return
    answer = {
        "sizes": [len(file) for file in frames.images], "times": frames.times, "duration": frames.duration,
        "note": note,
    }  # fmt: skip
    output.write(json.dumps(answer).encode() + b"\n" + b"".join(frames.images))


def _take_animation(path: str, fps: float, count: int) -> tuple[Frames, str]:
    """Return frames of an animation, and a note or "". Raises ValueError that ends a sentence about it."""
    try:
        with Image.open(path) as image:
            _check_size(image.width, image.height)
            # Durations stand in the frames, so all are decoded once, and the chosen ones kept.
            starts: list[float] = []
            end, rest = 0.0, ""
            try:
                for number in range(MAX_FRAMES):
                    image.seek(number)
                    image.load()
                    starts.append(end)
                    end += image.info.get("duration", 0) / 1000 or _FRAME_SECONDS
            except MemoryError:  # it ends the process, as its other bounds do
                raise
            except Exception as error:  # EOFError is the end; decoders raise anything else on damaged data
                rest = _torn(path, image.format) if isinstance(error, EOFError) else str(error)
        if not starts:
            raise ValueError(rest)
        files = _Files()
        with Image.open(path) as image:  # anew: a damaged end leaves it in no state to go back
            for number in (numbers := sample(len(starts), len(starts) / end, fps, count)):
                image.seek(number)
                files.add(open_image(image.convert("RGBA")))
    except (_Refused, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"has no frame that can be read ({error}); give GIF, WebP, MP4 or WebM") from error
    times = tuple(starts[number] for number in numbers)
    return Frames(tuple(files), times, end), _damaged(len(starts), rest) if rest else ""


def _torn(path: str, kind: str | None) -> str:
    """Return why an animation that has no more frames may lack its end; "" if it does not."""
    if kind != "GIF":
        return ""
    # Pillow takes a GIF that is cut off between two frames for a whole one.
    with Path(path).open("rb") as file:
        file.seek(max(0, file.seek(0, io.SEEK_END) - 64))
        ending = file.read().rstrip(b"\0\r\n")
    return "" if ending.endswith(b";") else "it does not end as a GIF does"


def _take_film(path: str, fps: float, count: int) -> tuple[Frames, str]:
    """Return frames of a film as `_take_animation` does."""
    import av

    note = ""
    times: list[float] = []
    files = _Files()
    try:
        with av.open(path, container_options=_LIBAV) as container:
            stream = container.streams.video[0]
            rate = float(stream.average_rate or stream.guessed_rate or 24)
            # Headers err, so frames are counted by decoding.
            try:
                for number, frame in enumerate(container.decode(stream)):
                    times.append(frame.time if frame.time is not None else number / rate)
            except MemoryError:
                raise
            except av.FFmpegError as error:
                note = _damaged(len(times), error.strerror)
            # A file that was cut off may end without an error.
            stated = (container.duration or 0) / av.time_base
            if stream.duration is not None and stream.time_base is not None:
                stated = float(stream.duration * stream.time_base)
            if not note and stated - len(times) / rate > max(1, stated / 10):
                note = f"ends after {len(times) / rate:.1f} of {stated:.1f} s: what follows is left out"
        if not times:
            raise ValueError("it holds no frame")
        numbers = sample(len(times), rate, fps, count)
        with av.open(path, container_options=_LIBAV) as container:
            for number, frame in enumerate(container.decode(video=0)):
                if number in numbers:
                    _check_size(frame.width, frame.height)
                    image = Image.fromarray(frame.to_ndarray(format="rgb24"))
                    # A telephone stores how its film is turned: counter-clockwise, as Pillow counts degrees.
                    turn = getattr(frame, "rotation", 0)  # older versions of PyAV have no such field
                    files.add(image.rotate(turn, expand=True) if turn else image)
                if number >= numbers[-1]:
                    break
    except (_Refused, MemoryError):
        raise
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise ValueError(f"has no frame that can be read ({_reason(error)}); give another") from error
    return Frames(tuple(files), tuple(times[number] for number in numbers), len(times) / rate), note


def _reason(error: Exception) -> str:
    """Return an error's text, of Libav's without its number and the path."""
    text: str | None = getattr(error, "strerror", None)
    if text and isinstance(error, ValueError | OSError | EOFError):
        return "it is cut off or damaged"
    return text or str(error)


class _Refused(ValueError):
    """A video that could be decoded, but is larger than is allowed."""


class _Files(list[bytes]):
    """PNG files of frames, of at most MAX_BYTES together."""

    def add(self, frame: Image.Image) -> None:
        file = io.BytesIO()
        frame.save(file, "PNG", compress_level=1)
        self.append(file.getvalue())
        if sum(map(len, self)) > MAX_BYTES:
            raise _Refused(
                f"has frames of more than {MAX_BYTES >> 20} MB together; give a smaller copy, or show fewer"
            )


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise _Refused(f"is {width} x {height}; give a smaller copy")


def _damaged(frames: int, reason: str) -> str:
    return f"is damaged after frame {frames} ({reason}): what follows is left out"


if __name__ == "__main__":
    request = json.load(sys.stdin)
    limit_process(request["cpu_seconds"], request["memory"])
    _decode(request["path"], request["fps"], request["max_frames"], sys.stdout.buffer)
