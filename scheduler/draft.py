"""How many drafts a decode step verifies: the length that made most tokens per second so far.

`tokens per step / time of a step` is compared for each length, at about the same number of rows.
Length 0, which is decoding without drafts, is one of them. The policy is pure: it decides by the
numbers of rows, accepted drafts and step times that it is told.
"""

from collections.abc import Sequence

from ..shared.config import ServeConfig
from ..shared.messages import MAX_DRAFT_TOKENS, StepPlan

_PRIOR = 0.7  # assumed acceptance of a draft, given that those before it were, before any was seen
_PRIOR_COST = 0.1  # assumed time of one draft, in steps without drafts
_ACCEPTANCE_RATE = 0.005  # weight of one row's draft in the moving average
_TIME_RATE = 0.2  # weight of one step's time
_HYSTERESIS = 1.05  # another length must be so much better
_SETTLE = 8  # steps with drafts before acceptance counts: steps without leave gaps in the draft KV
_BURST = 4  # steps in a row that try a length; the first is not timed, its start is not exact
_TRIALS = 3  # bursts for a length of which no step could be timed
_NEAR = 0.7  # a length is tried once if its score is this share of the best; its time is assumed
_NEAR_ELSEWHERE = 0.9  # the same if its time was measured with another number of rows
_REST = 256  # least steps between two bursts
_MOST_LOSS = 0.005  # share of the throughput that bursts may cost


class DraftPolicy:
    """The draft length of each step: at most `mtp_step`, always that with `mtp_fixed_step`."""

    def __init__(self, config: ServeConfig) -> None:
        self.longest = config.mtp_step
        self._fixed = config.mtp_fixed_step
        self._acceptance = [_PRIOR] * self.longest  # by position, given those before
        self._buckets: dict[int, _Bucket] = {}
        # Of the last answered step:
        self._timed: tuple[_Bucket, int] | None = None  # bucket and length, if it could be timed
        self._held_ns = 0  # the time it took, if that can be trusted
        self._made = 0  # drafts it made for the next one
        self._num_drafting = 0  # steps in a row that made drafts
        # For the heartbeat:
        self.length = 0  # of the last plan
        self.offered = [0] * self.longest  # by position, cumulative
        self.accepted = [0] * self.longest  # of these

    def choose(self, num_rows: int, max_tokens: int) -> int:
        """Drafts for each of `num_rows` rows in the next step. They may take half of the token
        budget `max_tokens`, and no more tokens than workers are prepared for."""
        if not self.longest or not num_rows:
            return 0
        num_tokens = min(max_tokens // 2, MAX_DRAFT_TOKENS)
        most = min(self.longest, max(0, num_tokens // num_rows - 1))
        bucket = self._bucket(num_rows)
        self.length = most if self._fixed else bucket.next(self._acceptance[:most])
        return self.length

    def observe(self, plan: StepPlan, accepted: Sequence[int], taken_ns: int) -> None:
        """A plan was answered after `taken_ns`: accepted[n] decode rows accepted n drafts. Call it
        for every step, in order."""
        num_drafts = plan.num_drafts
        num_left = num_decoded = sum(accepted)  # rows that accepted all drafts so far
        for position in range(min(num_drafts, self._made)):  # others were never made
            num_accepted = num_left - accepted[position]
            self.offered[position] += num_decoded
            self.accepted[position] += num_accepted
            if num_left and self._num_drafting >= _SETTLE:
                weight = 1 - (1 - _ACCEPTANCE_RATE) ** num_left
                error = num_accepted / num_left - self._acceptance[position]
                self._acceptance[position] += weight * error
            num_left = num_accepted
        self._made = num_drafts
        self._num_drafting = self._num_drafting + 1 if num_drafts else 0
        timed = None
        if plan.decode and not plan.prefill:
            timed = (self._bucket(len(plan.decode)), num_drafts)
            # A time counts only when the next step has no chunks either: workers take long to
            # launch a step with chunks, and answer the one before it only then.
            if self._timed is not None and self._held_ns:
                bucket, length = self._timed
                bucket.observe(length, self._held_ns)
        self._held_ns = taken_ns if timed == self._timed else 0
        self._timed = timed

    def _bucket(self, num_rows: int) -> "_Bucket":
        """Two for each doubling: 1, 2, 3, 4, 5-6, 7-8, 9-12, 13-16, ..."""
        octave = (num_rows - 1).bit_length()
        upper_half = num_rows > 3 << octave >> 2
        key = 2 * octave + upper_half
        if key not in self._buckets:
            nearest = min(self._buckets, key=lambda other: abs(other - key), default=None)
            like = None if nearest is None else self._buckets[nearest]
            self._buckets[key] = _Bucket(self.longest, like)
        return self._buckets[key]


class _Bucket:
    """Times measured at about one number of rows. A new bucket begins with the times of `like`."""

    def __init__(self, longest: int, like: "_Bucket | None" = None) -> None:
        # Time of each length while nothing was measured; only the proportions count.
        self._guessed = [1 + _PRIOR_COST * length for length in range(longest + 1)]
        self._near = _NEAR
        if like is not None:
            self._guessed = like._estimates(longest)
            self._near = _NEAR_ELSEWHERE if any(like._times) else like._near
        self._times: list[float | None] = [None] * (longest + 1)  # ns, moving averages
        self._latest: list[list[int]] = [[] for _ in self._times]  # the last three
        self._trials = [0] * (longest + 1)  # bursts
        self._length: int = 0 if like is None else like._length  # the best
        self._burst = (0, 0)  # length being tried, steps left
        self._until_burst = _REST
        self._turn = 0  # counts the tries of lengths that are not in use

    def next(self, acceptance: Sequence[float]) -> int:
        """The length of the next step, at most len(acceptance)."""
        most = len(acceptance)
        length, left = self._burst
        if left and length <= most:
            self._burst = (length, left - 1)
            return length
        times = self._estimates(most)
        scores = _scores(acceptance, times)
        best = max(range(most + 1), key=scores.__getitem__)
        used = min(self._length, most)
        if scores[best] > _HYSTERESIS * scores[used] or scores[used] < scores[0]:
            used = self._length = best
        for length in range(most + 1):  # try each length that looks good, once
            is_known = self._times[length] is not None or self._trials[length] == _TRIALS
            if not is_known and scores[length] > self._near * scores[best]:
                return self._try(length)
        self._until_burst -= 1
        if self._until_burst >= 0 or not most:
            return used
        return self._explore(used, scores, times)

    def observe(self, length: int, taken_ns: int) -> None:
        """A step with this draft length took `taken_ns`."""
        latest = self._latest[length] = [*self._latest[length][-2:], taken_ns]
        usual = sorted(latest)[(len(latest) - 1) // 2]  # one slow step changes nothing
        time = self._times[length]
        self._times[length] = usual if time is None else time + _TIME_RATE * (usual - time)

    def _estimates(self, most: int) -> list[float]:
        """Times of the lengths up to `most`. A length that was not measured is estimated from the
        nearest one that was."""
        known = [length for length, time in enumerate(self._times) if time is not None]
        times = []
        for length in range(most + 1):
            near = min(known, key=lambda other: abs(other - length), default=length)
            measured = self._times[near] or self._guessed[near]
            times.append(measured * self._guessed[length] / self._guessed[near])
        return times

    def _explore(self, used: int, scores: list[float], times: list[float]) -> int:
        """Try the lengths that are not in use, in turn. After a bad one the next try is later."""
        others = [length for length in range(len(scores)) if length != used]
        self._turn += 1
        length = others[self._turn % len(others)]
        self._try(length)
        steps = (1 + self._burst[1]) * times[length] / times[used]
        loss = max(0.0, 1 - scores[length] / scores[used]) * steps
        self._until_burst = max(_REST, int(loss / _MOST_LOSS))
        return length

    def _try(self, length: int) -> int:
        self._trials[length] += 1
        self._burst = (length, _BURST - 1 + (_SETTLE if self._length == 0 else 0))
        return length


def _scores(acceptance: Sequence[float], times: Sequence[float]) -> list[float]:
    """Expected tokens per row and nanosecond of each length."""
    scores = [1 / times[0]]
    tokens = chance = 1.0
    for share, time in zip(acceptance, times[1:], strict=True):
        chance *= share
        tokens += chance
        scores.append(tokens / time)
    return scores
