"""What a researcher changes is computed or refused: new connectors, added fields, parts without gradients."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from outcomes import losses, weights
from torch import Tensor

from pumice.config import (
    REDUCTIONS,
    ConnectorConfig,
    DecoderConfig,
    ImagePolicy,
    ModelConfig,
    VisionConfig,
)
from pumice.errors import InputError, counted
from pumice.files import sha256
from pumice.formats.export import export
from pumice.formats.pumice.folder import save
from pumice.formats.read import read_model
from pumice.media import TileMarks, VideoPolicy
from pumice.model.connector import KINDS, REDUCE, Connector, Reduction
from pumice.model.llava import Llava
from pumice.model.packed import Run
from pumice.processor import check_used
from pumice.train import run
from pumice.train.loop import PreparedStep, Trainer
from pumice.train.loss import supervised_loss
from pumice.train.objective import PackTensors
from pumice.train.recipe import load_recipe
from pumice.train.setup import prepare
from pumice.train.shapes import processor_of, shape
from pumice.train.sizes import sizes
from pumice.train.speed import flops_per_tile, flops_per_token

MakeRecipe = Callable[..., Path]
CONNECTOR = {"learn": {"connector": 3e-3}}


def test_an_existing_model_gets_a_new_connector(
    make_recipe: MakeRecipe, tiny_model: Path, tmp_path: Path
) -> None:
    """Drawn anew, in the place of the old one: one image token instead of four."""
    new = {"base": str(tiny_model), "connector": {"kind": "linear", "reduce": "average", "factor": 2}}
    recipe = make_recipe(model=new, stage=CONNECTOR)
    config, _ = shape(load_recipe(recipe), recipe)
    assert (config.connector, config.image_tokens) == (ConnectorConfig("linear", "average", 2), 1)
    model = run(recipe)
    loaded = read_model(model)
    assert loaded.config.connector == config.connector
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    old = read_model(tiny_model).state
    names = {name for name in old if not name.startswith("connector.")}
    assert all(torch.equal(loaded.state[name].read(), old[name].read()) for name in names)
    # The same seed draws the same connector; another stage continues it without naming it again.
    assert weights(run(make_recipe("again", model=new, stage=CONNECTOR))).keys() == weights(model).keys()
    assert losses(tmp_path / "again") == losses(tmp_path / "run")
    run(make_recipe("second", model=str(model), max_steps=1))


def test_a_wrong_count_of_image_tokens_is_refused_by_plan_check_and_train(
    make_recipe: MakeRecipe, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Reduction(lambda features, factor: features[:, :factor], widens=False)
    monkeypatch.setitem(REDUCE, "first", first)
    monkeypatch.setitem(REDUCTIONS, "first", lambda grid, factor: factor**2)
    new = {"base": str(tiny_model), "connector": {"kind": "linear", "reduce": "first", "factor": 2}}
    path = make_recipe(model=new, stage=CONNECTOR)
    recipe = load_recipe(path)
    uses: tuple[Callable[[], object], ...] = (
        lambda: processor_of(recipe),  # what `data check` and `data show` count with
        lambda: sizes(recipe, shape(recipe, path)[0], "cpu"),  # what `plan` adds up
        lambda: run(path),
    )
    for use in uses:
        with pytest.raises(InputError, match=r"2 image tokens of a tile, config\.REDUCTIONS counts 4"):
            use()


def test_a_kind_that_halves_tokens_is_refused_by_plan_check_and_train(
    make_recipe: MakeRecipe, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the recipe makes the connector, or starts from a model whose kind was changed since."""
    own = torch.nn.Linear
    monkeypatch.setitem(KINDS, "own", lambda *widths: torch.nn.Sequential(own(*widths)))
    new = {"base": str(tiny_model), "connector": {"kind": "own"}}
    trained = run(make_recipe("trained", model=new, stage=CONNECTOR, max_steps=1))

    class Half(own):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[:, ::2])

    monkeypatch.setitem(KINDS, "own", lambda *widths: torch.nn.Sequential(Half(*widths)))
    for number, model in enumerate((new, str(trained))):
        path = make_recipe(f"half {number}", model=model, stage=CONNECTOR)
        recipe = load_recipe(path)
        uses: tuple[Callable[[], object], ...] = (
            lambda recipe=recipe: processor_of(recipe),
            lambda recipe=recipe, path=path: sizes(recipe, shape(recipe, path)[0], "cpu"),
            lambda path=path: run(path),
        )
        for use in uses:
            with pytest.raises(
                InputError, match=r"kind 'own', whose .* tokens, gives 2 tokens of a tile, 4 are counted"
            ):
                use()


def test_tokens_that_make_no_square_are_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Reduction(lambda features, factor: features.unflatten(1, (3, 3)).mean(2), widens=False)
    monkeypatch.setitem(REDUCE, "rows", rows)
    monkeypatch.setitem(REDUCTIONS, "rows", lambda grid, factor: grid)
    vision = VisionConfig(
        kind="siglip", image_size=42, width=8, stride=14, depth=1, heads=2, mlp_width=8, layer=-1,
        select="full", activation="gelu_tanh",
    )  # fmt: skip
    decoder = DecoderConfig(16, 8, 1, 2, 1, 4, 8)
    config = ModelConfig(decoder, vision, ConnectorConfig("linear", "rows", 3))
    assert Llava(config).config.image_tokens == 3
    tiles = ImagePolicy(mode="anyres", pinpoints=((84, 42),))
    for change in ({"image": tiles}, {"video": VideoPolicy(pool=2)}):
        with pytest.raises(InputError, match="joined as squares of tokens, but 'rows' gives 3 of a tile"):
            Llava(dataclasses.replace(config, **change))


def test_a_stage_leaves_out_what_its_mode_does_not_use(make_recipe: MakeRecipe, tiny_model: Path) -> None:
    """A model with tiles may be aligned without; what the stage itself sets must be used."""
    model = read_model(tiny_model).config
    policy = ImagePolicy("anyres", pinpoints=((128, 64),), max_tiles=4, resample="lanczos")
    tiles = dataclasses.replace(model, image=policy)
    squared, resampled = (
        load_recipe(make_recipe(stage=CONNECTOR | {"image": image}))
        for image in ({"mode": "pad"}, {"resample": "lanczos"})
    )
    assert squared.stage_config(tiles).image == ImagePolicy("pad", resample="lanczos")
    # The same of the texts around tiles, and of frames.
    split = ImagePolicy("split", longest_edge=128)
    marked = dataclasses.replace(model, image=split, marks=TileMarks("<{row}>", "|", "-", "<", ">", "#"))
    assert squared.stage_config(marked).marks == TileMarks(whole="<", end=">", number="#")
    filmed = dataclasses.replace(tiles, video=VideoPolicy(8, 1.0, pool=2))
    assert squared.stage_config(filmed).video == VideoPolicy(8, 1.0)
    for config in (tiles, marked, filmed):
        check_used(squared.stage_config(config))
        staged = resampled.stage_config(config)
        assert (staged.marks, staged.video) == (config.marks, config.video)
    path = make_recipe(stage=CONNECTOR | {"image": {"mode": "pad", "pinpoints": [[128, 64]]}})
    recipe = load_recipe(path)
    for use in (lambda: shape(recipe, path), lambda: processor_of(recipe), lambda: run(path)):
        with pytest.raises(InputError, match="the image mode 'pad' does not implement pinpoints = "):
            use()


def test_a_wrong_key_of_a_new_connector_is_named(make_recipe: MakeRecipe, tiny_model: Path) -> None:
    for model, message in (
        ({"base": str(tiny_model), "conector": {"kind": "linear"}}, r"unknown key 'model\.conector'"),
        ({"base": str(tiny_model)}, r"model\.\w+ is missing"),
    ):
        with pytest.raises(InputError, match=message):
            load_recipe(make_recipe(model=model))
    fresh = {"base": str(tiny_model), "connector": {"kind": "linear"}}
    with pytest.raises(InputError, match="the new connector's weights are random; add connector to stage"):
        load_recipe(make_recipe(model=fresh, stage={"learn": {"lora": 1e-3}, "lora": {"rank": 2}}))
    with pytest.raises(
        InputError, match="unknown connector 'mlp2'; use one of identity, linear, mlp1x_gelu, "
    ):
        run(make_recipe(model={"base": str(tiny_model), "connector": {"kind": "mlp2"}}, stage=CONNECTOR))


def test_a_field_that_was_added_since_does_not_stop_a_run(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """A checkpoint of an older version lacks it, which means its default."""
    whole = run(make_recipe("whole", max_steps=6))
    recipe = make_recipe(max_steps=6)
    run(recipe)
    # As an older version left it after three steps: no `loss_average`, and rows without `mirror`.
    folder = tmp_path / "run" / "checkpoints"
    (folder / "step-000006").rename(tmp_path / "later")
    state = folder / "step-000003" / "state.json"
    values = json.loads(state.read_text())
    del values["recipe"]["loss_average"], values["recipe"]["data"][0]["mirror"]
    state.write_text(json.dumps(values))
    manifest = folder / "step-000003" / "manifest.json"
    entries = json.loads(manifest.read_text())
    entries["state.json"] = {"size": state.stat().st_size, "sha256": sha256(state)}
    manifest.write_text(json.dumps(entries))
    for key, value, stored in (("loss_average", "micro_batch", "tokens"), ("data", None, "mirror.: False")):
        changes = {key: value} if value else {"data": [{**values["recipe"]["data"][0], "mirror": True}]}
        with pytest.raises(InputError, match=f"made with {key}.*{stored}"):
            run(make_recipe(max_steps=6, **changes))
    again = weights(run(make_recipe(max_steps=6)))
    assert all(torch.equal(again[name], tensor) for name, tensor in weights(whole).items())


def test_another_number_of_threads_is_told(
    make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(make_recipe(max_steps=6))
    folder = tmp_path / "run" / "checkpoints"
    (folder / "step-000006").rename(tmp_path / "later")
    capsys.readouterr()
    run(make_recipe(max_steps=6))
    assert "threads" not in capsys.readouterr().err
    (folder / "step-000006").rename(tmp_path / "later still")
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        run(make_recipe(max_steps=6))
    finally:
        torch.set_num_threads(before)
    told = capsys.readouterr().err
    assert f"This run had {counted(before, 'thread')} and has {before + 1} now" in told
    assert f"OMP_NUM_THREADS={before} continues it bit for bit" in told
    run(make_recipe(max_steps=6))  # nothing is left to compute
    told = capsys.readouterr().err
    assert "already finished: step 6 of 6" in told and "threads" not in told


def test_a_part_that_no_gradient_reaches_ends_the_run(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a layer that the forward pass leaves out: it would be saved as it was drawn."""
    forward = Connector.forward

    def detached(self: Connector, features: Tensor) -> Tensor:
        return forward(self, features).detach()

    monkeypatch.setattr(Connector, "forward", detached)
    message = (
        r"connector learns, but in 3 steps no gradient reached connector\.layers\.0\.bias: the loss does"
    )
    with pytest.raises(InputError, match=message):
        run(make_recipe())


def test_a_reducing_connector_multiplies_what_is_left() -> None:
    """Four features become one: a linear layer of 4 x 8 inputs on one token, and not on four."""
    vision = VisionConfig(
        kind="siglip", image_size=28, width=8, stride=14, depth=0, heads=2, mlp_width=8, layer=0,
        select="full", activation="gelu_tanh",
    )  # fmt: skip
    config = ModelConfig(
        DecoderConfig(16, 8, 1, 2, 1, 4, 8), vision, ConnectorConfig("linear", "pixel_shuffle", 2)
    )
    model = Llava(config).requires_grad_(False)
    tower = sum(p.numel() for p in model.tower.parameters() if p.dim() == 2 and p.shape[0] != 4)
    assert flops_per_tile(model) == 4 * tower * 2 + 1 * (4 * 8 * 8) * 6


def test_the_connector_is_counted_beside_a_tower_that_is_no_vit() -> None:
    vision = VisionConfig(image_size=64, variant="lite0")
    config = ModelConfig(DecoderConfig(16, 8, 1, 2, 1, 4, 8), vision, ConnectorConfig("linear"))
    model = Llava(config)
    connector = sum(p.numel() for p in model.connector.parameters() if p.dim() == 2)
    assert flops_per_tile(model) == model.config.image_tokens * connector * 6


SIGLIP = VisionConfig(
    kind="siglip", image_size=56, width=16, stride=14, depth=2, heads=2, mlp_width=24, layer=-1,
    select="full", activation="gelu_tanh",
)  # fmt: skip
GEMMA = DecoderConfig(
    258, 48, 2, 4, 2, 12, 96, context=256, tied_head=True, sliding_window=40, window_pattern=2,
    activation="gelu_tanh", post_norms=True, norm_offset=1.0, embed_scale=48**0.5, attention_scale=16**-0.5,
    attention_softcap=20.0, logit_softcap=10.0,
)  # fmt: skip


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_loss_of_capped_logits_has_the_gradients_of_autograd(softcap: float | None) -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(300, 8, requires_grad=True), torch.randn(32, 8, requires_grad=True)
    targets, counts = torch.randint(32, (300,)), torch.rand(300)
    supervised_loss(hidden, head, targets, counts, softcap).backward()
    actual = [hidden.grad, head.grad]
    logits = hidden @ head.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    expected = torch.autograd.grad((losses * counts).sum(), (hidden, head))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)  # measured worst: 4e-6


def test_a_gemma_2_learns_with_adapters_and_is_exported(
    make_recipe: MakeRecipe, tiny_model: Path, tmp_path: Path
) -> None:
    """Training's loss falls, the merged model is written for transformers and read back equal."""
    loaded = read_model(tiny_model)
    config = dataclasses.replace(loaded.config, decoder=GEMMA, vision=SIGLIP)
    torch.manual_seed(0)
    model = Llava(config)
    with torch.no_grad():
        model.decoder.embed.weight.mul_(0.02)
    save(tmp_path / "gemma", config, model.state_dict(), tokenizer=loaded.tokenizer.to_str())
    trained = run(make_recipe(model=str(tmp_path / "gemma")))
    curve = losses(tmp_path / "run")
    assert sum(curve[-4:]) < 0.8 * sum(curve[:4])
    stage = {"learn": {"connector": 3e-3, "lora": 1e-2}, "lora": {"rank": 4}}
    trained = run(make_recipe("adapters", model=str(trained), stage=stage, epochs=2))
    result = export(read_model(trained), "hf", tmp_path / "hf")
    assert any("leaves out the cap of the logits" in note for note in result.notes)
    again = read_model(tmp_path / "hf")
    assert dataclasses.replace(again.config.decoder, vocab_size=258) == GEMMA


def test_some_blocks_of_a_part_learn(make_recipe: MakeRecipe, tiny_model: Path, tmp_path: Path) -> None:
    """One function names the part of a parameter, from its name and its depth; all others follow it."""
    stage = {"learn": {"decoder.1-1": 1e-3}}
    path = make_recipe(stage=stage, max_steps=2)
    trained, before = read_model(run(path)).state, read_model(tiny_model).state
    moved = {name for name in before if not torch.equal(trained[name].read(), before[name].read())}
    assert moved and all(name.startswith("decoder.blocks.1.") for name in moved)
    recipe = load_recipe(path)
    assert sizes(recipe, shape(recipe, path)[0], "cpu").learning == sum(
        before[name].read().numel() for name in before if name.startswith("decoder.blocks.1.")
    )
    # Backward ends at the first block that learns: the one below it runs forward alone.
    setup = prepare(recipe)
    blocks = setup.model.decoder.blocks
    matrices = [sum(p.numel() for p in block.parameters() if p.dim() == 2) for block in blocks]
    named = [(n, p.numel()) for n, p in blocks[1].named_parameters() if p.dim() == 2]
    end = sum(numel for n, numel in named if n.startswith(("attention.o.", "mlp.")))
    assert flops_per_token(setup.model, setup.part_of) == 2 * matrices[0] + 6 * (matrices[1] - end)
    with pytest.raises(InputError, match=r"names decoder\.1-2, but the decoder has 2 blocks, counted from 0"):
        run(make_recipe("beyond", stage={"learn": {"decoder.1-2": 1e-3}}))
    # A resumed run has the same blocks.
    with pytest.raises(InputError, match=r"made with stage\.learn\.decoder"):
        run(make_recipe(stage={"learn": {"decoder.0-1": 1e-3}}, max_steps=2))


@pytest.mark.parametrize("part", ["tower", "tower.0-1"])
def test_a_step_of_many_processes_without_pictures_leaves_the_tower(
    part: str, make_recipe: MakeRecipe, tiny_model: Path, tmp_path: Path
) -> None:
    """There every part has a zero gradient, with which AdamW would go on by its momentum."""
    loaded = read_model(tiny_model)
    config = dataclasses.replace(loaded.config, vision=SIGLIP)
    state = Llava(config).state_dict()
    save(tmp_path / "model", config, state, tokenizer=loaded.tokenizer.to_str())
    stage = {"learn": {part: 1e-3, "decoder": 1e-3}}
    recipe = load_recipe(make_recipe(model=str(tmp_path / "model"), stage=stage))
    trainer = Trainer(recipe, prepare(recipe))
    trainer.objective.use_all_parts = True  # as many processes need it
    ids = torch.arange(8)
    text = PackTensors(ids, ids, [Run(8)], ids[:-1], ids[1:], torch.ones(7), (), ())
    trainer._train_step(trainer._prepare_step(0))
    before = {name: weight.detach().clone() for name, weight in trainer.trainable.items()}
    trainer._train_step(PreparedStep([text], 1, 8, 0.0))
    moved = {name.partition(".")[0] for name, old in before.items() if not old.equal(trainer.trainable[name])}
    assert moved == {"decoder"}
