"""Words, names and values that the generated dialogues are made of, split into two halves that
never meet: what training may use and what only evaluation may use."""

import random
import zlib
from collections.abc import Callable, Sequence
from typing import TypeVar

_Item = TypeVar("_Item")

NOUNS = (
    "weather invoice ticket flight hotel recipe song movie book order parcel message email note "
    "calendar meeting reminder alarm timer photo video playlist route map station train bus taxi "
    "bike car price stock currency balance account payment loan budget report chart table file "
    "folder document page article blog comment review rating product cart coupon customer user "
    "profile password token server database backup log metric container cluster job task project "
    "issue branch commit release test build deploy domain certificate network router camera light "
    "lamp door lock window heater fan oven kettle washer robot drone sensor thermostat garden "
    "plant tree flower animal dog cat bird fish horse recipe meal menu restaurant table seat "
    "course lesson quiz grade student teacher school library museum park bridge tower castle "
    "river lake mountain island planet star comet rocket satellite signal channel podcast "
    "episode game score team player match league trophy contract lease permit license visa "
    "passport badge uniform helmet ladder hammer drill paint brick pipe cable battery engine "
    "wheel tire brake mirror ship harbor anchor cargo crate pallet warehouse shelf label barcode"
).split()
ADJECTIVES = (
    "red blue green yellow black white small large quick slow old new daily weekly monthly "
    "annual local remote public private shared secret main backup open closed active idle early "
    "late first last next hot cold warm cool dry wet heavy light long short high low north south "
    "east west inner outer upper lower plain simple final draft digital paper golden silver"
).split()
# Base form and third person, as descriptions use them.
VERBS = tuple(
    pair.split("/")
    for pair in (
        "get/gets find/finds fetch/fetches show/shows list/lists count/counts check/checks "
        "search/searches read/reads load/loads open/opens close/closes start/starts stop/stops "
        "create/creates make/makes build/builds add/adds insert/inserts update/updates "
        "change/changes edit/edits rename/renames move/moves copy/copies delete/deletes "
        "remove/removes cancel/cancels book/books reserve/reserves order/orders buy/buys "
        "sell/sells send/sends post/posts share/shares print/prints save/saves export/exports "
        "import/imports convert/converts translate/translates sort/sorts merge/merges "
        "split/splits lock/locks unlock/unlocks enable/enables disable/disables reset/resets "
        "restart/restarts schedule/schedules plan/plans track/tracks measure/measures "
        "compare/compares rate/rates review/reviews approve/approves reject/rejects"
    ).split()
)
PARAMETERS = (
    "city country region street address location place date day month year time hour duration "
    "start end limit count amount price size width height weight length depth level speed "
    "temperature unit format language color style title name label tag category kind type mode "
    "status priority reason comment subject body message text query keyword pattern path file "
    "folder url host port user owner author sender recipient email phone code id key version "
    "target source format quality volume brightness angle zoom page offset step rate score "
    "currency symbol account plan room floor seat table guest passenger driver vehicle model "
    "brand material shape flavor topic genre artist album season episode channel group team"
).split()
FLAGS = (
    "verbose recursive urgent silent public private archived hidden cached compressed encrypted "
    "notify repeat force strict safe fast preview draft shared pinned muted signed tracked gift "
    "insurance breakfast parking refund newsletter captions shuffle loop dry_run overwrite "
    "include_tax include_images case_sensitive read_only auto_renew send_copy keep_alive"
).split()
RESULT_KEYS = (
    "status result total balance temperature humidity price count level score distance duration "
    "owner code state position version capacity rating delay speed weight color title room gate "
    "number reference winner location size address queue pressure altitude voltage"
).split()
ATTRIBUTES = (
    "access code|phone number|favorite color|home town|locker number|best friend|seat number|"
    "secret word|birth year|badge number|room number|pet name|order number|project name|"
    "account number|street name|ticket number|team name|car brand|lucky number|desk number|"
    "main hobby|first job|middle name|flight number|parking spot|shoe size|email name"
).split("|")

# Words that sentence frames are made of besides what matters in them. Training frames have some of
# them exchanged, left out or added, so that the model does not depend on known sentences.
FILLERS = (
    "a an the this that these to of is are be was it its in on at by as for from with and or so "
    "then now just only also please can could would will should must may might shall i you we "
    "they me us my your our their want wants wanted need needs have has had do does did let "
    "like take put use set give given choose pick keep boss friend today here there if when "
    "because using where which what how some any every all each more very really simply kindly "
    "quickly again help goes going ought able sure yes well okay hello hey thanks dear about "
    "into onto over called named equal being good right whole thing case way want ask asked "
    "tell know see"
).split()

_ONSETS = (
    "b br d dr f fl g gl gr h j k kl kr l m n p pl pr qu r s st t tr v w y z zh sh ch th".split()
)
_VOWELS = "a e i o u ai ea ee io oa ou".split()
_CODAS = "b d g k l ll m n nd nt p r rk rn rt s sk st t v x z".split() + [""] * 12
_LETTERS = "eeeeeeaaaaaiiiiooootttttnnnnssssrrrrllldddcccuummpphhggbbffyywwkvxzjq"


def _is_held_out(word: str) -> bool:
    return zlib.crc32(word.encode()) % 8 == 0


_KNOWN = tuple(
    word
    for word in dict.fromkeys((*NOUNS, *ADJECTIVES, *PARAMETERS, *RESULT_KEYS))
    if not _is_held_out(word)
)


class Source:
    """Random choices for one dialogue, all from one side of the split.

    Items are words, names, sentence frames: whatever `pick` and the makers below return. A word
    belongs to evaluation if its checksum says so (one in eight), a frame if it stands late in its
    list; so a greedy model cannot have learnt by heart what evaluation asks.
    """

    def __init__(self, seed: int | str, held_out: bool = False) -> None:
        self.rng = random.Random(f"{seed}-{held_out}")
        self.held_out = held_out

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.rng.random() < probability

    def number(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return self.rng.randint(low, high)

    def pick(self, items: Sequence[_Item]) -> _Item:
        """Any item: for lists that training and evaluation share."""
        return self.rng.choice(items)

    def frame(self, frames: Sequence[str]) -> str:
        """A sentence frame: the last fifth of the list (at least one) is held out."""
        cut = len(frames) - max(1, len(frames) // 5)
        if self.held_out:
            return self.rng.choice(frames[cut:])
        frame = self.rng.choice(frames[:cut])
        return self._loosened(frame) if self.chance(0.4) else frame

    def word(self, words: Sequence[str]) -> str:
        """A word of the list that belongs to this side."""
        return self._mine(lambda: self.rng.choice(words))

    def pseudo_word(self) -> str:
        """A lower-case word that nobody has heard: syllables, parts of known words, or letters."""
        kind = self.rng.random()
        make = self._syllables if kind < 0.4 else self._parts if kind < 0.85 else self._letters
        return self._mine(make)

    def name(self) -> str:
        """A capitalised name."""
        return self.pseudo_word().capitalize()

    def noun(self) -> str:
        """A known noun or an unheard-of word."""
        return self.word(NOUNS) if self.chance(0.35) else self.pseudo_word()

    def fillers(self, low: int, high: int, odd: float = 0.0) -> str:
        """`low` to `high` words that mean nothing here, each with a space before it; unheard-of
        ones with probability `odd`."""
        count = self.number(low, high)
        words = (
            self.pseudo_word() if self.chance(odd) else self.pick(FILLERS) for _ in range(count)
        )
        return "".join(f" {word}" for word in words)

    def digits(self, low: int, high: int) -> str:
        """A number of `low` to `high` digits as text; its first is no zero."""
        count = self.number(low, high)
        return str(self.number(10 ** (count - 1), 10**count - 1))

    def sample(self, make: Callable[[], _Item], count: int) -> list[_Item]:
        """`count` different items."""
        items: list[_Item] = []
        while len(items) < count:
            item = make()
            if item not in items:
                items.append(item)
        return items

    def _loosened(self, frame: str) -> str:
        """The frame with other filler words."""
        words = []
        for word in frame.split(" "):
            if word.lower() in FILLERS:
                fate = self.rng.random()
                if fate < 0.25:
                    continue
                if fate < 0.65:
                    word = self.rng.choice(FILLERS)
            words.append(word)
        for _ in range(self.pick((0, 0, 1, 1, 2))):
            words.insert(self.number(0, len(words)), self.rng.choice(FILLERS))
        return " ".join(words)

    def _syllables(self) -> str:
        count = 2 if self.rng.random() < 0.7 else 3
        parts = [self.rng.choice(_ONSETS) + self.rng.choice(_VOWELS) for _ in range(count)]
        return "".join(parts) + self.rng.choice(_CODAS)

    def _parts(self) -> str:
        """The beginning of a known word and the end of another."""
        while True:
            head, tail = self.rng.choice(_KNOWN), self.rng.choice(_KNOWN)
            head, tail = head[: self.number(1, 5)], tail[-self.number(1, 5) :]
            if len(head + tail) >= 3 and head + tail not in _KNOWN:
                return head + tail

    def _letters(self) -> str:
        return "".join(self.rng.choice(_LETTERS) for _ in range(self.number(3, 7)))

    def _mine(self, make: Callable[[], str]) -> str:
        while True:
            word = make()
            if _is_held_out(word) == self.held_out:
                return word
