"""Read and write the folder of an Idefics3 or a SmolVLM of transformers.

Both compute the same. A picture is resized until its longer side has `size`, then to whole tiles of
`max_image_size`; each tile is `image_seq_len` tokens behind a token of its row and column, and the whole
picture follows. Tensors: `model.text_model.*`, `lm_head`, `model.vision_model.*`,
`model.connector.modality_projection.proj`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from pumice.capability import LLAMA, Capability, fields
from pumice.config import LARGEST_GRID, ConnectorConfig, DecoderConfig, ImagePolicy, ModelConfig, VisionConfig
from pumice.config_json import naming
from pumice.errors import InputError
from pumice.formats import names as tensor_names
from pumice.formats.hf.config import (
    RESAMPLE_NUMBERS,
    WRITTEN,
    check_unquantised,
    decoder_config,
    image_policy,
    read_processor,
    read_video_processor,
    vision_config,
)
from pumice.formats.recognise import check_classes
from pumice.formats.text.read import read_text_side
from pumice.media import TileMarks, VideoPolicy
from pumice.storage.json_file import Keys, write_json
from pumice.storage.parts import LoadedParts
from pumice.storage.tensors import open_weights

KINDS = ("idefics3", "smolvlm")
IMAGE, FAKE, WHOLE = "<image>", "<fake_token_around_image>", "<global-img>"
MARKS = TileMarks(
    tile=FAKE + "<row_{row}_col_{column}>", row="\n", between="\n", whole=FAKE + WHOLE, end=FAKE
)
_PLAIN = replace(MARKS, tile="", row="", between="")  # of a folder that never cuts pictures into tiles
# The values that transformers gives to absent keys.
_CONFIG = {"image_token_id": 128257, "scale_factor": 2}
_TEXT = {"model_type": "llama", "rms_norm_eps": 1e-5}  # of a config.json without text_config
_PROCESSOR = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 1}
_SIZE, _TILE = 4 * 364, 364


def open_idefics3(folder: Path, template: str | None = None) -> LoadedParts:
    """Read the model in `folder`; template as in `open_hf`. Raises InputError."""
    # 1. config.json: the language model, the tower and the connector.
    source = Keys.of(folder / "config.json")
    keys = Keys(source.values, source.label, _CONFIG)
    kind = keys.get("model_type", str)
    check_unquantised(keys)
    said = list(check_classes(keys, kind))
    text = keys.object("text_config")
    text.values.update({} if text.values else _TEXT)
    text.values.setdefault("model_type", "llama")
    # transformers asks the outer key alone, which is false where it is absent.
    decoder = decoder_config(text, keys.get("tie_word_embeddings", bool, False))
    tower = keys.object("vision_config")
    tower.values["model_type"] = f"{kind}_vision"  # published configs say "idefics3", or nothing
    vision = vision_config(tower)
    factor = keys.get("scale_factor", int)
    with naming(f"{keys.label}: scale_factor"):
        connector = ConnectorConfig("linear", "pixel_shuffle", factor, bias=False)
        connector.tokens(vision.grid)
    # 2. How a picture becomes tiles, and how a conversation becomes tokens.
    image, video, more_notes = _image(folder, vision)
    said += more_notes
    marks = MARKS if image.mode == "split" else _PLAIN
    text_side = read_text_side(folder, keys)
    _check_tokens(keys, text_side.tokenizer, decoder)
    config, notes = text_side.model_config(
        template, str(folder), decoder=decoder, vision=vision, connector=connector, image=image, marks=marks,
        video=video,
    )  # fmt: skip
    _check_processor(folder, keys, config)
    # 3. The tensors.
    tensors = open_weights(folder)
    nesting = tensor_names.IDEFICS3
    tensor_names.check_family(tensors, f"{nesting.text}layers.0.", decoder, str(folder))
    table = tensor_names.llava(config, nesting, tensor_names.IDEFICS3_CONNECTOR, "")
    state = tensor_names.convert(tensors, table, str(folder))
    return text_side.parts(config, state, (*said, *notes))


def _image(folder: Path, vision: VisionConfig) -> tuple[ImagePolicy, VideoPolicy | None, list[str]]:
    """Read how pictures and videos become tiles, with notes.

    A SmolVLM2 has `video_sampling`, or a video processor with `num_frames`, as newer transformers save it.
    Raises InputError if tiles have another size than the tower's pictures.
    """
    source, notes = read_processor(folder)
    keys = Keys(_PROCESSOR | source.values, source.label)
    keys.only("do_resize", (True,), True)
    longest, tile = (
        keys.object(key).get("longest_edge", int, default)
        for key, default in (("size", _SIZE), ("max_image_size", _TILE))
    )
    if tile != vision.image_size:
        raise InputError(
            f"{keys.label}: max_image_size is {tile} pixels, but the tower's image_size in "
            f"{folder / 'config.json'} is {vision.image_size}; correct the wrong one"
        )
    # Their pixels are normalised as any tower's; sizes were read above.
    pixels = image_policy(
        Keys({k: v for k, v in keys.values.items() if k not in ("size", "do_pad")}, keys.label), vision
    )
    # A model that never cuts pictures shows each as one tile, which is resized in both steps as well.
    cuts = keys.get("do_image_splitting", bool, True)
    mode, several = ("split", "tiles") if cuts else ("squash", None)
    saved = read_video_processor(folder)
    video = None
    if "video_sampling" in keys:
        sampling = keys.object("video_sampling")
        # transformers takes `size` instead of `video_size` where the file has both.
        edge = longest if "size" in keys else sampling.object("video_size").get("longest_edge", int, tile)
        fps = sampling.get("fps", float, 1.0)
        video = VideoPolicy(sampling.get("max_frames", int, 64), fps, edge, timestamps=True)
    elif (frames := saved.get("num_frames", int, None)) is not None:
        edge = saved.object("size").get("longest_edge", int, _SIZE)
        video = VideoPolicy(frames, saved.get("fps", float, 1.0), edge, timestamps=True)
    return replace(pixels, mode=mode, longest_edge=longest, several=several), video, notes


def _check_tokens(keys: Keys, tokenizer: tokenizers.Tokenizer, decoder: DecoderConfig) -> None:
    """Compare the ids of the config with the tokenizer; mark the tokens around pictures as special."""
    number = keys.get("image_token_id", int)
    if (actual := tokenizer.token_to_id(IMAGE)) != number:
        stated = "lacks it" if actual is None else f"gives it {actual}"
        raise InputError(f"{keys.label}: image_token_id is {number}, but the tokenizer {stated} ({IMAGE})")
    if number >= decoder.vocab_size:
        raise InputError(
            f"{keys.label}: image_token_id is {number}, but vocab_size only {decoder.vocab_size}"
        )
    places = range(1, LARGEST_GRID + 1)
    names = [FAKE, WHOLE, *(f"<row_{row}_col_{column}>" for row in places for column in places)]
    tokenizer.add_special_tokens([
        AddedToken(name, special=True, normalized=False)
        for name in names
        if tokenizer.token_to_id(name) is not None
    ])  # fmt: skip


def _check_processor(folder: Path, keys: Keys, config: ModelConfig) -> None:
    """Compare image_seq_len of processor_config.json with the tokens of a tile."""
    file = folder / "processor_config.json"
    if not file.is_file():
        return
    stated = Keys.of(file).get("image_seq_len", int, config.image_tokens)
    if stated != config.image_tokens:
        raise InputError(
            f"{file}: image_seq_len is {stated}, but {keys.label} makes {config.image_tokens} tokens of a "
            "tile; correct the wrong one"
        )


CAPABILITY = Capability(
    "transformers' Idefics3",
    WRITTEN
    | {
        ModelConfig: fields(
            "decoder vision connector image template chat stop_token_ids bos_token_id generation lora "
            "trained_pictures marks video boxes"
        ),
        TileMarks: fields("tile row between whole end"),
        VideoPolicy: fields("max_frames fps longest_edge timestamps"),
        DecoderConfig: fields(f"{LLAMA} window_pattern"),
        VisionConfig: fields(
            "image_size width stride depth heads mlp_width norm_eps activation",
            kind=("siglip",), layer=(-1,), select=("full",), final_norm=(True,), fractional=(True,),
        ),
        ConnectorConfig: fields("factor", kind=("linear",), reduce=("pixel_shuffle",), bias=(False,)),
        ImagePolicy: fields("mean std resample pad_color several longest_edge", mode=("split", "squash")),
    },
)  # fmt: skip


def refusal(config: ModelConfig) -> str | None:
    """Return why transformers' Idefics3 cannot prepare pictures as this model does; None if it can."""
    if not config.image.longest_edge:
        return "its pictures are not resized to a longest_edge first, there they are"
    video = config.video
    if video is not None and video.longest_edge != config.image.longest_edge:
        return (
            f"its frames are first resized to {video.longest_edge} pixels, there as pictures are, to "
            f"{config.image.longest_edge}"
        )
    if config.marks != (MARKS if config.image.mode == "split" else _PLAIN):
        return f"its marks around pictures are {config.marks}, not Idefics3's"
    return CAPABILITY.unsupported(config)


def model_config(config: ModelConfig, parts: dict[str, Any]) -> dict[str, Any]:
    """Return config.json. parts: text_config, vision_config, torch_dtype and image_token_id."""
    return {
        "architectures": ["Idefics3ForConditionalGeneration"],
        "model_type": "idefics3",
        "scale_factor": config.connector.factor,
        "tie_word_embeddings": config.decoder.tied_head,
        **parts,
    }


def write_processor(folder: Path, config: ModelConfig) -> None:
    """Write the files of Idefics3Processor."""
    image, side = config.image, config.vision.image_size
    images: dict[str, Any] = {
        "image_processor_type": "Idefics3ImageProcessor", "processor_class": "Idefics3Processor",
        "do_convert_rgb": True, "do_resize": True, "size": {"longest_edge": image.longest_edge},
        "max_image_size": {"longest_edge": side}, "do_image_splitting": image.mode == "split",
        "resample": RESAMPLE_NUMBERS[image.resample], "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(image.mean), "image_std": list(image.std), "do_pad": True,
    }  # fmt: skip
    if (video := config.video) is not None:  # read again by us, and by SmolVLMProcessor
        size = {"longest_edge": video.longest_edge}
        images["video_sampling"] = {"fps": video.fps, "max_frames": video.max_frames, "video_size": size}
    write_json(folder / "preprocessor_config.json", images)
    values = {"processor_class": "Idefics3Processor", "image_seq_len": config.image_tokens}
    write_json(folder / "processor_config.json", values)
