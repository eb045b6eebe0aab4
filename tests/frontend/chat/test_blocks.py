"""Deltas put together to blocks, in their order."""

from glimmer.frontend.chat.blocks import Blocks
from glimmer.frontend.chat.chat import News
from glimmer.frontend.parsers.deltas import CallArguments, CallStart, Content, Reasoning
from glimmer.frontend.text.detokenize import Piece


def test_neighbours_join_and_order_stays() -> None:
    start = CallStart(0, "call_1", "f")
    piece = Piece(5, "x", 0, None)
    blocks = Blocks()
    blocks.add(News(0, [Reasoning("a"), Reasoning("b"), Content("c")], [piece], None))
    blocks.add(News(0, [Content("d"), start, CallArguments(0, "{")], [piece], None))
    blocks.add(News(0, [CallArguments(0, "}"), Content("e")], [], "tool_calls"))
    found = [(block.kind, block.text, block.call) for block in blocks.blocks]
    assert found == [
        (Reasoning, "ab", None),
        (Content, "cd", None),
        (CallStart, "{}", start),
        (Content, "e", None),
    ]
    assert blocks.blocks[1].pieces == [piece, piece]
    assert blocks.finish_reason == "tool_calls"


def test_an_empty_reply_has_no_blocks() -> None:
    blocks = Blocks()
    blocks.add(News(0, [], [], "stop"))
    assert (blocks.blocks, blocks.finish_reason) == ([], "stop")
