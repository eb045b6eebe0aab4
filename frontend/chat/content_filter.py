"""Stop strings and log-probabilities of one chat reply: follows the content that the parser finds.

Both concern the content only, not reasoning or calls. Content that may begin a stop string is held
back. Log-probabilities are those of the tokens that together are the content.
"""

from ..parsers.deltas import Content, Delta
from ..parsers.glm import GlmParser, State
from ..text.detokenize import DecodedToken, Decoder, StopStrings, TextOptions


class ContentFilter:
    """Takes the deltas of each token in order and returns those that may be sent."""

    def __init__(self, options: TextOptions, parser: GlmParser, decoder: Decoder) -> None:
        self.stop_string: str | None = None  # the one that ended the reply
        self._options, self._parser, self._decoder = options, parser, decoder
        self._stops = StopStrings(options.stop_strings)
        self._held = ""  # content that may begin a stop string
        self._num_content = 0  # characters of content so far, with the held ones
        self._tokens: list[DecodedToken] = []  # of the content, not taken yet
        self._undecided: list[DecodedToken] = []  # whitespace that the parser holds
        self._name_tokens: list[DecodedToken] = []  # of text that may be the name of a tool

    def add(self, token: DecodedToken, num_tokens: int, deltas: list[Delta]) -> list[Delta]:
        """The deltas to send after token number `num_tokens`, for which the parser returned
        `deltas`."""
        if self._options.record_tokens:
            self._record(token, deltas)
        return self._release(deltas, num_tokens >= self._options.min_new_tokens)

    def finish(self, deltas: list[Delta], num_tokens: int) -> list[Delta]:
        """The last deltas to send, when the parser has returned its last ones."""
        if _has_content(deltas):
            self._show([*self._undecided, *self._name_tokens])
        released = self._release(deltas, num_tokens >= self._options.min_new_tokens)
        return [*released, *self._release_held()]

    def take_tokens(self) -> list[DecodedToken]:
        """Recorded tokens whose text was sent and that were not taken before."""
        released = self._num_content - len(self._held)
        count = sum(token.offset < released for token in self._tokens)
        taken, self._tokens = self._tokens[:count], self._tokens[count:]
        return taken

    def _record(self, token: DecodedToken, deltas: list[Delta]) -> None:
        """Decide which tokens became content with this one."""
        if _has_content(deltas):
            self._show([*self._undecided, *self._name_tokens, token])
            self._undecided, self._name_tokens = [], []
        elif self._parser.state is State.NAME:
            self._name_tokens.append(token)
        elif deltas or self._parser.state is State.CALL:
            self._name_tokens = []
            if not self._parser.is_holding:  # whitespace before a call may still be held
                self._undecided = []
        elif self._parser.is_holding or self._is_part_of_character(token):
            self._undecided.append(token)
        else:
            self._undecided, self._name_tokens = [], []

    def _is_part_of_character(self, token: DecodedToken) -> bool:
        return not token.text and not self._decoder.is_silent(token.token_id)

    def _show(self, tokens: list[DecodedToken]) -> None:
        self._tokens += [token._replace(offset=self._num_content) for token in tokens]

    def _release(self, deltas: list[Delta], may_stop: bool) -> list[Delta]:
        """The deltas up to a stop string. `may_stop`: whether one may end the reply."""
        released: list[Delta] = []
        for delta in deltas:
            if not isinstance(delta, Content):
                released += self._release_held()
                released.append(delta)
            elif self._options.stop_strings and may_stop:
                released += self._release_content(delta.text)
            else:
                self._num_content += len(delta.text)
                released.append(delta)
            if self.stop_string is not None:
                break
        return released

    def _release_content(self, text: str) -> list[Delta]:
        self._num_content += len(text)
        cut = self._stops.feed(text)
        text = self._held + text
        kept = len(text) - (cut or self._stops.num_partial)
        self._held = text[kept:]
        if cut:
            self._stop()
        return [Content(text[:kept])] if kept else []

    def _stop(self) -> None:
        """The held text begins with a stop string: drop it."""
        matches = [s for s in self._options.stop_strings if s and self._held.startswith(s)]
        self.stop_string = min(matches, key=len)  # a longer one would have ended later
        self._num_content -= len(self._held)
        self._held = ""
        self._tokens = [token for token in self._tokens if token.offset < self._num_content]

    def _release_held(self) -> list[Delta]:
        if not self._held:
            return []
        content = Content(self._held)
        self._held = ""
        self._stops = StopStrings(self._options.stop_strings)
        return [content]


def _has_content(deltas: list[Delta]) -> bool:
    return any(isinstance(delta, Content) for delta in deltas)
