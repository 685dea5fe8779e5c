"""The prefix cache decides which sequences hold which blocks of the KV cache, and finds blocks to reuse.

A block holds the keys and values of some neighbouring tokens of a sequence. Each token has a hash, an
integer. Two sequences that begin with the same token hashes have the same keys and values there, so they
share these blocks; each block counts its owners. Blocks form a tree: the children of a block hold what
follows its tokens. To find a prefix is to walk down the tree, in time that does not depend on how much is
cached.

Blocks without an owner stay until they are needed. The one that was not used for longest is evicted first,
and the end of a sequence before its beginning.
"""

from __future__ import annotations

import bisect
import heapq
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

_HASH_BYTES = 8  # of one token


class CacheBlock:
    """A block of the KV cache, and its place in the tree.

    number: the block of the KV cache. key: the bytes of the hashes of the tokens in it. parent: the block
    before it. owners: running sequences whose table names it. Only a full block has children, and more than
    one owner.
    """

    __slots__ = ("_order", "children", "key", "number", "owners", "parent")

    def __init__(self, number: int) -> None:
        self.number, self.owners = number, 0
        self.key = b""
        self.parent: CacheBlock | None = None
        self.children: dict[bytes, CacheBlock] = {}
        self._order: list[bytes] = []  # the keys of `children`, sorted

    @property
    def length(self) -> int:
        """The number of tokens in the block."""
        return len(self.key) // _HASH_BYTES

    def add(self, child: CacheBlock) -> None:
        bisect.insort(self._order, child.key)
        self.children[child.key] = child

    def remove(self, child: CacheBlock) -> None:
        del self.children[child.key]
        index = bisect.bisect_left(self._order, child.key)
        if self._order[index : index + 1] == [child.key]:
            del self._order[index]

    def nearest(self, key: bytes) -> tuple[CacheBlock | None, int]:
        """Return the child that begins with most tokens of `key`, and their number."""
        # In sorted order, the key with the longest common beginning is one of the two neighbours.
        index = bisect.bisect_left(self._order, key)
        best, best_length = None, 0
        for other in self._order[max(0, index - 1) : index + 1]:
            child = self.children.get(other)
            length = common_prefix(np.frombuffer(other, np.int64), np.frombuffer(key, np.int64))
            if child is not None and length > best_length:
                best, best_length = child, length
        return best, best_length

    def has_longer(self, child: CacheBlock) -> bool:
        """Return whether another child begins with all tokens of `child`."""
        index = bisect.bisect_right(self._order, child.key)
        return any(other.startswith(child.key) for other in self._order[index : index + 1])


class CacheSlot:
    """The blocks of one running sequence, in order. The first `length` of their cells hold its tokens.

    table: the numbers of the blocks.
    """

    __slots__ = ("blocks", "length", "table")

    def __init__(self, blocks: list[CacheBlock], length: int) -> None:
        self.blocks, self.length = blocks, length
        self.table = [block.number for block in blocks]


class Match(NamedTuple):
    """The longest prefix of a sequence that is cached: `length` tokens.

    blocks: full ones that hold its beginning. tail: a block whose first tokens are the rest of it, or None.
    """

    blocks: list[CacheBlock]
    tail: CacheBlock | None
    length: int


def common_prefix(first: np.ndarray, second: np.ndarray) -> int:
    """Count the token hashes that both sequences begin with."""
    shorter = min(len(first), len(second))
    differences = np.flatnonzero(first[:shorter] != second[:shorter])
    return int(differences[0]) if len(differences) else shorter


class PrefixCache:
    """Gives out the `blocks` blocks of a KV cache, each of `block` tokens.

    keep_finished: whether sequences share blocks, and finished ones stay. copy: copies the first n cells of a
    block to another block. has_memory: whether the system can give memory to a block that was never used.
    """

    def __init__(
        self,
        blocks: int,
        block: int,
        copy: Callable[[int, int, int], None],
        *,
        keep_finished: bool = True,
        has_memory: Callable[[], bool] = lambda: True,
    ) -> None:
        self.blocks, self.block, self.keep_finished = blocks, block, keep_finished
        self._copy, self.has_memory = copy, has_memory
        self.lacked_memory = False  # whether a block was missing for want of memory when last counted
        self.evictions = 0
        self.cached_tokens = 0  # in idle blocks
        self.busy: dict[int, CacheBlock] = {}  # those with owners, by number
        self.idle: OrderedDict[int, CacheBlock] = OrderedDict()  # by number, least recently used first
        self._free = list(range(blocks))  # a heap: low numbers first, so that neighbours go together
        self._used = 0  # blocks from this number on were never used: they have no memory yet
        self._root = CacheBlock(-1)

    def match(self, token_hashes: np.ndarray) -> Match:
        """Return the longest prefix of `token_hashes` that is cached."""
        blocks: list[CacheBlock] = []
        if not self.keep_finished:
            return Match(blocks, None, 0)
        parent, size = self._root, self.block
        for start in range(0, len(token_hashes) - size + 1, size):
            child = parent.children.get(token_hashes[start : start + size].tobytes())
            if child is None:
                break
            blocks.append(child)
            parent = child
        start = len(blocks) * size
        tail, length = parent.nearest(token_hashes[start : start + size].tobytes())
        return Match(blocks, tail, start + length)

    def open(self, token_hashes: np.ndarray, match: Match, capacity: int) -> CacheSlot | None:
        """Return a slot with room for `capacity` tokens, the first of which are those of the match.

        Full blocks are shared. Of the tail, the matching tokens are copied, unless nobody else uses it and
        all of it matches. Return None, and evict nothing, if there is no room.
        """
        # 1. Hold what matches, so that it is not evicted.
        blocks, tail, length = match
        held = [*blocks, *([] if tail is None else [tail])]
        for block in held:
            self._hold(block)
        needed = -(-capacity // self.block) - len(blocks)
        taken = tail is not None and tail.owners == 1 and tail.length == length - len(blocks) * self.block
        # 2. Without room beside the tail, compute its tokens again.
        if tail is not None and not taken and self.available < needed:
            self._let_go(held.pop())
            tail, length = None, len(blocks) * self.block
        if self.available < needed - taken:
            for block in reversed(held):
                self._let_go(block)
            return None
        # 3. Allocate the other blocks.
        new = [self._allocate() for _ in range(needed - taken)]
        if tail is None or taken:
            return CacheSlot([*held, *new], length)
        # 4. Copy from the tail. The slot has its tokens only when they are there.
        slot = CacheSlot([*blocks, *new], len(blocks) * self.block)
        self._copy(tail.number, new[0].number, length - slot.length)
        self.record(slot, token_hashes[:length])
        self._let_go(tail)
        return slot

    @property
    def available(self) -> int:
        """The number of blocks that could be allocated now."""
        free = len(self._free)
        self.lacked_memory = self._used < self.blocks and not self.has_memory()
        if self.lacked_memory:
            free = sum(number < self._used for number in self._free)
        return free + len(self.idle)

    def grow(self, slot: CacheSlot, capacity: int) -> bool:
        """Give a slot room for `capacity` tokens, or as much as there is. Return False if there is none."""
        needed = -(-capacity // self.block) - len(slot.blocks)
        count = min(needed, self.available)
        for _ in range(count):
            block = self._allocate()
            slot.blocks.append(block)
            slot.table.append(block.number)
        return count > 0

    def record(self, slot: CacheSlot, token_hashes: np.ndarray) -> None:
        """Record that a slot's cells hold these tokens; those beyond `slot.length` are new.

        Raise ValueError when they do not fit. It may be called again with the same tokens.
        """
        size, end = self.block, len(token_hashes)
        if end > size * len(slot.blocks):
            raise ValueError(f"{end} tokens do not fit in {len(slot.blocks)} blocks of {size} cells")
        for index in range(slot.length // size, -(-end // size)) if self.keep_finished else ():
            key, block = token_hashes[index * size : (index + 1) * size].tobytes(), slot.blocks[index]
            if block.key == key:
                continue
            self._remove(block)
            parent = slot.blocks[index - 1] if index else self._root
            block.key, block.parent = key, parent
            twin = parent.children.get(key)
            if twin is None:
                parent.add(block)
            elif block.length == size:  # another sequence has computed the same: share its block
                self._hold(twin)
                slot.blocks[index], slot.table[index] = twin, twin.number
                self._let_go(block)
        slot.length = end

    def release(self, slot: CacheSlot) -> None:
        """Give up a slot: its sequence is finished. What it holds stays, until the room is needed."""
        for block in reversed(slot.blocks):  # so that the end of it is evicted first
            self._let_go(block)

    def hide(self, slot: CacheSlot) -> None:
        """Let no other sequence find what a slot holds, because it is not right. It is free once released."""
        for block in slot.blocks:
            self._remove(block)

    def recover(self, slots: Sequence[CacheSlot]) -> None:
        """Put everything in order after an interruption: only `slots` own blocks."""
        # 1. The running sequences say which blocks are busy. The others have no owner.
        for slot in slots:
            slot.table = [block.number for block in slot.blocks]
        owners = Counter(block.number for slot in slots for block in slot.blocks)
        for block in [block for slot in slots for block in slot.blocks]:
            self.busy[block.number] = block
            self.idle.pop(block.number, None)
        for block in reversed(list(self.busy.values())):  # the end of a sequence first, as in `release`
            block.owners = owners[block.number]
            if not block.owners:
                block.owners = 1
                self._let_go(block)
        # 2. All else is free. It must not be in the tree either.
        used = self.busy.keys() | self.idle.keys()
        self._free = sorted(set(range(self.blocks)) - used)
        self.cached_tokens = sum(block.length for block in self.idle.values())
        parents = [self._root]
        for parent in parents:
            for block in list(parent.children.values()):
                if block.number in used:
                    parents.append(block)
                else:
                    parent.remove(block)

    def clear(self) -> None:
        """Forget all idle blocks. Needed when the model's weights change."""
        while self.idle:
            self._forget_oldest()

    def _allocate(self) -> CacheBlock:
        """Return a block for one owner: a free one, or else the one that was not used for longest."""
        is_new = bool(self._free) and self._free[0] >= self._used
        if not self._free or (is_new and self.idle and not self.has_memory()):
            self._forget_oldest()
            self.evictions += 1
        number = heapq.heappop(self._free)
        self._used = max(self._used, number + 1)
        block = self.busy[number] = CacheBlock(number)
        block.owners = 1
        return block

    def _hold(self, block: CacheBlock) -> None:
        if not block.owners:
            del self.idle[block.number]
            self.cached_tokens -= block.length
            self.busy[block.number] = block
        block.owners += 1

    def _let_go(self, block: CacheBlock) -> None:
        """Take one owner from a block. Without owners it is idle, or free if nothing could be reused."""
        block.owners -= 1
        if block.owners:
            return
        del self.busy[block.number]
        parent = block.parent
        is_in_tree = parent is not None and parent.children.get(block.key) is block
        if parent is not None and is_in_tree and not parent.has_longer(block):
            self.idle[block.number] = block
            self.cached_tokens += block.length
        else:
            self._remove(block)
            heapq.heappush(self._free, block.number)

    def _forget_oldest(self) -> None:
        """Free the idle block that was not used for longest."""
        number, block = self.idle.popitem(last=False)
        self.cached_tokens -= block.length
        self._remove(block)
        heapq.heappush(self._free, number)

    def _remove(self, block: CacheBlock) -> None:
        """Take a block out of the tree."""
        if block.parent is not None and block.parent.children.get(block.key) is block:
            block.parent.remove(block)
