"""Run a GGUF pair by llama.cpp, through the C interface of the package llama-cpp-python.

Shapes: N image tokens, D width, T positions whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pumice.errors import InputError
from pumice.formats.gguf.library import llama_library, mtmd_library

CONTEXT = 4096  # tokens
PURPOSE = "running a GGUF pair by llama.cpp"


class LlamaCpp:
    """A language model and its mmproj in llama.cpp, on the CPU, with a cache of keys and values in fp32."""

    def __init__(self, model: Path, mmproj: Path | None) -> None:
        self._lib = lib = llama_library(PURPOSE)
        self._mtmd = mtmd = mtmd_library(PURPOSE)
        self._model = lib.llama_model_load_from_file(str(model).encode(), lib.llama_model_default_params())
        if not self._model:
            raise InputError(f"llama.cpp cannot open {model}")
        settings = lib.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = CONTEXT, CONTEXT, 512
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        settings.type_k = settings.type_v = lib.GGML_TYPE_F32
        settings.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = lib.llama_init_from_model(self._model, settings)
        self._eyes: Any = None
        if mmproj is not None:
            options = mtmd.mtmd_context_params_default()
            options.use_gpu, options.n_threads, options.print_timings = False, torch.get_num_threads(), False
            self._eyes = mtmd.mtmd_init_from_file(str(mmproj).encode(), self._model, options)
            if not self._eyes:
                raise InputError(f"llama.cpp cannot open {mmproj} with {model}")
        self.width = int(lib.llama_model_n_embd(self._model))
        self._vocabulary = lib.llama_model_get_vocab(self._model)
        self.rows = int(lib.llama_vocab_n_tokens(self._vocabulary))

    def close(self) -> None:
        """Free the memory."""
        if self._eyes:
            self._mtmd.mtmd_free(self._eyes)
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)

    def ids(self, text: str, first: bool) -> list[int]:
        """Return the tokens of a text. first: put the begin of text before it, where there is one."""
        data = text.encode()
        room = (self._lib.llama_token * (len(data) + 8))()
        count = self._lib.llama_tokenize(self._vocabulary, data, len(data), room, len(room), first, True)
        return list(room[:count])

    def image_tokens(self, picture: Image.Image) -> Tensor:
        """Return what tower and connector make of an RGB picture, (N, D): its tiles one after another."""
        if self._eyes is None:
            raise InputError("this GGUF model has no mmproj, so it sees no picture; give it with --mmproj")
        mtmd, data = self._mtmd, picture.tobytes()
        pixels = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        bitmap = mtmd.mtmd_bitmap_init(picture.width, picture.height, pixels)
        marker = mtmd.mtmd_default_marker()
        given = mtmd.mtmd_input_text(marker, len(marker), False, True)
        bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
        chunks = mtmd.mtmd_input_chunks_init()
        parts = []
        if mtmd.mtmd_tokenize(self._eyes, chunks, ctypes.byref(given), bitmaps, 1):
            raise InputError("llama.cpp cannot read the picture")
        for number in range(mtmd.mtmd_input_chunks_size(chunks)):
            chunk = mtmd.mtmd_input_chunks_get(chunks, number)
            if mtmd.mtmd_input_chunk_get_type(chunk) != mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE:
                continue
            count = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
            if mtmd.mtmd_encode_chunk(self._eyes, chunk):
                raise InputError("llama.cpp cannot encode the picture")
            values = mtmd.mtmd_get_output_embd(self._eyes)
            parts.append(torch.tensor(values[: count * self.width]).view(count, self.width))
        mtmd.mtmd_input_chunks_free(chunks)
        mtmd.mtmd_bitmap_free(bitmap)
        return torch.cat(parts)

    def logits(self, pieces: Sequence[list[int] | Tensor], written: Sequence[int]) -> Tensor:
        """Return the logits (T, V) behind a prompt and behind each token that is written after it.

        pieces: of the prompt, tokens and image tokens (N, D) in turn.
        """
        lib = self._lib
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        past = 0
        for piece in pieces:
            past = self._read(piece, past)
        rows = [self._last()]
        for token in written:
            past = self._read([token], past)
            rows.append(self._last())
        return torch.stack(rows)

    def _read(self, piece: list[int] | Tensor, past: int) -> int:
        """Read tokens or image tokens behind those that are there. Return their number."""
        lib, count = self._lib, len(piece)
        if past + count > CONTEXT:
            raise InputError(f"the prompt has more than the {CONTEXT} tokens that are compared in llama.cpp")
        if not count:
            return past
        batch = lib.llama_batch_init(count, self.width if isinstance(piece, Tensor) else 0, 1)
        batch.n_tokens = count
        if isinstance(piece, Tensor):
            values = piece.float().contiguous()
            ctypes.memmove(batch.embd, values.data_ptr(), values.nbytes)
        for number in range(count):
            if not isinstance(piece, Tensor):
                batch.token[number] = piece[number]
            batch.pos[number], batch.n_seq_id[number], batch.seq_id[number][0] = past + number, 1, 0
            batch.logits[number] = number == count - 1
        failed = lib.llama_decode(self._context, batch)
        lib.llama_batch_free(batch)
        if failed:
            raise InputError(f"llama.cpp cannot read {count} tokens")
        return past + count

    def _last(self) -> Tensor:
        values = self._lib.llama_get_logits_ith(self._context, -1)
        return torch.tensor(values[: self.rows])
