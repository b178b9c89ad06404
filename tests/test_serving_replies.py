"""Replies of a server as values, from the pieces that texts are made of."""

from collections.abc import Iterator

from milepost.serving.pieces import Piece
from milepost.serving.replies import Head, Usage, whole


class Read(list[Piece]):
    """Pieces, and how often they are gone through."""

    times = 0

    def __iter__(self) -> Iterator[Piece]:
        self.times += 1
        return super().__iter__()


def test_a_reply_goes_through_the_pieces_once_however_many_texts_it_has() -> None:
    """Its texts are in the order of their numbers, whatever order the pieces came in."""
    head, count = Head(chat=False, name="text_completion", fields={"id": "cmpl-1"}), 50
    begun = [Piece(index, f"{index} ", 1) for index in reversed(range(count))]
    pieces = Read([*begun, *(Piece(index, "end", 1, finish="stop") for index in range(count))])
    choices = whole(head, pieces, scored=False, usage=Usage(1, 2 * count, 0))["choices"]
    assert [(choice["index"], choice["text"]) for choice in choices] == [(i, f"{i} end") for i in range(count)]
    assert {choice["finish_reason"] for choice in choices} == {"stop"}
    assert pieces.times == 1
