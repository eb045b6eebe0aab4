"""One choice of a chat reply while its tokens arrive: token ids -> deltas.

In `TextStream`'s place in a `Job`: decodes, takes the text apart (`parsers/glm.py`) and looks for
stop strings. Those are looked for in the content alone, not in reasoning or in calls, and never
across a call. Log-probabilities are kept for the tokens of the content, which together are its
text.
"""

from collections.abc import Sequence

from ...shared.messages import TokenLogprob
from ..parsers.deltas import Content, Delta, merge
from ..parsers.glm import GlmParser, ParserOptions, State
from ..text.detokenize import Decoder, Piece, StopStrings, TextOptions, Vocabulary


class ChatStream:
    """`finish_reason` and `must_abort` are as in `TextStream`; deltas are taken with `take`."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        options: TextOptions,
        parser_options: ParserOptions,
        max_new_tokens: int,
    ) -> None:
        self.max_new_tokens = max_new_tokens
        self.num_tokens = 0
        self.num_reasoning_tokens = 0  # of these, without tags and the end
        self.finish_reason: str | None = None
        self.must_abort = False
        self.stop_string: str | None = None  # the one that ended it
        self.parser = GlmParser(parser_options)
        self._options = options
        self._decoder = Decoder(vocabulary, options)
        self._stops = StopStrings(options.stop_strings)
        self._looks_closely = bool(options.stop_strings) or options.record_pieces
        self._deltas: list[Delta] = []
        self._held = ""  # content that may begin a stop string
        self._num_content = 0  # characters of content so far, held ones included
        self._pieces: list[Piece] = []
        self._undecided: list[Piece] = []  # tokens of whitespace that the parser holds
        self._named: list[Piece] = []  # and of what may be the name of a tool
        self._is_closed = False

    def add(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob] = ()) -> str:
        """Take tokens. `logprobs` is parallel to them or empty. The text is in the deltas: ""."""
        for n, token_id in enumerate(token_ids):
            if self.finish_reason is not None:
                break
            self.num_tokens += 1
            text = self._decoder.text(token_id)
            in_reasoning = self.parser.state is State.REASONING
            self.parser.feed(token_id, text)
            if in_reasoning and self.parser.state is State.REASONING:
                self.num_reasoning_tokens += bool(text) or not self._decoder.is_silent(token_id)
            if token_id in self._options.stop_token_ids:
                self.finish_reason = "stop"
            elif self.num_tokens >= self.max_new_tokens:
                self.finish_reason = "length"
            if self._looks_closely:
                if self._options.record_pieces:
                    self._record(Piece(token_id, text, 0, logprobs[n] if logprobs else None))
                self._pass_on()
        if self.finish_reason is not None:
            self.close(self.finish_reason)
        return ""

    def finish(self) -> str:
        """Nothing: `close` ends it, which needs to know why."""
        return ""

    def close(self, reason: str) -> None:
        """No more tokens come; "stop" means that the model ended its turn. A second time does
        nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        if self.stop_string is None:
            self.parser.finish(by_itself=reason == "stop")
            if any(isinstance(delta, Content) for delta in self.parser.deltas):
                self._show([*self._undecided, *self._named])
            self._pass_on()
        self._release_held()

    def take(self) -> tuple[list[Delta], list[Piece]]:
        """Deltas that came since the last call, and the tokens of their content if recorded."""
        deltas = [*self._deltas, *self.parser.deltas]
        self._deltas, self.parser.deltas = [], []
        return merge(deltas), self.take_pieces()

    def take_pieces(self) -> list[Piece]:
        """Recorded tokens of the content that was released and that were not taken before."""
        if not self._pieces:
            return []
        released = self._num_content - len(self._held)
        count = sum(piece.offset < released for piece in self._pieces)
        taken, self._pieces = self._pieces[:count], self._pieces[count:]
        return taken

    def _record(self, piece: Piece) -> None:
        """Decide which tokens became content with this one."""
        if any(isinstance(delta, Content) for delta in self.parser.deltas):
            self._show([*self._undecided, *self._named, piece])
            self._undecided, self._named = [], []
        elif self.parser.state is State.NAME:
            self._named.append(piece)
        elif self.parser.deltas or self.parser.state is State.CALL:
            self._named = []
            if not self.parser.is_holding:  # whitespace before a call may still wait
                self._undecided = []
        elif self.parser.is_holding or self._is_part(piece):
            self._undecided.append(piece)
        else:
            self._undecided, self._named = [], []

    def _is_part(self, piece: Piece) -> bool:
        """Whether it is a part of a character."""
        return not piece.text and not self._decoder.is_silent(piece.token_id)

    def _show(self, pieces: list[Piece]) -> None:
        self._pieces += [piece._replace(offset=self._num_content) for piece in pieces]

    def _pass_on(self) -> None:
        """Move the parser's deltas to ours, stop strings cut off."""
        deltas, self.parser.deltas = self.parser.deltas, []
        for delta in deltas:
            if isinstance(delta, Content):
                self._pass_content(delta.text)
            else:
                self._release_held()
                self._deltas.append(delta)
            if self.stop_string is not None:
                return

    def _pass_content(self, text: str) -> None:
        self._num_content += len(text)
        if not self._options.stop_strings or self.num_tokens < self._options.min_new_tokens:
            self._deltas.append(Content(text))
            return
        cut = self._stops.feed(text)
        text = self._held + text
        kept = len(text) - (cut or self._stops.num_partial)
        self._held = text[kept:]
        if kept:
            self._deltas.append(Content(text[:kept]))
        if cut:
            self._stop()

    def _stop(self) -> None:
        """The held text begins with a stop string: nothing from there on is sent."""
        found = [s for s in self._options.stop_strings if s and self._held.startswith(s)]
        self.stop_string = min(found, key=len)  # a longer one would have ended later
        self._num_content -= len(self._held)
        self._held = ""
        self._pieces = [piece for piece in self._pieces if piece.offset < self._num_content]
        self.must_abort = self.finish_reason is None
        self.finish_reason = "stop"

    def _release_held(self) -> None:
        if self._held:
            self._deltas.append(Content(self._held))
            self._held = ""
            self._stops = StopStrings(self._options.stop_strings)
