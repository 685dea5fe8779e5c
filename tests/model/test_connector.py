"""Connectors: where each feature goes, which widths come out, and that the config counts the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pumice.config import REDUCTIONS, ConnectorConfig, DecoderConfig, ModelConfig, VisionConfig
from pumice.errors import InputError
from pumice.geometry import Layout
from pumice.model.connector import KINDS, REDUCE, Connector, Reduction, arrange, average, pixel_shuffle
from pumice.model.llava import Llava


def grid_of_four() -> torch.Tensor:
    """(1, 16, 2): the feature at row r, column c is (10 r + c, -(10 r + c))."""
    cells = torch.tensor([[10.0 * r + c for c in range(4)] for r in range(4)]).flatten()
    return torch.stack((cells, -cells), -1)[None]


def test_pixel_shuffle_puts_each_square_into_one_token() -> None:
    tokens = pixel_shuffle(grid_of_four(), 2)
    assert tokens.shape == (1, 4, 8)
    squares = [[0, 1, 10, 11], [2, 3, 12, 13], [20, 21, 30, 31], [22, 23, 32, 33]]
    assert tokens[0, :, 0::2].tolist() == squares  # row by row within the square, channels last
    assert tokens[0, :, 1::2].tolist() == [[-v for v in square] for square in squares]


def test_pixel_shuffle_of_the_whole_grid_is_one_token_in_reading_order() -> None:
    features = grid_of_four()
    assert torch.equal(pixel_shuffle(features, 4), features.reshape(1, 1, 32))
    assert torch.equal(pixel_shuffle(features, 1), features)


def test_average_is_the_mean_of_each_square() -> None:
    tokens = average(grid_of_four(), 2)
    assert tokens[0].tolist() == [[5.5, -5.5], [7.5, -7.5], [25.5, -25.5], [27.5, -27.5]]


def test_pictures_of_a_batch_stay_apart() -> None:
    both = torch.cat((grid_of_four(), grid_of_four() + 100))
    for reduce in (average, pixel_shuffle):
        torch.testing.assert_close(reduce(both, 2), torch.cat([reduce(one[None], 2) for one in both]))


@pytest.mark.parametrize(
    ("kind", "depth"), [("linear", 1), ("mlp1x_gelu", 1), ("mlp2x_gelu", 2), ("mlp3x_gelu", 3)]
)
def test_layers_of_each_kind(kind: str, depth: int) -> None:
    connector = Connector(ConnectorConfig(kind), 6, 10)
    linears = [layer for layer in connector.layers if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linears] == [(6, 10), (10, 10), (10, 10)][
        :depth
    ]
    assert sum(isinstance(layer, nn.GELU) for layer in connector.layers) == depth - 1
    assert all(isinstance(layer, nn.GELU) for layer in connector.layers[1::2])


def test_mlp2x_is_linear_gelu_linear() -> None:
    connector = Connector(ConnectorConfig("mlp2x_gelu"), 3, 5)
    state = connector.state_dict()
    assert list(state) == [
        "layers.0.weight",
        "layers.0.bias",
        "layers.2.weight",
        "layers.2.bias",
    ]  # LLaVA's own
    x = torch.randn(2, 4, 3)
    inner = x @ state["layers.0.weight"].T + state["layers.0.bias"]
    inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    torch.testing.assert_close(connector(x), inner @ state["layers.2.weight"].T + state["layers.2.bias"])


def test_identity_passes_through_and_checks_both_widths() -> None:
    x = torch.randn(2, 4, 8)
    assert torch.equal(Connector(ConnectorConfig("identity"), 8, 8)(x), x)
    shuffled = Connector(ConnectorConfig("identity", "pixel_shuffle", 2), 8, 32)(x)
    assert torch.equal(shuffled, pixel_shuffle(x, 2))
    with pytest.raises(InputError, match="the tower gives width 8, the LLM has 9"):
        Connector(ConnectorConfig("identity"), 8, 9)


@pytest.mark.parametrize("kind", ["mlp", "mlp0x_gelu", "mlp2x_relu", "mlp2x_gelu_", "resampler", ""])
def test_unknown_kinds_are_refused_by_name(kind: str) -> None:
    with pytest.raises(InputError, match=f"unknown connector '{kind}'; use one of {', '.join(KINDS)}$"):
        Connector(ConnectorConfig(kind), 4, 4)


def test_unknown_reductions_are_refused_by_name() -> None:
    with pytest.raises(InputError, match="unknown reduction 'max'; use one of none, average, pixel_shuffle"):
        Connector(ConnectorConfig("linear", "max", 2), 4, 4)


@given(
    kind=st.sampled_from(["linear", "mlp2x_gelu", "mlp3x_gelu"]),
    reduce=st.sampled_from(["none", "average", "pixel_shuffle"]),
    factor=st.integers(1, 5),
    side=st.integers(1, 4),
    pictures=st.integers(1, 3),
)
def test_tokens_are_as_many_as_the_config_counts(
    kind: str, reduce: str, factor: int, side: int, pictures: int
) -> None:
    factor = 1 if reduce == "none" else factor
    grid = side * factor
    config = ModelConfig(
        decoder=DecoderConfig(8, 6, 1, 1, 1, 6, 8),
        vision=VisionConfig(image_size=32 * grid, width=3),
        connector=ConnectorConfig(kind, reduce, factor),
    )
    tokens = Connector(config.connector, 3, 6)(torch.zeros(pictures, grid**2, 3))
    assert tokens.shape == (pictures, config.image_tokens, 6)


@given(grid=st.integers(1, 12), factor=st.integers(1, 13))
def test_a_factor_that_does_not_divide_the_grid_is_refused(grid: int, factor: int) -> None:
    def config() -> ModelConfig:
        return ModelConfig(
            decoder=DecoderConfig(8, 6, 1, 1, 1, 6, 8),
            vision=VisionConfig(image_size=32 * grid),
            connector=ConnectorConfig("linear", "average", factor),
        )

    if grid % factor:
        with pytest.raises(InputError, match=f"{grid} x {grid} features cannot be reduced by {factor}"):
            config()
    else:
        assert config().image_tokens == (grid // factor) ** 2


def numbered(layout: Layout, side: int) -> Tensor:
    """Tokens (squares, side * side, 1) that hold the number of their square and their place in it."""
    squares = torch.arange(layout.tiles).view(-1, 1, 1) * 100
    return (squares + torch.arange(side**2).view(1, -1, 1)).float()


def test_tiles_are_read_row_by_row_over_all_of_them() -> None:
    layout = Layout(4, columns=2, rows=1, height=2, width=4)
    arranged = arrange(numbered(layout, 2), layout, None).flatten().tolist()
    assert arranged == [0, 1, 2, 3, *[100, 101, 200, 201], *[102, 103, 202, 203]]


def test_padding_is_dropped_on_both_sides_and_rows_are_ended() -> None:
    layout = Layout(4, columns=1, rows=2, top=1, height=2, width=2, newline=True)
    arranged = arrange(numbered(layout, 2), layout, torch.tensor([-1.0])).flatten().tolist()
    assert arranged == [0, 1, 2, 3, *[102, 103, -1], *[200, 201, -1]]


@pytest.mark.parametrize(("top", "left", "height", "width"), [(2, 0, 0, 2), (0, 1, 4, 0)])
def test_nothing_but_newlines_may_be_left(top: int, left: int, height: int, width: int) -> None:
    layout = Layout(4, columns=1, rows=2, top=top, left=left, height=height, width=width, newline=True)
    arranged = arrange(numbered(layout, 2), layout, torch.tensor([-1.0])).flatten().tolist()
    assert arranged == [0, 1, 2, 3, *[-1] * height]


def test_a_large_map_is_shrunk() -> None:
    layout = Layout(4, columns=2, rows=2, height=2, width=2)
    tokens = torch.arange(5.0).view(5, 1, 1).expand(5, 4, 3)
    assert arrange(tokens, layout, None)[4:, 0].tolist() == [1, 2, 3, 4]


def test_a_factor_without_a_reduction_is_refused() -> None:
    """It would be ignored: 64 tokens, where 16 were meant."""
    with pytest.raises(
        InputError, match="factor 2 must say how it joins 2 x 2 features; set reduce to average"
    ):
        ConnectorConfig("mlp2x_gelu", factor=2)


def test_a_reduction_that_is_counted_wrongly_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by somebody who adds one: before anything runs, not as a ValueError in the first step."""
    first = Reduction(lambda features, factor: features[:, :factor], widens=False)
    monkeypatch.setitem(REDUCE, "first", first)
    with pytest.raises(
        InputError, match="unknown reduction 'first'; use one of none, average, pixel_shuffle"
    ):
        ConnectorConfig("linear", "first", 2)
    monkeypatch.setitem(REDUCTIONS, "first", lambda grid, factor: factor**2)
    config = ModelConfig(
        decoder=DecoderConfig(8, 6, 1, 1, 1, 6, 8),
        vision=VisionConfig(image_size=64, width=1280, variant="lite0"),
        connector=ConnectorConfig("linear", "first", 2),
    )
    with (
        torch.device("meta"),
        pytest.raises(
            InputError, match=r"gives 2 image tokens of a tile, config\.REDUCTIONS counts 4 for 'first'"
        ),
    ):
        Llava(config)
    monkeypatch.setitem(REDUCTIONS, "first", lambda grid, factor: factor)
    with torch.device("meta"):
        assert Llava(config).config.image_tokens == 2


class Halved(nn.Module):
    """Layers that leave half of the tokens. looks: at values, as no trial without values can."""

    def __init__(self, in_width: int, width: int, every: int, looks: bool) -> None:
        super().__init__()
        self.layer, self.every, self.looks = nn.Linear(in_width, width), every, looks

    def forward(self, x: Tensor) -> Tensor:
        if self.looks and x.abs().max().item() < 0:
            return x
        return self.layer(x[:, :: self.every])


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("looks", [False, True])
def test_a_kind_of_another_number_or_width_of_tokens_is_refused(
    looks: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be counted wrongly everywhere, and end training in its first step."""
    config = ModelConfig(
        decoder=DecoderConfig(8, 6, 1, 1, 1, 6, 8),
        vision=VisionConfig(image_size=64, width=1280, variant="lite0"),
        connector=ConnectorConfig("own"),
    )

    def build(every: int, width: int = 6, in_width: int = 1280) -> None:
        monkeypatch.setitem(KINDS, "own", lambda *_: Halved(in_width, width, every, looks))
        with torch.device(device):
            Llava(config)

    state = torch.random.get_rng_state()
    with torch.device("meta"):
        monkeypatch.setitem(KINDS, "own", lambda *_: Halved(1280, 6, 1, looks))
        Llava(config)
    assert torch.equal(torch.random.get_rng_state(), state), "the trial drew from the run's generator"
    build(every=1)
    with pytest.raises(
        InputError, match=r"kind 'own', whose .* tokens, gives 2 tokens of a tile, 4 are counted"
    ):
        build(every=2)
    with pytest.raises(InputError, match=r"kind 'own', .* gives tokens of width 7, the LLM has 6"):
        build(every=1, width=7)
    with pytest.raises(InputError, match=r"kind 'own', .* fails on an input of shape \(1, 4, 1280\) "):
        build(every=1, in_width=1279)
