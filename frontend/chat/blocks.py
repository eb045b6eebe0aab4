"""A whole assistant message as blocks in the order in which they were written.

For interfaces whose messages are lists: text after a call stays after it, whole and streamed.
"""

from dataclasses import dataclass, field

from ..parsers.deltas import CallArguments, CallStart, Content, Reasoning
from ..text.detokenize import Piece
from .chat import ChatJob, News


@dataclass
class Block:
    """A run of reasoning, a run of text, or one call, whose arguments are `text`."""

    kind: type[Reasoning] | type[Content] | type[CallStart]
    text: str = ""
    call: CallStart | None = None
    pieces: list[Piece] = field(default_factory=list)  # of text, if logprobs were asked for


class Blocks:
    """Grows by what a choice produced."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.finish_reason = "stop"

    def add(self, news: News) -> None:
        """Append what is new."""
        for delta in news.deltas:
            match delta:
                case CallStart():
                    self.blocks.append(Block(CallStart, call=delta))
                case CallArguments(_, text):
                    self.blocks[-1].text += text
                case Reasoning(text) | Content(text):
                    if not self.blocks or self.blocks[-1].kind is not type(delta):
                        self.blocks.append(Block(type(delta)))
                    self.blocks[-1].text += text
        texts = [block for block in self.blocks if block.kind is Content]
        if news.pieces and texts:
            texts[-1].pieces += news.pieces
        if news.finish_reason is not None:
            self.finish_reason = news.finish_reason


async def run_blocks(job: ChatJob) -> Blocks:
    """Receive the only choice of a request until its end."""
    blocks = Blocks()
    while job.is_open:
        for news in await job.receive():
            blocks.add(news)
    return blocks
