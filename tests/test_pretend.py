"""Training and answering on CUDA, tried on a pretend device that is compiled here (tests/pretend)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

HERE = Path(__file__).parent / "pretend"
ROOT = HERE.parents[1]
pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="the pretend device needs g++"),
    pytest.mark.skipif(sys.platform != "linux", reason="the pretend device is built for Linux"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has a CUDA of its own"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled pretend device."""
    path = tmp_path_factory.mktemp("library") / "libpretend.so"
    torch_folder = Path(torch.__file__).parent
    includes = [torch_folder / "include", torch_folder / "include/torch/csrc/api/include"]
    libraries = torch_folder / "lib"
    command = ["g++", "-std=c++20", "-shared", "-fPIC", "-O0", *(f"-I{folder}" for folder in includes)]
    command += [str(HERE / "cuda.cpp"), f"-L{libraries}", "-lc10", "-ltorch_cpu"]
    command += [f"-Wl,-rpath,{libraries}", "-o", str(path)]
    subprocess.run(command, check=True)
    return path


Result = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def result(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """What a case of tests/pretend/cases.py measured; all run in one process, which must not be this one."""
    folder = tmp_path_factory.mktemp("cases")
    command = [sys.executable, str(HERE / "run.py"), str(library), str(HERE / "cases.py"), str(folder)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)

    def read(name: str) -> dict[str, Any]:
        if (error := folder / f"{name}.error").exists():
            raise AssertionError(error.read_text())
        found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
        return found

    return read


@pytest.mark.parametrize("stage", ["full", "connector", "embeddings", "tower", "lora", "int8"])
def test_a_stage_has_the_losses_and_the_sample_answers_of_the_cpu(result: Result, stage: str) -> None:
    events = result(f"stage-{stage}")
    assert len(events["cpu"]) == len(events["cuda"]) >= 6  # 2 steps, 2 measurements, 2 answers
    for cpu, cuda in zip(events["cpu"], events["cuda"], strict=True):
        for name in ("loss", "held_out_loss"):
            if name in cpu:
                assert cuda[name] == pytest.approx(cpu[name], abs=1e-6)  # measured worst case: 9.5e-7
        assert cpu.get("answer") == cuda.get("answer")


def test_a_resumed_run_with_dropout_is_equal(result: Result) -> None:
    """In tf32, where the speed of the device is timed before the first step."""
    assert result("resume")["equal"]


def test_a_resumed_run_frees_its_checkpoint(result: Result) -> None:
    assert result("resume")["alive"] == [0] * 6  # four steps, then two of the resumed run


def test_precision_is_that_of_the_recipe_during_the_run(result: Result) -> None:
    found = result("precision")
    assert found["fp32"] == [False, "highest", False]
    assert found["tf32"] == [True, "high", True]
    assert found["after"][1:] == ["highest", False]


@pytest.mark.parametrize("kind", ["plain none", "qk_norm none", "window none", "plain full"])
def test_packs_attend_in_one_call_a_layer(result: Result, kind: str) -> None:
    """Samples that share a picture, norms of q and k, and a window included."""
    found = result("attention")[kind]
    assert found["branches"]
    # The model has 2 layers; `full` runs them twice.
    assert found["calls"] == (4 if kind == "plain full" else 2)
    for name in ("", " gradient"):
        assert found[f"cuda{name}"] == pytest.approx(found[f"cpu{name}"], rel=5e-3)  # bf16; measured: 2.2e-3


def test_selective_checkpointing_keeps_what_attention_gave(result: Result) -> None:
    assert result("attention")["plain selective"]["calls"] == result("attention")["plain none"]["calls"] == 2


def test_the_host_never_waits_in_a_tower(result: Result) -> None:
    """Whose patches share position embeddings, as Idefics3's do."""
    assert result("waits")["tower"] == []


@pytest.mark.parametrize("stage", ["full", "lora"])
def test_the_host_never_waits_in_a_block_and_at_most_twice_in_a_pack(result: Result, stage: str) -> None:
    found = result("waits")
    shallow, deep = (sum(count for *_, count in found[f"{stage} {depth}"]) for depth in (2, 4))
    assert shallow == deep <= 2, found


def test_every_small_architecture_answers_and_explains_alike(result: Result) -> None:
    for name, devices in result("answers").items():
        cpu, cuda = devices["cpu"], devices["cuda"]
        assert cpu["answers"] == cuda["answers"], name
        assert cpu["sampled"] == cuda["sampled"], name
        for values in ("logits", "weights"):  # measured worst case: 2.8e-5
            np.testing.assert_allclose(cpu[values], cuda[values], atol=1e-4, err_msg=name)


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_a_model_is_quantised_before_it_moves(result: Result, bits: str) -> None:
    """Whole, it might not fit the device."""
    cpu, cuda = result("quantised")[f"{bits} cpu"], result("quantised")[f"{bits} cuda"]
    np.testing.assert_allclose(cpu["logits"], cuda["logits"], atol=1e-5)
    assert cuda["devices"] == ["cuda:0"]
    assert cuda["moved"] < 1.1 * cuda["bytes"]
    assert result("quantised")["dtypes"] == ["torch.bfloat16"] * 2
    assert result("quantised")["tied"]


@pytest.mark.parametrize("model", ["plain", "window"])
def test_one_call_of_attention_decodes_what_many_calls_do(result: Result, model: str) -> None:
    apart, together = (result("decode")[f"{model} {kind}"] for kind in ("calls", "one call"))
    assert apart["calls"] == 0
    assert together["calls"] == 2  # one for each layer
    assert together["texts"] == apart["texts"]


@pytest.mark.parametrize("model", ["plain", "window"])
def test_graphs_decode_in_buffers_that_every_step_fills(result: Result, model: str) -> None:
    """Five steps bring prompts. Then 8, 7 and 6 requests share a graph, and two go on in another."""
    found = result("decode")[f"{model} graphs"]
    assert found["texts"] == result("decode")[f"{model} one call"]["texts"]
    assert (found["captured"], found["replays"], found["steps"]) == ([8, 2], 6, 11)
    assert found["devices"] == [0]  # the model's, though the thread has chosen another
    assert found["calls"] == 2


@pytest.mark.parametrize("kind", ["wrong graphs", "no graphs"])
def test_where_graphs_are_not_right_the_plain_loop_answers(result: Result, kind: str) -> None:
    found = result("decode")[f"plain {kind}"]
    assert found["texts"] == result("decode")["plain one call"]["texts"]
    assert found["replays"] == (1 if kind == "wrong graphs" else 0)


def test_a_graph_is_kept_once_finite_logits_prove_it(result: Result) -> None:
    found = result("unproven")
    assert found["logits"] == ["none", "finite: True", "finite: True"]
    assert (found["captured"], found["replays"]) == ([1], 2)


@pytest.mark.parametrize("kind", ["one call", "graphs"])
def test_a_step_of_the_engine_waits_once(result: Result, kind: str) -> None:
    waits = result("decode")[f"plain {kind}"]["waits"]
    assert sum(count for *_, count in waits) == 1, waits


def test_tokens_that_are_restricted_cost_no_wait(result: Result) -> None:
    found = result("choosing")
    assert found["cuda"]["texts"] == found["cpu"]["texts"]
    assert sum(count for *_, count in found["cuda"]["waits"]) == 1, found


def test_training_answers_in_memory_that_pytorch_keeps(result: Result) -> None:
    assert result("full_gpu")["answers"] == 2


def test_without_the_kernel_runs_attend_one_by_one(result: Result) -> None:
    assert result("no_flash") == {"calls": 0, "one call": False}


def test_kernels_get_as_many_key_heads_as_query_heads(result: Result) -> None:
    found = result("shared_heads")
    assert found["equal"] > 0
    assert found["fewer"] == 0


def test_a_deterministic_run_after_products_is_refused(result: Result) -> None:
    assert "deterministic: true comes too late" in result("late")["message"]


def test_a_dummy_pack_reaches_every_part(result: Result) -> None:
    found = result("dummy")
    assert found["loss"] == found["without gradient"] == 0
    assert found["text"] > 0


def test_the_benchmark_for_a_gpu_runs_whole(library: Path) -> None:
    """benchmarks/gpu.py, which nobody here can run on a card, on small models."""
    script = ROOT / "benchmarks" / "gpu.py"
    command = [sys.executable, str(HERE / "run.py"), str(library), str(script), "--small"]
    run = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert run.returncode == 0, [line for line in lines if not line["ok"]] or run.stderr[-2000:]
    sections = "rates parity stages resume fsdp lora full decode answers compiled"
    assert [line["section"] for line in lines] == sections.split()
    # This PyTorch has no NCCL, and pumice-tiny may not be at hand.
    assert {line["section"] for line in lines if "left out" in line} <= {"fsdp", "answers"}


def test_an_old_or_full_gpu_is_refused(result: Result) -> None:
    messages = result("old_gpu")
    old = "Tesla T4 has compute capability 7.5, bfloat16 needs 8.0"
    assert messages["recipe"] == f"{old}; use precision: fp32"
    assert messages["load"] == f"{old}; leave dtype out, or use torch.float16"
    assert messages["dtype"] == "torch.float16"
    assert messages["sizes"] == [2 * 16 * 256, 2048]  # of 16 slots with 256 tokens each, twice; of a chunk
    told = "with a KV cache of 1000000000 tokens needs"  # from the shapes; the engine has other words
    assert told in messages["cache_tokens"] and "give fewer tokens" in messages["cache_tokens"]
    assert "KV cache" in messages["cache"] and "close other programs" in messages["cache"]
