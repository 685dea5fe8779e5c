"""The decoder against transformers, family by family, and against itself with cache and padding."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pumice.config import DecoderConfig, RopeScaling
from pumice.errors import InputError
from pumice.formats import names as tensor_names
from pumice.model.cache import KVCache, Segment
from pumice.model.decoder import Decoder
from pumice.model.layers import Causal, causal_mask, rope_inv_freq
from pumice.model.packed import PackedAttention, Run
from pumice.storage.tensors import as_lazy

# head_dim x heads differs from width, so that no reshape can pass by accident
BASE = DecoderConfig(
    vocab_size=67, width=32, depth=3, heads=4, kv_heads=2, head_dim=12, mlp_width=40,
    context=64, rope_theta=500.0, norm_eps=1e-5,
)  # fmt: skip
FAMILIES: dict[str, tuple[str, DecoderConfig]] = {
    "llama": ("LlamaForCausalLM", BASE),
    "llama tied": ("LlamaForCausalLM", dataclasses.replace(BASE, tied_head=True)),
    "llama one kv head": ("LlamaForCausalLM", dataclasses.replace(BASE, kv_heads=1)),
    "llama linear": ("LlamaForCausalLM", dataclasses.replace(BASE, rope_scaling=RopeScaling("linear", 4.0))),
    # of its six frequencies two are kept, two slowed, and two lie in between
    "llama 3": (
        "LlamaForCausalLM",
        dataclasses.replace(BASE, rope_scaling=RopeScaling("llama3", 8.0, 0.15, 0.8, 16)),
    ),
    "mistral window": ("MistralForCausalLM", dataclasses.replace(BASE, sliding_window=5)),
    "qwen2": ("Qwen2ForCausalLM", dataclasses.replace(BASE, head_dim=8, qkv_bias=True, norm_eps=1e-6)),
    "qwen3": ("Qwen3ForCausalLM", dataclasses.replace(BASE, qk_norm=True, norm_eps=1e-6, tied_head=True)),
    "gemma 2": (
        "Gemma2ForCausalLM",
        dataclasses.replace(
            BASE,
            tied_head=True,
            sliding_window=5,
            window_pattern=2,
            activation="gelu_tanh",
            post_norms=True,
            norm_offset=1.0,
            embed_scale=32**0.5,
            attention_scale=20**-0.5,
            attention_softcap=2.0,
            logit_softcap=9.0,
        ),
    ),
}
TOKENS = 19  # longer than the sliding window


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Every parameter random, biases and norms too, and large enough that each one matters."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = noise * 0.3 if parameter.dim() == 2 else 1 + 0.5 * noise


def make(config: DecoderConfig) -> Decoder:
    decoder = Decoder(config).eval().requires_grad_(False)
    randomise(decoder)
    return decoder


def ids(rows: int, tokens: int = TOKENS) -> Tensor:
    return torch.randint(0, BASE.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(1))


def make_reference(family: str) -> tuple[torch.nn.Module, DecoderConfig]:
    """transformers' model of a family, random, and our config of it."""
    import transformers

    name, config = FAMILIES[family]
    model_class = getattr(transformers, name)
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if (scaling := config.rope_scaling) is not None:
        rope |= {
            "rope_type": scaling.kind,
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    own = {}
    if config.post_norms:
        assert config.attention_scale is not None
        own = {
            "query_pre_attn_scalar": round(config.attention_scale**-2),
            "attn_logit_softcapping": config.attention_softcap,
            "final_logit_softcapping": config.logit_softcap,
        }
    reference = model_class(
        model_class.config_class(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            intermediate_size=config.mlp_width,
            max_position_embeddings=config.context,
            rope_parameters=rope,
            rms_norm_eps=config.norm_eps,
            sliding_window=config.sliding_window,
            tie_word_embeddings=config.tied_head,
            attn_implementation="eager",
            **own,
        )
    )
    reference = reference.eval().requires_grad_(False)
    randomise(reference)
    return reference, config


def make_ported(reference: torch.nn.Module, config: DecoderConfig) -> Decoder:
    """Our decoder with the same weights."""
    ported = Decoder(config).eval().requires_grad_(False)
    state = {name: as_lazy(tensor) for name, tensor in reference.state_dict().items()}
    converted = tensor_names.convert(state, tensor_names.hf_decoder(config))
    ported.load_state_dict({name: tensor.read() for name, tensor in converted.items()})
    return ported


def logits(decoder: Decoder, tokens: Tensor) -> Tensor:
    """The whole sequence at once, without a cache: the reference of the other tests."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    hidden = decoder(decoder.embed(tokens), positions, Causal(decoder.config))
    return decoder.logits(hidden)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(family: str) -> None:
    reference, config = make_reference(family)
    tokens = ids(2)
    expected = reference(tokens).logits
    assert expected.std() > 1  # otherwise the tolerance would say nothing
    difference = (logits(make_ported(reference, config), tokens) - expected).abs().max().item()
    print(f"{family}: {difference:.1e} of {expected.abs().max():.1f}")
    assert difference < 1e-4  # measured worst: 1.4e-5; Gemma 2: 1.0e-5


@pytest.mark.parametrize("family", ["llama 3", "mistral window", "qwen2", "qwen3", "gemma 2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_logits_equal_those_of_transformers(family: str, side: str) -> None:
    reference, config = make_reference(family)
    ported, tokens = make_ported(reference, config), ids(3)
    real = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, length in enumerate((TOKENS, 4, 11)):
        real[row, slice(TOKENS - length, TOKENS) if side == "left" else slice(0, length)] = True
    positions = (real.cumsum(1) - 1).clamp_min(0)
    expected = reference(tokens, attention_mask=real.long(), position_ids=positions).logits
    hidden = ported(ported.embed(tokens), positions, Causal(config, real))
    difference = (ported.logits(hidden) - expected)[real].abs().max().item()
    print(f"{family}, {side}: {difference:.1e}")
    assert difference < 1e-4  # measured worst: 1.4e-5; Gemma 2: 1.0e-5


def test_scaled_frequencies_are_those_of_transformers() -> None:
    """Llama 3.2's own numbers, which the small model above does not have."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    reference, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(head_dim=64, rope_parameters=rope), "cpu")
    ported = rope_inv_freq(64, 500000.0, RopeScaling("llama3", 32.0, 1.0, 4.0, 8192), torch.device("cpu"))
    difference = (ported / reference - 1).abs().max().item()
    print(f"relative {difference:.1e}")
    assert difference < 1e-6  # measured worst: 6.0e-8


def test_the_window_is_shorter_than_the_sequence_and_matters() -> None:
    config = FAMILIES["mistral window"][1]
    narrow, wide = make(config), make(dataclasses.replace(config, sliding_window=None))
    tokens = ids(1)
    assert config.sliding_window == 5
    near, far = logits(narrow, tokens)[0], logits(wide, tokens)[0]
    torch.testing.assert_close(near[:5], far[:5], atol=1e-4, rtol=0)
    assert (near[5:] - far[5:]).abs().amax(-1).min() > 1e-2


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_sequences_in_one_cache_compute_as_alone(family: str, window: int | None) -> None:
    """Prompts in one or two pieces, single tokens and several at once, all in the same passes."""
    config = FAMILIES[family][1]
    pattern = 1 if window is None else config.window_pattern
    config = dataclasses.replace(config, sliding_window=window, window_pattern=pattern)
    decoder = make(config)
    rows = ids(3)
    expected = logits(decoder, rows)
    cache = KVCache(config, 64, torch.device("cpu"), torch.float32, block=6)
    # Neighbouring blocks, and others; not in order, some unused.
    tables, past = [[6, 7, 8], [9, 1, 0], [5, 4, 3]], [0, 0, 0]
    worst = 0.0

    def step(*new: int) -> None:
        nonlocal worst
        chosen = [row for row, count in enumerate(new) if count]
        segments = [Segment(tables[row], past[row], new[row]) for row in chosen]
        tokens = torch.cat([rows[row, past[row] : past[row] + new[row]] for row in chosen])[None]
        hidden = decoder(decoder.embed(tokens), cache.positions(segments), cache.attend(segments))
        pieces = decoder.logits(hidden)[0].split([new[row] for row in chosen])
        for row, ported in zip(chosen, pieces, strict=True):
            worst = max(worst, (ported - expected[row, past[row] : past[row] + new[row]]).abs().max().item())
            past[row] += new[row]

    step(3, 0, 0)
    step(1, 9, 0)  # an answer, and another's prompt
    step(1, 2, 7)
    step(1, 1, 1)
    step(2, 0, 8)
    step(1, 1, 1)
    assert past == [9, 13, 17]
    # The beginning of one is now also that of another: a block that both share, and a part that is copied.
    cache.copy(tables[2][1], 2, 3)
    tables[1], past[1], rows[1, :9] = [tables[2][0], 2, 10], 9, rows[2, :9]
    expected = logits(decoder, rows)
    step(0, 5, 0)
    step(1, 1, 1)
    print(f"{family}: {worst:.1e}")
    assert worst < 1e-4  # measured worst: 1.6e-5


def test_what_does_not_fit_in_the_cache_is_refused() -> None:
    cache = KVCache(BASE, 7, torch.device("cpu"), torch.float32, block=4)
    assert (cache.blocks, cache.capacity) == (2, 8)
    with pytest.raises(ValueError, match="3 \\+ 2 tokens do not fit in 1 blocks of 4 cells"):
        cache.attend([Segment([0], 0, 1), Segment([1], 3, 2)])
    with pytest.raises(ValueError, match=r"\[2\] are not all in a cache of 2 blocks"):
        cache.attend([Segment([2], 3, 1)])
    cache.attend([Segment([1, 0], 6, 2)])


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(side: str, window: int | None) -> None:
    decoder = make(dataclasses.replace(BASE, sliding_window=window))
    rows, lengths = ids(3, 10), [10, 4, 7]
    real = torch.zeros(3, 10, dtype=torch.bool)
    for row, length in enumerate(lengths):
        real[row, slice(10 - length, 10) if side == "left" else slice(0, length)] = True
    positions = (real.cumsum(1) - 1).clamp_min(0)
    hidden = decoder(decoder.embed(rows), positions, Causal(decoder.config, real))
    assert hidden.isfinite().all()
    for row in range(3):
        alone = logits(decoder, rows[row, real[row]][None])[0]
        # measured worst: 2.9e-6
        torch.testing.assert_close(decoder.logits(hidden[row, real[row]]), alone, atol=1e-4, rtol=0)


def test_packed_rows_do_not_see_each_other() -> None:
    decoder = make(BASE)
    rows = ids(2, 9)
    lengths = (9, 5)
    together = torch.cat((rows[0], rows[1, :5]))[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    attend = PackedAttention([Run(n) for n in lengths], BASE)
    actual = decoder.logits(decoder(decoder.embed(together), positions, attend))[0]
    for row, part in enumerate(actual.split(lengths)):
        alone = logits(decoder, rows[row : row + 1, : lengths[row]])[0]
        torch.testing.assert_close(part, alone, atol=1e-4, rtol=0)


def test_packed_branches_heed_the_sliding_window() -> None:
    """Depth in the tree counts, not the number of nodes: two branches of a trunk, each as if alone."""
    decoder = make(dataclasses.replace(BASE, sliding_window=3))
    trunk, first, second = ids(1, 4)[0], ids(1, 3)[0], ids(1, 3)[0].flip(0)
    runs = [Run(7), Run(3, ((0, 4),))]  # the second branch goes on where the trunk ends
    tree = torch.cat((trunk, first, second))[None]
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 4, 5, 6]])
    actual = decoder.logits(decoder(decoder.embed(tree), positions, PackedAttention(runs, decoder.config)))[0]
    for branch, rows in ((first, [*range(7)]), (second, [*range(4), 7, 8, 9])):
        alone = torch.cat((trunk, branch))[None]
        hidden = decoder(decoder.embed(alone), torch.arange(7)[None], Causal(decoder.config))
        torch.testing.assert_close(actual[rows], decoder.logits(hidden)[0], atol=1e-4, rtol=0)


def test_causal_mask_by_hand() -> None:
    order = torch.arange(4)
    assert causal_mask(order, order, 2).int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 0, 1, 1],
    ]
    assert causal_mask(order[2:], order).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_tied_head_is_the_embedding() -> None:
    decoder = Decoder(dataclasses.replace(BASE, tied_head=True))
    assert decoder.head is None
    assert decoder.head_weight is decoder.embed.weight
    assert "head.weight" not in decoder.state_dict()


def test_the_projection_takes_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a slice with a batch PyTorch makes a product of matrices, for which it copies all the weights."""
    decoder, shapes, linear = make(BASE), [], F.linear

    def token_counts(x: Tensor, weight: Tensor) -> Tensor:
        shapes.append(tuple(x.shape))
        return linear(x, weight)

    monkeypatch.setattr("pumice.model.decoder.F.linear", token_counts)
    hidden = torch.randn(2, 4, BASE.width)
    last = decoder.logits(hidden[:, -1:])
    torch.testing.assert_close(last[1, 0], decoder.logits(hidden[1, -1]))
    assert decoder.logits(hidden[:, :0]).shape == (2, 0, BASE.vocab_size)
    assert shapes == [(2, BASE.width), (1, BASE.width), (0, BASE.width)]


def test_named_intermediates_are_the_residual_stream() -> None:
    decoder = make(BASE)
    tokens = ids(2, 6)
    out: dict[str, Tensor] = {}
    hidden = decoder(decoder.embed(tokens), torch.arange(6).expand(2, 6), Causal(BASE), out)
    assert list(out) == ["embeddings", *(f"decoder.blocks.{i}" for i in range(BASE.depth))]
    assert all(value.shape == (2, 6, BASE.width) for value in out.values())
    torch.testing.assert_close(decoder.norm(out["decoder.blocks.2"]), hidden)


@pytest.mark.parametrize("row_ids", [[5], [0, 3, 3, 1], []])
def test_wanted_rows_are_those_of_the_whole(row_ids: list[int]) -> None:
    """In any order, twice or not at all; the last block's MLP sees no others."""
    decoder = make(BASE)
    tokens, rows, token_counts = ids(2, 6), torch.tensor(row_ids, dtype=torch.long), list[int]()
    decoder.blocks[-1].mlp.register_forward_pre_hook(
        lambda _, inputs: token_counts.append(inputs[0].shape[1])
    )
    inputs = decoder.embed(tokens), torch.arange(6).expand(2, 6), Causal(BASE)
    # a product of fewer rows rounds otherwise: measured worst case 4e-7
    torch.testing.assert_close(decoder(*inputs, rows=rows), decoder(*inputs)[:, rows], rtol=1e-5, atol=1e-5)
    assert token_counts == [len(row_ids), 6]


def test_heads_that_cannot_share_are_refused() -> None:
    with pytest.raises(InputError, match="4 heads cannot share 3 key/value heads evenly"):
        dataclasses.replace(BASE, kv_heads=3)


def test_the_cache_copies_the_beginning_of_a_block() -> None:
    cache = KVCache(BASE, 16, torch.device("cpu"), torch.float32, block=8)
    for cached in (cache.keys, cache.values):
        cached.copy_(torch.arange(cached.numel()).view_as(cached))
    before = cache.keys.clone(), cache.values.clone()
    cache.copy(1, 0, 5)
    for cached, old in zip((cache.keys, cache.values), before, strict=True):
        old[:, :, :5] = old[:, :, 8:13].clone()
        assert torch.equal(cached, old)
