"""What answers of /v1/responses said, kept in memory within a bound, for requests that refer to it by its id.

Some clients send back the ids of an answer's items instead of the items, unless they are told otherwise.
owner: the digest of the API key that the answer was given to. Items of another key are not found.
"""

from __future__ import annotations

import sys
from collections import OrderedDict

from pydantic import ValidationError

from pumice.errors import shorten
from pumice.serve.errors import invalid
from pumice.serve.responses import CallItem, InputItem, MessageItem, ReferenceItem, ResponsesRequest
from pumice.serve.work import BODY_COPIES, Account

MAX_BYTES = 16 << 20
ITEM_BYTES = 2048  # of an item beside its text, so that there are at most 8,192


class StoredItems:
    """The last items of answers, by owner and id. The oldest go first, whose ever they are."""

    def __init__(self) -> None:
        self._items: OrderedDict[tuple[bytes, str], tuple[InputItem, int]] = OrderedDict()
        self._bytes = 0

    def add_text(self, owner: bytes, item_id: str, text: str) -> None:
        self._add((owner, item_id), MessageItem(role="assistant", content=text), text)

    def add_call(self, owner: bytes, item_id: str, call_id: str, name: str, arguments: str) -> None:
        """Keep a call, unless its arguments are cut off: no request could have such a call as history."""
        try:
            call = CallItem(type="function_call", call_id=call_id, name=name, arguments=arguments)
        except ValidationError:
            return
        self._add((owner, item_id), call, arguments)

    def filled(self, owner: bytes, request: ResponsesRequest, memory: Account) -> ResponsesRequest:
        """Return the request with the items that it refers to, which count as if it had sent them.

        Raises ApiError if one is not here, or if there is no room for all.
        """
        if isinstance(request.input, str):
            return request
        items = [self._found(owner, number, item, memory) for number, item in enumerate(request.input)]
        return request.model_copy(update={"input": items})

    def _add(self, key: tuple[bytes, str], item: InputItem, text: str) -> None:
        size = ITEM_BYTES + sys.getsizeof(text)
        self._items[key] = (item, size)
        self._bytes += size
        while self._bytes > MAX_BYTES:
            _, (_, oldest) = self._items.popitem(last=False)
            self._bytes -= oldest

    def _found(self, owner: bytes, number: int, item: InputItem, memory: Account) -> InputItem:
        if not isinstance(item, ReferenceItem):
            return item
        if (owner, item.id) not in self._items:
            raise invalid(
                f"input.{number}.id",
                f"the item {shorten(item.id)} is not here any more; send it whole: only the last answers are "
                "kept, and none with store false",
                "item_not_found",
            )
        found, size = self._items[owner, item.id]
        memory.take(BODY_COPIES * size)
        return found
