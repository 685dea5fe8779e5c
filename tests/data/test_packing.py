"""Packs: every loss and gradient as if each sample ran alone, and no sample lost."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from pumice.config import IMAGE_TOKEN, DecoderConfig, ModelConfig, VisionConfig
from pumice.conversation import Conversation, ImagePart, Message, user_message
from pumice.data.packing import Pack, Tree, pack, pack_evenly, prefix_tree
from pumice.geometry import Layout
from pumice.model.llava import Llava
from pumice.model.packed import PackedAttention, Run
from pumice.processor import Processor, Sample
from pumice.tokens import IGNORE, Tokenizer
from pumice.train.loss import supervised_loss

N = 2  # image tokens of one picture
A, B = ImagePart("a"), ImagePart("b")


def sample(text: str, *images: ImagePart, name: str = "s") -> Sample:
    """Letters are ids, capitals are supervised, `#` is a picture: sample("q#A") learns to say A."""
    ids: list[int] = []
    labels: list[int] = []
    for letter in text:
        if letter == "#":
            ids += [IMAGE_TOKEN] * N
            labels += [IGNORE] * N
        else:
            ids.append(ord(letter.lower()) - ord("a"))
            labels.append(ids[-1] if letter.isupper() else IGNORE)
    return Sample(name, np.array(ids), np.array(labels), images, (Layout(N),) * len(images))


def language_model(tied: bool = True) -> Llava:
    config = ModelConfig(
        DecoderConfig(
            vocab_size=26, width=24, depth=2, heads=4, kv_heads=2, head_dim=8, mlp_width=32, tied_head=tied
        ),
        VisionConfig(image_size=64, variant="lite0"),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Llava(config)
        for parameter in model.decoder.parameters():
            if parameter.dim() == 2:
                parameter.data.normal_(0, 0.3)
    return model


def image_tokens(images: tuple[ImagePart, ...] | list[ImagePart], leaves: dict[str, Tensor]) -> Tensor | None:
    """(M, N, D); the same picture has the same tokens, as leaves whose gradients add up."""
    for image in images:
        if image.name not in leaves:
            generator = torch.Generator().manual_seed(ord(image.name))
            leaves[image.name] = torch.randn(N, 24, generator=generator).requires_grad_()
    return torch.stack([leaves[image.name] for image in images]) if images else None


def packed_loss(model: Llava, packed: Pack, leaves: dict[str, Tensor]) -> Tensor:
    """As the training loop computes it."""
    from_numpy = torch.from_numpy
    hidden = model(
        from_numpy(packed.input_ids)[None],
        image_tokens(packed.images, leaves),
        positions=from_numpy(packed.positions)[None],
        attend=PackedAttention(packed.runs, model.config.decoder),
        rows=from_numpy(packed.sources),
    )
    head = model.decoder.head_weight
    return supervised_loss(hidden[0], head, from_numpy(packed.targets), from_numpy(packed.weights))


def loss_alone(model: Llava, one: Sample, leaves: dict[str, Tensor]) -> Tensor:
    """One sample, plain causal attention, the library's own cross-entropy."""
    hidden = model(torch.from_numpy(one.input_ids)[None], image_tokens(one.images, leaves))
    logits = model.decoder.logits(hidden)[0, :-1]
    labels = torch.from_numpy(one.labels)[1:]
    return nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")


def visible(tree: Tree) -> np.ndarray:
    """What each node sees, (n, n) bool: its ancestors and itself."""
    can_attend = np.eye(len(tree), dtype=bool)
    for node, parent in enumerate(tree.parents.tolist()):
        if parent >= 0:
            can_attend[node] |= can_attend[parent]
    return can_attend


def gradients(model: Llava, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    gradients_by_name = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    gradients_by_name |= {f"picture {n}": t.grad.clone() for n, t in leaves.items() if t.grad is not None}
    model.zero_grad(set_to_none=True)
    leaves.clear()
    return gradients_by_name


GROUPS = {
    "captions of one picture": [["#whatDOG", "#whatDOGGY", "#whoCAT", "#whatD"]],
    "equal samples": [["#abCD", "#abCD", "#abCD"]],
    "two pictures": [["#a#bYES", "#a#bYET", "#a#cNO"]],
    "several turns": [["#aBcDe", "#aBcF", "#aGcD", "#abCd"]],  # the same text, differently marked
    "text only": [["abC", "abD", "xyZ"]],
    "a caption alone": [["#DOG", "#DIG"]],
    "several trees": [["#whatDOG", "#whatD"], ["abC", "abD"], ["#x#yZ"], ["Q", "aB"]],
}


def grouped(name: str) -> list[list[Sample]]:
    return [
        [sample(text, *(A, B)[: text.count("#")], name=f"{name} {text}") for text in texts]
        for texts in GROUPS[name]
    ]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", GROUPS)
def test_losses_and_gradients_equal_those_of_the_samples_alone(name: str, tied: bool) -> None:
    model, leaves = language_model(tied), {}
    groups = grouped(name)
    alone = torch.stack([loss_alone(model, one, leaves) for group in groups for one in group]).sum()
    alone.backward()
    expected = gradients(model, leaves)
    together = packed_loss(model, Pack.of(list(map(prefix_tree, groups))), leaves)
    together.backward()
    actual = gradients(model, leaves)
    assert alone > 1
    relative = abs(together.item() - alone.item()) / alone.item()
    assert actual.keys() == expected.keys()
    worst = max((actual[n] - expected[n]).abs().max() / (1 + expected[n].abs().max()) for n in actual).item()
    print(f"{name}: loss {relative:.1e}, gradients {worst:.1e}")
    assert relative < 1e-5  # measured worst: 2.2e-7
    assert worst < 1e-5  # measured worst: 1.8e-6


def test_the_loss_counts_every_supervised_token_once() -> None:
    for name in GROUPS:
        for group in grouped(name):
            tree = prefix_tree(group)
            first = sum(
                one.labels[0] != IGNORE for one in group
            )  # nothing stands before it to predict it from
            assert tree.weights.sum() == sum(one.supervised for one in group) - first


def test_a_shared_beginning_is_computed_once() -> None:
    tree = prefix_tree(grouped("captions of one picture")[0])
    assert len(tree) == N + len("what" + "dog" + "gy") + len("o" + "cat")
    assert tree.images == (A,)
    assert tree.positions[:N].tolist() == [0, 1]
    weights = dict(zip(tree.targets.tolist(), tree.weights.tolist(), strict=False))
    assert weights[ord("d") - ord("a")] == 3


def test_a_tree_by_hand() -> None:
    tree = prefix_tree([sample("aBC"), sample("aBD"), sample("aX")])
    assert tree.input_ids.tolist() == [0, 1, 2, 3, 23]
    assert tree.positions.tolist() == [0, 1, 2, 2, 1]
    assert visible(tree).astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 0, 0, 0, 1],
    ]
    assert tree.runs == [Run(3), Run(1, ((0, 2),)), Run(1, ((0, 1),))]
    assert tree.sources.tolist() == [0, 1, 1, 0]
    assert tree.targets.tolist() == [1, 2, 3, 23]
    assert tree.weights.tolist() == [2, 1, 1, 1]


def test_branches_of_branches_count_what_stands_before_them() -> None:
    tree = prefix_tree([sample("aBCD"), sample("aXYZ"), sample("aXYQR"), sample("T")])
    assert tree.runs == [Run(4), Run(3, ((0, 1),)), Run(2, ((0, 1), (1, 2))), Run(1)]
    pair = Pack.of((prefix_tree([sample("aB")]), tree))
    assert pair.runs[3] == Run(2, ((1, 1), (2, 2)))


@settings(max_examples=40)
@given(st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=6))
def test_runs_see_what_the_tree_says(texts: list[str]) -> None:
    tree = prefix_tree([sample(text) for text in texts])
    starts = np.cumsum([0, *(run.length for run in tree.runs)])
    can_attend = np.zeros((len(tree), len(tree)), bool)
    for start, run in zip(starts, tree.runs, strict=False):
        for token in range(run.length):
            for owner, count in run.before:
                can_attend[start + token, starts[owner] : starts[owner] + count] = True
            can_attend[start + token, start : start + token + 1] = True
    assert (can_attend == visible(tree)).all()


def test_plain_samples_cost_no_mask() -> None:
    long = prefix_tree([sample("a" * 3000 + "B")])
    packed = PackedAttention(Pack.of((long, long)).runs, MODEL.config.decoder)
    assert packed.lengths == [3001, 3001] and packed.masks(0) == [None, None]


def test_the_second_picture_after_different_text_is_looked_at_again() -> None:
    tree = prefix_tree([sample("#a#X", A, B), sample("#b#X", A, B)])
    assert tree.images == (A, B, B)
    assert (tree.input_ids == IMAGE_TOKEN).sum() == 3 * N


def test_pictures_of_different_lengths_keep_their_placeholders() -> None:
    def pictured(answer: int) -> Sample:
        ids = np.array([1, *[IMAGE_TOKEN] * 3, *[IMAGE_TOKEN] * 2, 2, answer])
        labels = np.array([*[IGNORE] * 7, answer])
        return Sample("s", ids, labels, (A, B), (Layout(3), Layout(2)))

    tree = prefix_tree([pictured(5), pictured(6)])
    assert tree.input_ids.tolist() == [1, *[IMAGE_TOKEN] * 5, 2, 5, 6]
    assert (tree.images, tree.layouts) == ((A, B), (Layout(3), Layout(2)))


def test_different_pictures_do_not_share_a_tree() -> None:
    with pytest.raises(ValueError, match="samples 'one' and 'two' show different pictures"):
        prefix_tree([sample("#aB", A, name="one"), sample("#aB", B, name="two")])
    with pytest.raises(ValueError, match="show different pictures"):
        prefix_tree([sample("#a#B", A, B), sample("#a#B", B, A)])
    one = sample("#aB", A)
    with pytest.raises(ValueError, match="show different pictures"):
        prefix_tree([one, dataclasses.replace(one, layouts=(Layout(N, height=1, newline=True),))])


def test_a_pack_places_its_trees_end_to_end() -> None:
    one, two = prefix_tree([sample("#aB", A)]), prefix_tree([sample("cD"), sample("cE")])
    joined = Pack.of((one, two))
    assert joined.parents.tolist() == [-1, 0, 1, 2, -1, 4, 4]
    assert len(joined) == len(one) + len(two) == 7
    assert joined.input_ids.tolist() == [IMAGE_TOKEN, IMAGE_TOKEN, 0, 1, 2, 3, 4]
    assert joined.positions.tolist() == [0, 1, 2, 3, 0, 1, 1]
    assert joined.sources.tolist() == [2, 4, 4]
    assert joined.targets.tolist() == [1, 3, 4]
    assert joined.images == (A,)


MODEL = language_model()
letters = st.text("abAB", min_size=1, max_size=6)


@settings(max_examples=10)
@given(st.lists(st.tuples(st.booleans(), st.lists(letters, min_size=1, max_size=4)), min_size=1, max_size=4))
def test_any_pack_has_the_losses_of_its_samples(groups: list[tuple[bool, list[str]]]) -> None:
    trees, expected = [], 0.0
    with torch.no_grad():
        for pictured, texts in groups:
            samples = [sample("#" + t, A) if pictured else sample(t) for t in texts]
            expected += sum(loss_alone(MODEL, one, {}).item() for one in samples)
            trees.append(prefix_tree(samples))
        actual = packed_loss(MODEL, Pack.of(trees), {}).item()
    assert actual == pytest.approx(expected, rel=1e-5, abs=1e-5)


@settings(max_examples=40)
@given(st.lists(letters, min_size=1, max_size=6))
def test_every_sample_can_be_read_back_from_the_tree(texts: list[str]) -> None:
    """A node and what it sees, in order of depth, is a sample's beginning; each beginning is there once."""
    tree = prefix_tree([sample(text) for text in texts])
    paths = []
    for row in visible(tree):
        seen_columns = np.flatnonzero(row)
        assert tree.positions[seen_columns].tolist() == list(range(len(seen_columns)))
        paths.append("".join(chr(ord("a") + i) for i in tree.input_ids[seen_columns]))
    beginnings = {text.lower()[: i + 1] for text in texts for i in range(len(text))}
    assert sorted(paths) == sorted(beginnings)
    assert np.isin(tree.sources, range(len(tree))).all()


def trees_of(lengths: list[int]) -> list[Tree]:
    return [prefix_tree([sample("a" * (n - 1) + "B", name=str(i))]) for i, n in enumerate(lengths)]


@settings(max_examples=40)
@given(lengths=st.lists(st.integers(1, 9), max_size=9), budget=st.integers(1, 20))
def test_packs_keep_to_the_budget_and_lose_nothing(lengths: list[int], budget: int) -> None:
    trees = trees_of(lengths)
    packs = pack(trees, budget)
    assert all(len(p) <= budget or len(p.trees) == 1 for p in packs)
    assert all(p.trees for p in packs)
    assert sorted(id(t) for p in packs for t in p.trees) == sorted(map(id, trees))
    assert [p.trees for p in pack(trees, budget)] == [p.trees for p in packs]
    # First fit: the smallest tree of a later pack fits in no earlier one.
    for late in range(1, len(packs)):
        smallest = min(map(len, packs[late].trees))
        assert all(len(early) + smallest > budget for early in packs[:late])


def test_real_samples_share_picture_and_question(tiny_folder: Path) -> None:
    tokenizer = Tokenizer.from_file(tiny_folder / "tokenizer.json")
    decoder = DecoderConfig(320, 24, 1, 2, 1, 8, 16)
    processor = Processor(ModelConfig(decoder, VisionConfig(image_size=64)), tokenizer)
    question = user_message("What is in the picture?", [Image.new("RGB", (8, 8))])
    samples = [
        processor.training_sample(Conversation((question, Message("assistant", (answer,)))))
        for answer in ("A dog.", "A dog runs.", "The picture.")
    ]
    prompt = processor.prompt(Conversation((question,)))
    tree = prefix_tree(samples)
    shared = len(prompt.input_ids)
    assert tree.input_ids[:shared].tolist() == prompt.input_ids.tolist()
    assert visible(tree)[:, :shared][shared:].all()
    assert len(tree) < shared + sum(s.supervised for s in samples)
    assert tree.weights.sum() == sum(s.supervised for s in samples)


def test_processes_are_equally_busy() -> None:
    """Rows as long as LLaVA-Instruct's beside a picture of 576 tokens: 16 for each of 8 processes."""
    random = np.random.default_rng(0)
    busy = []
    for _ in range(20):
        text = random.lognormal(math.log(160) - 0.32, 0.8, 128)
        trees = [tree_of(int(n)) for n in np.minimum(2048, 611 + text)]
        packs = pack_evenly(trees, 8192, 8)
        assert len(packs) % 8 == 0 and max(map(len, packs)) <= 8192
        assert sorted(id(t) for p in packs for t in p.trees) == sorted(map(id, trees))
        # Processes compute a pack each at the same time, as long as the longest of them takes.
        rounds = [max(map(len, packs[first : first + 8])) for first in range(0, len(packs), 8)]
        busy.append(sum(map(len, trees)) / 8 / sum(rounds))
    assert np.mean(busy) > 0.97  # measured: 0.982; packs as full as possible: 0.74


def test_even_packs_of_few_and_of_long_trees() -> None:
    assert pack_evenly([], 10, 4) == []
    assert [len(p) for p in pack_evenly([tree_of(3), tree_of(2)], 10, 4)] == [3, 2]
    assert [len(p) for p in pack_evenly([tree_of(30), tree_of(9), tree_of(9), tree_of(9)], 10, 2)] == [
        30,
        9,
        9,
        9,
    ]


def tree_of(tokens: int) -> Tree:
    ids = np.arange(tokens)
    empty = ids[:0]
    return Tree(ids, ids, ids - 1, empty, empty, empty.astype(np.float32), (), ())
