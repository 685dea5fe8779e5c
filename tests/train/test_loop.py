"""The loop as a whole: it learns, follows its golden curve, and resumes bit for bit."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from outcomes import losses, weights
from PIL import Image

from pumice.conversation import Conversation, user_message
from pumice.engine.generate import naive_generate
from pumice.engine.requests import Prompt
from pumice.errors import InputError, WorkError
from pumice.files import hold
from pumice.formats.load import open_model
from pumice.train import loop, run
from pumice.train.loop import Trainer
from pumice.train.optim import schedule
from pumice.train.report import read_metrics

MakeRecipe = Callable[..., Path]
GOLDEN = Path(__file__).parent.parent / "golden" / "tiny_losses.json"


def same(first: Path, second: Path) -> bool:
    one, other = weights(first), weights(second)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_losses_follow_the_golden_curve(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    run(make_recipe())
    measured = losses(tmp_path / "run")
    golden = json.loads(GOLDEN.read_text())
    assert len(measured) == len(golden)
    # Measured worst case between one and two threads and two machines' kernels: 2e-6.
    assert measured == pytest.approx(golden, rel=1e-4)
    assert golden[-1] < 0.5 * golden[0]


def test_eight_samples_are_learned_to_exact_answers(
    make_recipe: MakeRecipe, rows: Path, tmp_path: Path
) -> None:
    folder = run(make_recipe(epochs=60, feature_cache=str(tmp_path / "cache")))
    opened = open_model(folder)
    for line in (rows / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        question, answer = (turn["value"] for turn in row["conversations"])
        conversation = Conversation((user_message(question, [rows / row["image"]]),))
        sample = opened.processor.prompt(conversation)
        pixels = torch.from_numpy(opened.processor.pixels(sample.images, sample.layouts))
        with torch.no_grad():
            tokens = opened.model.encode(pixels)
        written = naive_generate(opened.model, Prompt(torch.from_numpy(sample.input_ids), tokens))
        assert opened.processor.tokenizer.decode(written) == answer, row["id"]


# A run that gets a signal after one of its steps.
SIGNALLED = """
import os, sys, torch
from pumice.train import run
from pumice.train.report import TrainingReport
torch.set_num_threads(1)
report_step = TrainingReport.step
def step(self, number, *values):
    report_step(self, number, *values)
    if number == int(sys.argv[2]):
        os.kill(os.getpid(), int(sys.argv[3]))
TrainingReport.step = step
run(sys.argv[1])
"""


def test_an_interrupted_run_equals_an_uninterrupted_one_bit_for_bit(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    lora = {"rank": 4, "dropout": 0.2}  # dropout: the generator's state matters too
    stage = {"learn": {"connector": 3e-3, "lora": 3e-3}, "lora": lora}
    full_run = run(make_recipe("whole", stage=stage, workers=2))
    recipe = make_recipe("broken", stage=stage, workers=2)
    metrics = tmp_path / "broken" / "metrics.jsonl"
    for kind, after in ((signal.SIGKILL, 4), (signal.SIGINT, 8)):
        if kind == signal.SIGINT:  # nothing but the signal makes it save
            recipe = make_recipe("broken", stage=stage, workers=2, save_every=1000)
        command = [sys.executable, "-c", SIGNALLED, str(recipe), str(after), str(int(kind))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        stopped = subprocess.run(command, stderr=subprocess.DEVNULL, env=environment, check=False)
        assert stopped.returncode != 0
        assert sum("loss" in event for event in read_metrics(metrics)) == after
    saved = sorted((tmp_path / "broken" / "checkpoints").iterdir())[-1].name
    assert saved == f"step-{read_metrics(metrics)[-1]['step']:06d}"
    again = run(recipe)
    assert same(full_run, again)
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")


def test_square_brackets_are_text(make_recipe: MakeRecipe, rows: Path, tmp_path: Path) -> None:
    row = json.loads((rows / "rows.jsonl").read_text().splitlines()[0])
    row["conversations"][0]["value"] = "<image>\nWhat is in [this] picture? [/INST]"
    (tmp_path / "held.jsonl").write_text(json.dumps(row) + "\n")
    held_out = [{"rows": str(tmp_path / "held.jsonl")}]
    run(make_recipe("brackets", held_out=held_out, max_steps=1), ["name='[v2] of [/mine]'"])
    assert "[/INST]" in (tmp_path / "brackets" / "metrics.jsonl").read_text()


def test_a_finished_run_is_left_alone(
    make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pumice.train.devices.fewer_threads", lambda threads: threads)
    recipe = make_recipe(max_steps=2)
    written = (run(recipe) / "model.safetensors").stat()
    assert f"OMP_NUM_THREADS={torch.get_num_threads()} training may be" in capsys.readouterr().err
    again = (run(recipe) / "model.safetensors").stat()
    assert (again.st_mtime_ns, again.st_ino) == (written.st_mtime_ns, written.st_ino)
    assert capsys.readouterr().err == "already finished: step 2 of 2\n"


def test_an_empty_model_folder_is_not_a_finished_run(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(max_steps=2)
    model = run(recipe)
    weights = (model / "model.safetensors").read_bytes()
    shutil.rmtree(model)
    model.mkdir()
    assert (run(recipe) / "model.safetensors").read_bytes() == weights


def test_nowhere_to_write(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"output folder .*file.run cannot be made: .*; name another"):
        run(make_recipe(output=str(tmp_path / "file" / "run")))


def test_a_tracker_that_is_not_installed_is_told_before_anything_is_written(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="wandb needs its package; pip install wandb, or leave it out"):
        run(make_recipe(trackers=["wandb"]))
    assert not (tmp_path / "run").exists()


def test_a_stage_changes_only_what_it_names(make_recipe: MakeRecipe, tiny_model: Path) -> None:
    before = weights(tiny_model)
    after = weights(run(make_recipe(stage={"learn": {"connector": 1e-3}}, max_steps=2)))
    changed = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"connector"}


def test_a_second_stage_goes_on_from_the_first(make_recipe: MakeRecipe) -> None:
    first = run(make_recipe("first", max_steps=2, stage={"template": "plain", "learn": {"connector": 1e-3}}))
    stage = {"learn": {"connector": 1e-3, "lora": 1e-3}, "lora": {"rank": 2}}
    second = run(make_recipe("second", model=str(first), stage=stage, max_steps=2))
    opened = open_model(second)
    assert opened.model.config.template == "chatml"  # the stage's own template is not the model's
    assert [stage["recipe"]["name"] for stage in opened.provenance["stages"]] == ["first", "second"]


def test_accumulated_packs_equal_one_large_pack(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    run(make_recipe("small", pack_tokens=64, batch=4, epochs=2))
    run(make_recipe("large", pack_tokens=512, batch=4, epochs=2))
    assert losses(tmp_path / "small") == pytest.approx(losses(tmp_path / "large"), rel=1e-4)


def test_cached_features_and_mirrored_pictures(make_recipe: MakeRecipe, rows: Path, tmp_path: Path) -> None:
    data = [{"rows": str(rows / "rows.jsonl"), "mirror": True}]
    options = {"data": data, "stage": {"learn": {"connector": 1e-3}}, "mirror_chance": 1.0, "epochs": 2}
    plain = run(make_recipe("plain", **(options | {"mirror_chance": 0.0})))
    mirrored = run(make_recipe("mirrored", **options))
    cached = run(make_recipe("cached", **options, feature_cache=str(tmp_path / "cache")))
    assert not same(plain, mirrored)
    # bfloat16 features: 8 bits of mantissa
    assert losses(tmp_path / "mirrored") == pytest.approx(losses(tmp_path / "cached"), rel=1e-2)
    again = run(make_recipe("again", **options, feature_cache=str(tmp_path / "cache")))
    assert same(cached, again)


def run_to_first_checkpoint(path: Path) -> None:
    save = Trainer._save

    def save_and_stop(trainer: Trainer, folder: Path) -> None:
        save(trainer, folder)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_save", save_and_stop)
        run(path)


@pytest.mark.parametrize("stopped", [False, True])
def test_a_picture_that_changed_gets_its_own_features(
    make_recipe: MakeRecipe, rows: Path, tmp_path: Path, stopped: bool
) -> None:
    """Between two runs with one cache, and between a run's stop and its resumption."""
    folder, cache = tmp_path / "rows", tmp_path / "cache"
    shutil.copytree(rows, folder)
    options = {
        "data": [{"rows": str(folder / "rows.jsonl")}], "pictures": [str(folder)], "epochs": 2,
        "stage": {"learn": {"connector": 1e-3}},
    }  # fmt: skip
    names = ("without", "cached") if stopped else ("first",)
    for name in names:
        with_cache = {} if name == "without" else {"feature_cache": str(cache)}
        make_recipe(name, **options, **with_cache)
        if stopped:
            run_to_first_checkpoint(tmp_path / f"{name}.yaml")
        else:
            run(tmp_path / f"{name}.yaml")
    for path in folder.glob("*.png"):  # the same colours, in other places
        with Image.open(path) as picture:
            picture.transpose(Image.Transpose.ROTATE_90).save(path)
    if not stopped:
        make_recipe("without", **options)
        make_recipe("cached", **options, feature_cache=str(cache))
    for name in ("without", "cached"):
        run(tmp_path / f"{name}.yaml")
    # bfloat16 features: 8 bits of mantissa
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "without"), rel=1e-2)


def test_a_changed_recipe_does_not_go_on_from_old_checkpoints(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """The folder stays as the first run left it."""

    def held() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}

    run(make_recipe(max_steps=3))
    before = held()
    with pytest.raises(InputError, match=r"stage.*another output folder"):
        run(make_recipe(max_steps=3, stage={"learn": {"connector": 1e-2}}))
    assert held() == before


def test_a_device_that_is_not_here_is_named(make_recipe: MakeRecipe) -> None:
    with pytest.raises(InputError, match="device 'abacus' is not available here"):
        run(make_recipe(device="abacus"))


def test_spoiled_rows_are_counted_and_refused_beyond_the_budget(
    make_recipe: MakeRecipe, rows: Path, tmp_path: Path
) -> None:
    bad_rows = tmp_path / "spoiled.jsonl"
    good = (rows / "rows.jsonl").read_text()
    bad = {
        "id": "gone",
        "image": "gone.png",
        "conversations": json.loads(good.splitlines()[0])["conversations"],
    }
    bad_rows.write_text(good + json.dumps(bad) + "\n")
    data = [{"rows": str(bad_rows)}]
    with pytest.raises(InputError, match=r"1 bad row, max_bad_rows allows 0.*gone\.png"):
        run(make_recipe("strict", data=data, max_steps=4))
    folder = run(make_recipe("lenient", data=data, max_bad_rows=1, epochs=1))
    assert open_model(folder).provenance["stages"][-1]["skipped_rows"] == 1


def test_a_stage_without_adapters_cannot_train_them(make_recipe: MakeRecipe) -> None:
    with pytest.raises(InputError, match=r"lora.*no adapters"):
        run(make_recipe(stage={"learn": {"lora": 1e-3}}))


def test_a_run_tells_how_it_goes(make_recipe: MakeRecipe, rows: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = {"id": "t", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "red"}]}
    (tmp_path / "text.jsonl").write_text(json.dumps(text) + "\n")
    data = [{"rows": str(rows / "rows.jsonl")}, {"rows": str(tmp_path / "text.jsonl")}]
    run(make_recipe(data=data, held_out=data, epochs=4, precision="bf16", measure_every=4, sample_answers=3))
    events = read_metrics(tmp_path / "run" / "metrics.jsonl")
    held_out = [event["held_out_loss"] for event in events if "held_out_loss" in event]
    assert len(held_out) >= 3
    assert held_out[-1] < 0.8 * held_out[0]
    questions = [(event["question"], event["reference"]) for event in events if "answer" in event]
    assert questions[:3] == [("left?", "red"), ("hi", "red"), ("right?", "green")]
    assert (tmp_path / "run" / "loss.png").stat().st_size > 5000


def test_the_loss_picture_can_be_drawn_later(
    make_recipe: MakeRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without matplotlib a run says so before its first step; the same command draws when it is there."""
    pytest.importorskip("matplotlib")
    recipe, picture = make_recipe(epochs=1), tmp_path / "run" / "loss.png"
    with monkeypatch.context() as missing:
        missing.setattr("pumice.train.report.find_spec", lambda name: None)
        missing.setitem(sys.modules, "matplotlib", None)
        missing.setitem(sys.modules, "matplotlib.figure", None)
        run(recipe)
        said = " ".join(capsys.readouterr().err.split())
    assert (
        0 <= said.index("no loss.png at the end, as it needs matplotlib (pip install ") < said.index("0 of ")
    )
    assert not picture.exists()
    run(recipe)
    assert "already finished" in capsys.readouterr().err
    assert picture.stat().st_size > 5000
    drawn = picture.read_bytes()
    run(recipe)
    assert picture.read_bytes() == drawn


def test_held_out_rows_are_measured_also_in_short_runs(
    make_recipe: MakeRecipe, rows: Path, tmp_path: Path
) -> None:
    data = [{"rows": str(rows / "rows.jsonl")}]
    run(make_recipe(data=data, held_out=data, max_steps=4, measure_every=None))
    events = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [event["step"] for event in events if "held_out_loss" in event] == [0, 1, 2, 3, 4]


def test_numbers_that_the_rows_do_not_reach_are_told(
    make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    run(make_recipe("usual", max_steps=1))
    assert "pack_tokens" not in (usual := capsys.readouterr().err) and "batch" not in usual
    run(make_recipe("odd", batch=100_000, pack_tokens=10, max_steps=1))
    shown = capsys.readouterr().err
    assert "odd: 1 step of 4 pictures" in shown
    assert "  batch: 100000 is more than the 4 pictures of an epoch, which is one step\n" in shown
    assert re.search(
        r"  pack_tokens: 10 is too few for any row that was tried \(\d\d or more\): each is", shown
    )


def test_packs_without_pictures_teach_a_connector_nothing(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    text = {"id": "t", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "red"}]}
    (tmp_path / "text.jsonl").write_text(json.dumps(text) + "\n")
    data = [{"rows": str(tmp_path / "text.jsonl")}]
    run(make_recipe(data=data, stage={"learn": {"connector": 1e-3}}, epochs=2))
    assert len(losses(tmp_path / "run")) == 2


def test_a_diverging_run_stops_before_its_weights_are_spoiled(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    with pytest.raises(WorkError, match=r"step \d+: the loss is .* lower learning rate"):
        run(make_recipe(stage={"learn": {"decoder": 1e30}}, clip=1e30, save_every=1))


def test_a_signal_before_the_first_step_leaves_nothing(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "preflight", lambda *_: signal.raise_signal(signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("the process would be killed"))
    try:
        with pytest.raises(KeyboardInterrupt):
            run(make_recipe(output=str(tmp_path / "runs" / "first")))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not (tmp_path / "runs").exists()


def test_a_refused_run_leaves_no_empty_cache(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise InputError("the disk is full")

    path = make_recipe(feature_cache=str(tmp_path / "cache"))
    with monkeypatch.context() as patch, pytest.raises(InputError, match="the disk is full"):
        patch.setattr(loop, "preflight", refuse)
        run(path)
    assert not (tmp_path / "cache").exists()
    run(path)
    assert (tmp_path / "cache" / "keys.txt").stat().st_size


def test_two_runs_do_not_share_an_output_folder(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    lock = hold(tmp_path / "run" / ".lock", "here")
    with lock, pytest.raises(InputError, match="another run is using"):
        run(make_recipe())


def test_rows_that_changed_do_not_go_on_from_old_checkpoints(
    make_recipe: MakeRecipe, rows: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text((rows / "rows.jsonl").read_text())
    data = [{"rows": str(mine)}]
    run(make_recipe(data=data, max_steps=3))
    mine.write_text((rows / "rows.jsonl").read_text().replace("red", "tan"))
    with pytest.raises(
        InputError, match=r"^the contents of \S*mine\.jsonl have changed since .*; bring the old"
    ):
        run(make_recipe(data=data, max_steps=3))


def test_schedule_rises_and_falls() -> None:
    rates = [schedule(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1.0
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert 0 < rates[-1] < 0.001
