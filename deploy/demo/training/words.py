"""Words, names and values for generated dialogues, split into two disjoint sides: one for training
and one for evaluation only."""

import random
import zlib
from collections.abc import Callable, Sequence
from typing import TypeVar

from . import frames

_Item = TypeVar("_Item")

NOUNS = (
    "weather invoice ticket flight hotel recipe song movie book order parcel message email note "
    "calendar meeting reminder alarm timer photo video playlist route map station train bus taxi "
    "bike car price stock currency balance account payment loan budget report chart table file "
    "folder document page article blog comment review rating product cart coupon customer user "
    "profile password token server database backup log metric container cluster job task project "
    "issue branch commit release test build deploy domain certificate network router camera light "
    "lamp door lock window heater fan oven kettle washer robot drone sensor thermostat garden "
    "plant tree flower animal dog cat bird fish horse meal menu restaurant seat course lesson "
    "quiz grade student teacher school library museum park bridge tower castle river lake "
    "mountain island planet star comet rocket satellite signal channel podcast episode game score "
    "team player match league trophy contract lease permit license visa passport badge uniform "
    "helmet ladder hammer drill paint brick pipe cable battery engine wheel tire brake mirror "
    "ship harbor anchor cargo crate pallet warehouse shelf label barcode apple banana bread "
    "butter cheese chicken coffee cookie corn cream egg flour fruit honey juice lemon milk onion "
    "orange pasta pepper pizza potato rice salad salt sauce soup sugar tea tomato water wine arm "
    "blood body bone brain ear eye face finger foot hair hand head heart knee leg mouth neck "
    "nose shoulder skin stomach tooth baby brother child cousin daughter family father girl "
    "husband king man mother neighbor parent person prince queen sister son uncle wife woman "
    "actor artist baker banker barber builder captain chef clerk coach dancer dentist doctor "
    "farmer guard judge lawyer manager nurse painter pilot plumber poet police sailor singer "
    "soldier tailor waiter worker writer bear bee butterfly camel cow deer duck eagle elephant "
    "fox frog goat lion monkey mouse owl pig rabbit sheep snake spider tiger turtle whale wolf "
    "zebra beach cave cliff cloud desert field forest hill ice jungle moon ocean rain rock sand "
    "sea sky snow storm sun valley wave wind wood airport apartment bakery bank bar barn cinema "
    "city clinic club company country factory farm gym hall hospital house kitchen market office "
    "palace pharmacy prison shop stadium store studio temple theater town village zoo bag basket "
    "bed belt blanket bottle bowl box brush bucket button candle card chair clock coat coin cup "
    "curtain desk dish dress envelope fork glass glove hat jacket key knife magazine needle "
    "newspaper paper pen pencil pillow plate pocket pot ring rope scarf shirt shoe skirt soap "
    "sock spoon suit sweater towel toy umbrella vase wallet watch browser byte cache code cursor "
    "disk driver editor font function icon image input keyboard kernel link loop memory module "
    "monitor node object output package patch pixel plugin pointer port printer process program "
    "query queue record register screen script session socket stack string switch symbol syntax "
    "system tab tag thread tool variable vector virus widget accident advice agreement "
    "answer attack attempt battle belief business career celebration chance change charge "
    "claim climate competition complaint concert conference conflict connection conversation "
    "crime crisis culture damage danger debate debt decision degree delivery demand design desire "
    "detail development difference difficulty dinner disaster discount discovery discussion "
    "disease donation dream economy education effect election emergency employee energy entrance "
    "equipment error estimate exam example exchange exercise experience expert explanation "
    "failure fashion fear feature festival fight fire flag flood form friend fuel furniture "
    "future gift goal government group growth guest guide health height history hobby holiday "
    "income industry inspection insurance interview investment invitation item journey "
    "knowledge language law leader lecture letter lottery lunch machine magic mail medicine "
    "membership metal method mission mistake money motor music newsletter notice number opinion "
    "opportunity option organization party passenger patient pattern penalty pension picture "
    "policy pollution position poster power prescription present president prize problem profit "
    "promise property proposal protest purchase question quote race radio receipt refund "
    "relationship renewal rental repair request research reservation result reward role rule "
    "safety salary sale sample scholarship science season secret section security service shape "
    "share shift signature size skill society source space speech sport statement statistics "
    "strategy style subject subscription success suggestion summary supply support survey target "
    "tax technology television tent theory threat thought title tournament tradition traffic "
    "training transfer transport travel treatment trip truck trust upgrade vacation vehicle "
    "version victory voice vote voucher war warning waste weapon website wedding weekend weight "
    "winner workshop"
).split()
ADJECTIVES = (
    "red blue green yellow black white small large quick slow old new daily weekly monthly annual "
    "local remote public private shared secret main backup open closed active idle early late "
    "last hot cold warm cool dry wet heavy light long short high low north south east "
    "west inner outer upper lower plain simple final draft digital paper golden silver angry bad "
    "bitter blind bold brave brief bright broken brown busy calm cheap clean clear clever common "
    "complete constant correct crazy dark dead deep dirty double dull eager easy electric empty "
    "extra fair famous fat flat foreign free frozen full funny general gentle "
    "grand great grey happy hard healthy hidden holy huge human hungry important junior kind lazy "
    "left loose loud lucky mad married medical middle military mobile modern narrow national "
    "native natural near nice normal odd official orange perfect pink polite poor popular pretty "
    "proud pure purple quiet random rare raw ready real recent regular rich rough round "
    "royal sad safe senior serious sharp sick silent single smart smooth soft solid sour special "
    "square stable strange strict strong sudden sweet tall temporary thick thin tight tiny tired "
    "ugly unique urban urgent useful usual valid virtual weak wide wild wise wooden wrong young"
).split()
# Base form and third person, as descriptions use them.
VERBS = tuple(
    pair.split("/")
    for pair in (
        "get/gets find/finds fetch/fetches show/shows list/lists count/counts check/checks "
        "search/searches read/reads load/loads open/opens close/closes start/starts stop/stops "
        "create/creates make/makes build/builds add/adds update/updates "
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
    "target source quality volume brightness angle zoom page offset step rate score currency "
    "symbol account plan room floor seat table guest passenger driver vehicle model brand "
    "material shape flavor topic genre artist album season episode channel group team age airline "
    "airport amenity area attempt audience bank bedroom birthday branch budget building bus "
    "calendar campaign capacity cause chapter class client company condition contact content "
    "contract cuisine customer deadline delay delivery department description destination device "
    "diet difficulty direction discount distance district doctor edition employee engine entry "
    "error event exchange field filter flight font fuel function gender goal grade hotel image "
    "industry ingredient interest interval invoice item job lane layer license line link login "
    "manager margin market max_price method min_score movie music nationality note number option "
    "order origin output parcel parent payment percent period person pin platform player position "
    "post product profile project property province purpose quantity question quote radius range "
    "ratio recipe reference request resolution role route row rule salary sample schedule school "
    "section sector seller sensor serial server service session shift skill song sort_by speaker "
    "stage star state station store supplier task tax term theme threshold ticket timeout "
    "timezone token tone track train trip username vendor venue view visitor voice week "
    "weather website weekday window word zone"
).split()
FLAGS = (
    "verbose recursive urgent silent public private archived hidden cached compressed encrypted "
    "notify repeat force strict safe fast preview draft shared pinned muted signed tracked gift "
    "insurance breakfast parking refund newsletter captions shuffle loop dry_run overwrite "
    "include_tax include_images case_sensitive read_only auto_renew send_copy keep_alive active "
    "anonymous available blocked confirmed critical debug default quiet editable enabled "
    "express featured final flexible flagged free global gluten_free hd important indexed instant "
    "international locked mandatory mobile optional paid permanent protected refundable remote "
    "required secure sorted sticky subscribed synchronous temporary unique unread vegan verified "
    "visible with_pictures with_lunch allow_pets auto_save skip_errors"
).split()
RESULT_KEYS = (
    "status result total balance temperature humidity price count level score distance duration "
    "owner code state position version capacity rating delay speed weight color title room gate "
    "number reference winner location size address queue pressure altitude voltage age amount "
    "average battery brand city cost country currency date day deadline department depth "
    "destination discount email error fee frequency gender grade height hour id income index "
    "language latitude length limit longitude message mode model month name note offset operator "
    "order origin output percent period phone place point population profit progress quality "
    "quantity rank rate ratio reason region revenue role salary seat source stage stock street "
    "subject sum target tax time track type unit usage user vendor volume wind year"
).split()
ATTRIBUTES = (
    "access code|phone number|favorite color|home town|locker number|best friend|seat number|"
    "secret word|birth year|badge number|room number|pet name|order number|project name|"
    "account number|street name|ticket number|team name|car brand|lucky number|desk number|"
    "main hobby|first job|middle name|flight number|parking spot|shoe size|email name"
).split("|")

# Words that sentence frames consist of, apart from the fields. Training frames have some of them
# exchanged, left out or added, so that the model does not depend on known sentences.
_COMMON = (
    "a an the this that these to of is are be was it its in on at by as for from with and or so "
    "then now just only also please can could would will should must may might shall i you we "
    "they me us my your our their want wants wanted need needs have has had do does did let "
    "like take put use set give given choose pick keep boss friend today here there if when "
    "because using where which what how some any every all each more very really simply kindly "
    "quickly again help goes going ought able sure yes well okay hello hey thanks dear about "
    "into onto over called named equal being good right whole thing case way want ask asked "
    "tell know see choice picks assigned value values wish"
).split()
_MEANT = {
    *NOUNS,
    *ADJECTIVES,
    *PARAMETERS,
    *RESULT_KEYS,
    *(word for verb in VERBS for word in verb),
}
_IN_FRAMES = " ".join((
    *frames.OPENERS, *frames.CLOSERS, *frames.REQUESTS, *frames.PARAMETERS_FIRST,
    *frames.PARAMETERS, *frames.DESCRIPTIONS, *frames.DESCRIPTION_ENDS,
)).lower().translate(str.maketrans(".,:;!?", "      ")).split()  # fmt: skip
FILLERS = tuple(
    word for word in dict.fromkeys((*_COMMON, *_IN_FRAMES)) if word.isalpha() and word not in _MEANT
)

_ONSETS = (
    "b br d dr f fl g gl gr h j k kl kr l m n p pl pr qu r s st t tr v w y z zh sh ch th".split()
)
_VOWELS = "a e i o u ai ea ee io oa ou".split()
_CODAS = "b d g k l ll m n nd nt p r rk rn rt s sk st t v x z".split() + [""] * 12
_LETTERS = "eeeeeeaaaaaiiiiooootttttnnnnssssrrrrllldddcccuummpphhggbbffyywwkvxzjq"


# The words of frames are never values or parts of values.
_NO_VALUES = frozenset((*FILLERS, *_IN_FRAMES, *_COMMON))


def _is_held_out(word: str) -> bool:
    return zlib.crc32(word.encode()) % 8 == 0


_KNOWN = tuple(
    word
    for word in dict.fromkeys((*NOUNS, *ADJECTIVES, *PARAMETERS, *RESULT_KEYS))
    if not _is_held_out(word)
)
_VALUES = tuple(word for word in NOUNS if word not in _NO_VALUES)


class Source:
    """Random choices for one dialogue, all from one side of the split.

    Items are words, names and sentence frames. A word belongs to evaluation by its checksum (one
    word in eight), a frame if it is in the last fifth of its list. So the model cannot have
    memorised what evaluation asks.
    """

    def __init__(
        self, seed: int | str, held_out: bool = False, frames_held_out: bool | None = None
    ) -> None:
        """`held_out` is the side of the words, and of the frames unless `frames_held_out` says
        otherwise."""
        self.rng = random.Random(f"{seed}-{held_out}")
        self.held_out = held_out
        self.frames_held_out = held_out if frames_held_out is None else frames_held_out

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
        if self.frames_held_out:
            return self.rng.choice(frames[cut:])
        frame = self.rng.choice(frames[:cut])
        return self._loosened(frame) if self.chance(0.35) else frame

    def word(self, words: Sequence[str]) -> str:
        """A word of the list that belongs to this side."""
        return self._of_this_side(lambda: self.rng.choice(words))

    def pseudo_word(self) -> str:
        """A lower-case invented word: syllables, parts of known words, or letters."""
        kind = self.rng.random()
        make = self._syllables if kind < 0.4 else self._parts if kind < 0.85 else self._letters
        while (word := self._of_this_side(make)) in _NO_VALUES:
            pass
        return word

    def name(self) -> str:
        """A capitalised name."""
        return self.pseudo_word().capitalize()

    def noun(self) -> str:
        """A known noun or an invented word."""
        return self.word(_VALUES) if self.chance(0.3) else self.pseudo_word()

    def fillers(self, low: int, high: int, odd: float = 0.0) -> str:
        """`low` to `high` words without meaning for the task, each with a space before it. Each is
        an invented word with probability `odd`."""
        count = self.number(low, high)
        words = (
            self.pseudo_word() if self.chance(odd) else self.pick(FILLERS) for _ in range(count)
        )
        return "".join(f" {word}" for word in words)

    def digits(self, low: int, high: int) -> str:
        """A number of `low` to `high` digits as text. The first digit is not 0."""
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
        lead = " " if frame.startswith(" ") else ""
        for word in frame.removeprefix(" ").split(" "):
            if word.lower() in FILLERS:
                fate = self.rng.random()
                if fate < 0.25:
                    continue
                if fate < 0.65:
                    word = self.rng.choice(FILLERS)
            words.append(word)
        for _ in range(self.pick((0, 0, 1, 1, 2))):
            words.insert(self.number(0, len(words)), self.rng.choice(FILLERS))
        return lead + " ".join(words)

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

    def _of_this_side(self, make: Callable[[], str]) -> str:
        while True:
            word = make()
            if _is_held_out(word) == self.held_out:
                return word
