"""Values of arguments: how a request says them, and how the call has them.

`MAKERS` names the kinds of values that `intents.txt` uses. Half of the names are invented, so that
the model copies them and knows none by heart.
"""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from ..words import ADJECTIVES, NOUNS, VERBS, Source
from .grammar import expand


class Value(NamedTuple):
    """A value as a request says it, and as the call has it."""

    said: str
    value: Any


class Maker(NamedTuple):
    """A kind of values: their JSON schema and a function that makes one."""

    schema: dict[str, Any]
    make: Callable[[Source], Value]


CITIES = (
    "Amsterdam|Antwerp|Athens|Auckland|Baku|Bali|Baltimore|Bangkok|Barcelona|Basel|Beijing|Beirut|"
    "Belfast|Belgrade|Bern|Bogota|Bologna|Bonn|Bordeaux|Bremen|Brisbane|Bristol|Brussels|Bucharest|"
    "Budapest|Buenos Aires|Calgary|Cape Town|Cardiff|Chicago|Cologne|Copenhagen|Cordoba|Dakar|"
    "Damascus|Darwin|Delhi|Detroit|Doha|Dortmund|Dresden|Dubai|Dubrovnik|Edinburgh|Essen|Florence|"
    "Frankfurt|Gdansk|Geneva|Genoa|Glasgow|Granada|Hanoi|Hanover|Havana|Helsinki|Hong Kong|Houston|"
    "Istanbul|Jakarta|Jena|Kabul|Karachi|Kathmandu|Kiel|Krakow|Lagos|Las Vegas|Leeds|Leipzig|"
    "Liverpool|Ljubljana|Lodz|Los Angeles|Lucerne|Lublin|Luxembourg|Malaga|Malmo|Manchester|Manila|"
    "Marseille|Melbourne|Memphis|Mexico City|Milan|Minsk|Montreal|Moscow|Mumbai|Munich|Nairobi|"
    "Naples|Nashville|New Orleans|New York|Nuremberg|Oakland|Orlando|Osaka|Ottawa|Oxford|Palermo|"
    "Paris|Perth|Philadelphia|Pisa|Portland|Prague|Quebec|Riga|Rio de Janeiro|Rome|Rotterdam|"
    "San Diego|San Francisco|Santiago|Sarajevo|Seoul|Shanghai|Singapore|Sofia|Split|Stockholm|"
    "Stuttgart|Sydney|Taipei|Tallinn|Tampa|Tbilisi|Tehran|Tirana|Tunis|Turin|Utrecht|Valencia|"
    "Vancouver|Venice|Verona|Vilnius|Warsaw|Washington|Wellington|Wuhan|York|Zagreb|Zurich"
).split("|")
_FOREIGN = (
    "Málaga|Köln|Zürich|Łódź|Kraków|Bogotá|Brasília|Tromsø|Århus|Québec|Orléans|Düsseldorf|Medellín|"
    "İzmir|Reims|Besançon|Nîmes|東京|北京|上海|Москва|Київ|Αθήνα|서울|القاهرة|Malmö|Göteborg|Perón|Ærø"
).split("|")
_PEOPLE = (
    "Alice|Amir|Andrea|Ben|Carla|Chen|Clara|Daniel|Diana|Elena|Emil|Erik|Fatima|Felix|Frank|George|"
    "Grace|Hannah|Hugo|Ivan|Jack|James|Jana|Julia|Karim|Kate|Laura|Leo|Linda|Lucas|Maria|Marta|Max|"
    "Mei|Mia|Nadia|Nina|Noah|Olga|Oscar|Paul|Peter|Raj|Rosa|Ruth|Sam|Sara|Simon|Sofia|Tara|Theo|"
    "Tina|Viktor|Yuki|Zoe|mom|dad|my boss|my sister|grandma|the team|Dr. Weber|Mr. Brown"
).split("|")
_CURRENCIES = {
    "USD": "dollars|dollar|us dollars|bucks|$|USD|usd", "EUR": "euros|euro|EUR|eur|€",
    "GBP": "pounds|british pounds|GBP|gbp", "JPY": "yen|JPY|japanese yen",
    "CHF": "swiss francs|francs|CHF", "SEK": "swedish krona|SEK", "INR": "rupees|INR",
    "CNY": "yuan|CNY", "CAD": "canadian dollars|CAD", "AUD": "australian dollars|AUD",
    "PLN": "zloty|PLN", "NOK": "norwegian kroner|NOK", "MXN": "mexican pesos|MXN", "BRL": "BRL",
    "TRY": "turkish lira|TRY", "KRW": "won|KRW", "ZAR": "rand|ZAR", "DKK": "DKK", "CZK": "CZK",
}  # fmt: skip
_LANGUAGES = (
    "French German Spanish Italian Japanese Chinese Korean Russian Arabic Hindi Polish Dutch "
    "Swedish Greek Turkish Portuguese Czech Danish Finnish Hebrew Thai Latin Welsh"
).split()
_ROOMS = (
    "kitchen|bedroom|living room|bathroom|hallway|office|garage|basement|attic|dining room|garden|"
    "kids room|guest room|balcony|studio|cellar|terrace|corridor|library|workshop"
).split("|")
_FOODS = (
    "milk eggs bread butter apples bananas rice coffee tea sugar salt flour cheese tomatoes onions "
    "garlic pasta chicken beans potatoes lemons honey yogurt spinach carrots soap batteries paper"
).split()
_TOPPINGS = (
    "mushrooms|ham|salami|onions|peppers|spinach|corn|tuna|pineapple|extra cheese|basil|chili|"
    "tomatoes|garlic|bacon|capers|anchovies|broccoli"
).split("|")
_CUISINES = "italian mexican indian chinese japanese thai greek vegan turkish korean french".split()
_DISHES = (
    "pancakes|lentil soup|apple pie|tomato sauce|fried rice|pad thai|goulash|ramen|chili|risotto|"
    "banana bread|potato salad|curry|tacos|waffles|onion soup|cheesecake|falafel"
).split("|")
_ZONES = (
    "Europe/London Europe/Berlin Europe/Madrid Europe/Oslo America/New_York America/Chicago "
    "America/Denver America/Sao_Paulo Asia/Seoul Asia/Dubai Asia/Kolkata Australia/Sydney UTC "
    "Africa/Cairo Asia/Singapore Pacific/Auckland"
).split()
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_SUFFIXES = "py js ts md txt json yaml toml csv html css go rs java c h sh log cfg ini sql".split()
_FOLDERS = (
    "src lib app tests docs data config scripts utils core api models static build bin tmp home var "
    "etc project server client assets tools internal pkg"
).split()
_COMMANDS = (
    "ls[| -l| -a| -lh] [{d}|]|cat {p}|git [status|diff|log --oneline|pull|stash|fetch|push]|"
    "python[|3] {p}|npm [test|run build|run lint|ci]|make [test|build|clean|{n}]|pwd|whoami|date|"
    "rm {p}|mkdir {d}|cp {p} {d}|du -sh {d}|tail -n {i} {p}|head {p}|wc -l {p}|cargo [test|build]|"
    "go test ./...|docker ps|echo {n}|pip install {n}|kubectl get pods|uptime|ps aux|df|free -m|"
    "ruff check {d}|pytest {p}|curl http://{n}.local/{n}|chmod +x {p}|touch {p}|git checkout {n}"
)
_SENTENCES = (
    "the {n} is [ready|{a}|late|done|broken|here]|[I'm|I am] [on my way|running late|at the {n}|"
    "almost there|at home|in the {n}]|[we|they] need [a|the|another] {n}|the {n} [starts|ends] at "
    "{i}|[can|could] you [bring|check|send me] the {n}?|[don't|do not] forget the {n}|see you "
    "[tomorrow|soon|at {i}|on {day}]|happy birthday|[your|the] {n} has arrived|"
    "please {v} the {n}|I {v} the {n} [today|on {day}]|[call|text] me [back|later]|good luck with "
    "the {n}|thanks for the {n}|the {n} costs {i} [euros|dollars]|dinner is at {i}|what about the "
    "{n}?|let's meet [at the {n}|on {day}|at {i}]|the {a} {n} [was|is] [great|{a}]|{name} will "
    "{v} the {n}|no {n} today|your code is {i}|I like your {n}|are you free on {day}?|the new {n} "
    "looks {a}|we are out of {n}"
)
_QUERIES = (
    "[best|cheap|new|{a}] {n} [in {c}|near {c}|for {n}|]|how to {v} [a|the] {n}|{n} [and|vs] {n}|"
    "{c} {n}|{name} {n}|history of {n}|what is [a|the] {n}|{a} {n} {i}|{n} prices|where to buy {n}|"
    "{n} tutorial|who invented {n}|{n} opening hours|{a} {n} reviews|{n}|{n} {n}"
)
_TITLES = (
    "{n} [meeting|review|call|workshop|lunch|training|planning]|[meeting|lunch|call|dinner] with "
    "{name}|{A} {n}|{n} with the team|[visit|pick up|drop off] {name}|{N} {n}|{name}'s birthday|yoga|"
    "standup|haircut|interview|doctor|parents evening|{v} the {n}|{n}"
)
_PROBLEMS = (
    "{n} [is broken|does not work|crashes|page is down|is slow|missing|shows wrong {n}]|cannot {v} "
    "the {n}|{a} {n} after update|error when [we|users] {v} [the|] {n}|{N} button {a}|wrong {n} in "
    "{n}|add {n} to the {n}|{v} {n}"
)
_TASKS = (
    "{v} the {n}|call {name}|buy {food}|[pay|send|check] the {n}|{v} [my|the] {a} {n}|visit {name}|"
    "pick up {name}|take the {n}|write to {name}|clean the {room}|{v} {n}|feed the {n}"
)
_SQL = (
    "SELECT * FROM {n}|SELECT {n} FROM {n} WHERE {n} = {i}|SELECT COUNT(*) FROM {n}|SELECT {n}, {n} "
    "FROM {n} LIMIT {i}|SELECT {n} FROM {n} ORDER BY {n}|SELECT AVG({n}) FROM {n}"
)
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()


def _cased(s: Source, text: str) -> str:
    return text.lower() if s.chance(0.22) else text


def _city(s: Source) -> str:
    kind = s.number(0, 19)
    if kind < 11:
        return _cased(s, s.word(CITIES))
    if kind == 11:
        return s.pick(_FOREIGN)
    if kind == 12:
        return f"{s.name()} {s.name()}"
    return _cased(s, s.name())


def _person(s: Source) -> str:
    return s.word(_PEOPLE) if s.chance(0.5) else _cased(s, s.name())


def _full_name(s: Source) -> str:
    return f"{_person(s) if s.chance(0.3) else s.name()} {s.name()}"


def filled(s: Source, rule: str) -> str:
    """A text of the rule with words in its fields."""
    text = expand(s.rng, f"[{rule}]")
    while "{" in text:
        field = text[text.index("{") : text.index("}") + 1]
        text = text.replace(field, _FIELDS[field[1:-1]](s), 1)
    return text


_FIELDS: dict[str, Callable[[Source], str]] = {
    "n": lambda s: s.pick(NOUNS) if s.chance(0.75) else s.pseudo_word(),
    "N": lambda s: s.pick(NOUNS).capitalize(),
    "a": lambda s: s.pick(ADJECTIVES),
    "A": lambda s: s.pick(ADJECTIVES).capitalize(),
    "v": lambda s: s.pick(VERBS)[0],
    "i": lambda s: s.digits(1, 3),
    "c": _city,
    "name": _person,
    "city": _city,
    "full": _full_name,
    "day": lambda s: s.pick(_DAYS),
    "food": lambda s: s.pick(_FOODS),
    "room": lambda s: s.pick(_ROOMS),
    "p": lambda s: _path(s),
    "d": lambda s: _folder(s),
}


def _path(s: Source) -> str:
    name = s.noun() if s.chance(0.6) else f"{s.noun()}{s.pick('_-.')}{s.noun()}"
    if s.chance(0.1):
        name = name.upper()
    file = f"{name}.{s.pick(_SUFFIXES)}" if s.chance(0.93) else name.upper()
    folders = "/".join(
        s.word(_FOLDERS) if s.chance(0.6) else s.noun() for _ in range(s.number(0, 3))
    )
    root = s.pick(("", "", "", "/", "./", "~/")) if folders else ""
    return f"{root}{folders}/{file}" if folders else file


def _folder(s: Source) -> str:
    folders = "/".join(
        s.word(_FOLDERS) if s.chance(0.5) else s.noun() for _ in range(s.number(1, 3))
    )
    return f"{s.pick(('', '', '', '/', './'))}{folders}{s.pick(('', '', '/'))}"


def _email(s: Source) -> str:
    name = (
        s.pseudo_word() if s.chance(0.6) else f"{s.pseudo_word()}{s.pick('._-')}{s.pseudo_word()}"
    )
    host = s.pick(("gmail", "example", "mail", "acme")) if s.chance(0.3) else s.pseudo_word()
    return f"{name}@{host}.{s.pick(('com', 'org', 'net', 'de', 'io', 'co.uk', 'fr'))}"


def _date(s: Source) -> str:
    return f"{s.number(2024, 2029)}-{s.number(1, 12):02}-{s.number(1, 28):02}"


def _day(s: Source) -> str:
    days = ("tomorrow", "today", "tonight", "next week", "tomorrow morning", "this weekend")
    day = s.pick((*days, *_DAYS))
    return day if s.chance(0.8) else f"next {s.pick(_DAYS)}"


def _when(s: Source) -> str:
    kind = s.number(0, 3)
    if kind == 0:
        return f"at {s.number(1, 12)}{s.pick(('am', 'pm', ' pm', ' o clock'))}"
    if kind == 1:
        return f"in {s.number(2, 59)} {s.pick(('minutes', 'hours', 'days'))}"
    return _day(s) if kind == 2 else f"{_day(s)} at {_clock(s)}"


def _clock(s: Source) -> str:
    return f"{s.number(0, 23):02}:{s.pick((0, 0, 15, 30, 45, s.number(0, 59))):02}"


def _code(s: Source) -> str:
    letters = "".join(s.pick("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(s.number(1, 4)))
    kind = s.number(0, 5)
    if kind == 0:
        return s.digits(3, 8)
    if kind == 1:
        return f"{letters}{s.digits(2, 9)}"
    if kind == 2:
        return f"{s.noun()}_{s.digits(1, 5)}"
    if kind == 3:
        return f"#{s.digits(2, 5)}"
    return f"{letters}-{s.digits(1, 5)}"


def _ticker(s: Source) -> str:
    known = (
        "AAPL MSFT GOOG AMZN TSLA NVDA META NFLX IBM INTC AMD ORCL SAP SONY NKE KO DIS BA".split()
    )
    if s.chance(0.4):
        return s.pick(known)
    return "".join(s.pick("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(s.number(2, 5)))


def _whole(low: int, high: int) -> Callable[[Source], Value]:
    def make(s: Source) -> Value:
        number = s.number(low, high)
        spoken = number < len(_NUMBER_WORDS) and s.chance(0.15)
        return Value(_NUMBER_WORDS[number] if spoken else str(number), number)

    return make


def _amount(s: Source) -> Value:
    kind = s.number(0, 3)
    if kind == 0:
        number: float = s.number(1, 9999) / 100
        return Value(f"{number:.2f}", number)
    if kind == 1:
        number = s.number(1, 999) / 10
        return Value(str(number), number)
    whole = s.number(1, 99) if kind == 2 else s.pick((50, 100, 200, 250, 500, 1000, 1500, 20000))
    return Value(str(whole), whole)


def _currency(s: Source) -> Value:
    code = s.pick(tuple(_CURRENCIES))
    return Value(s.pick([*_CURRENCIES[code].split("|"), code, code]).replace("$", "dollars"), code)


def _expression(s: Source) -> str:
    left, sign, right = s.digits(1, 5), s.pick("+-*/"), s.digits(1, 4)
    text = f"{left} {sign} {right}" if s.chance(0.6) else f"{left}{sign}{right}"
    return f"({text}) {s.pick('+-*/')} {s.digits(1, 2)}" if s.chance(0.2) else text


def _quoted(make: Callable[[Source], str]) -> Callable[[Source], Value]:
    """Values that a request mostly puts into quotation marks."""

    def made(s: Source) -> Value:
        text = _cased(s, make(s))
        marks = s.pick(("{}", "{}", '"{}"', '"{}"', "'{}'", "“{}”"))
        if "'" in text and marks == "'{}'":
            marks = '"{}"'
        return Value(marks.format(text), text)

    return made


def _items(make: Callable[[Source], str]) -> Callable[[Source], Value]:
    def made(s: Source) -> Value:
        items = s.sample(lambda: make(s), s.number(1, 4))
        listed = items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
        return Value(listed if s.chance(0.8) else ", ".join(items), items)

    return made


def _contents(s: Source) -> str:
    kind = s.number(0, 3)
    if kind == 0:
        return filled(s, _SENTENCES)
    if kind == 1:
        return f"print({s.digits(1, 3)})" if s.chance(0.5) else f"{s.noun()} = {s.digits(1, 3)}"
    return filled(s, _TASKS) if kind == 2 else f"{s.noun()} {s.noun()}"


def _plain(make: Callable[[Source], str]) -> Callable[[Source], Value]:
    def made(s: Source) -> Value:
        text = make(s)
        return Value(text, text)

    return made


def _text(make: Callable[[Source], str], quoted: bool = False) -> Maker:
    return Maker({"type": "string"}, _quoted(make) if quoted else _plain(make))


def _listed(*texts: str) -> Callable[[Source], str]:
    return lambda s: s.pick(texts) if s.chance(0.8) else s.noun()


MAKERS: dict[str, Maker] = {
    "city": _text(_city),
    "address": _text(
        lambda s: f"{s.number(1, 250)} {s.name()} {s.pick(('Street', 'Road', 'Ave'))}"
    ),
    "person": _text(_person),
    "full_name": _text(_full_name),
    "email": _text(_email),
    "subject": _text(lambda s: filled(s, _TITLES), quoted=True),
    "sentence": _text(lambda s: filled(s, _SENTENCES), quoted=True),
    "query": _text(lambda s: filled(s, _QUERIES), quoted=True),
    "title": _text(lambda s: filled(s, _TITLES), quoted=True),
    "problem": _text(lambda s: filled(s, _PROBLEMS), quoted=True),
    "task": _text(lambda s: filled(s, _TASKS)),
    "path": _text(_path),
    "folder": _text(_folder),
    "contents": _text(_contents, quoted=True),
    "pattern": _text(
        lambda s: s.noun() if s.chance(0.5) else f"{s.noun()}_{s.noun()}", quoted=True
    ),
    "command": Maker(
        {"type": "string"},
        lambda s: (lambda text: Value(s.pick(("{}", "`{}`", "'{}'")).format(text), text))(
            filled(s, _COMMANDS).strip()
        ),
    ),
    "date": _text(_date),
    "day": _text(_day),
    "when": _text(_when),
    "clock": _text(_clock),
    "minutes": Maker({"type": "integer"}, _whole(1, 90)),
    "few": Maker({"type": "integer"}, _whole(1, 12)),
    "percent": Maker({"type": "integer"}, _whole(1, 100)),
    "number": Maker({"type": "integer"}, _whole(1, 9999)),
    "amount": Maker({"type": "number"}, _amount),
    "degrees": Maker({"type": "number"}, _whole(10, 30)),
    "currency": Maker({"type": "string"}, _currency),
    "ticker": _text(_ticker),
    "code": _text(_code),
    "language": _text(_listed(*_LANGUAGES)),
    "room": _text(lambda s: s.word(_ROOMS) if s.chance(0.75) else s.noun()),
    "food": _text(_listed(*_FOODS)),
    "toppings": Maker({"type": "array", "items": {"type": "string"}}, _items(_listed(*_TOPPINGS))),
    "foods": Maker({"type": "array", "items": {"type": "string"}}, _items(_listed(*_FOODS))),
    "people": Maker({"type": "array", "items": {"type": "string"}}, _items(_person)),
    "cuisine": _text(_listed(*_CUISINES)),
    "dish": _text(_listed(*_DISHES)),
    "zone": _text(lambda s: s.word(_ZONES)),
    "word": _text(lambda s: s.noun(), quoted=True),
    "topic": _text(lambda s: s.noun() if s.chance(0.5) else f"{s.word(ADJECTIVES)} {s.noun()}"),
    "expression": _text(_expression),
    "sql": _text(lambda s: filled(s, _SQL)),
    "phone": _text(
        lambda s: f"{s.pick(('+', '0', ''))}{s.digits(2, 3)}{s.pick(' -')}{s.digits(4, 7)}"
    ),
    "service": _text(lambda s: s.noun() if s.chance(0.6) else f"{s.noun()}-{s.noun()}"),
    "host": _text(lambda s: f"{s.noun()}-{s.number(1, 40):02}"),
    "channel": _text(lambda s: f"#{s.noun()}"),
    "branch": _text(lambda s: f"{s.pick(('feature/', 'fix/', '', ''))}{s.noun()}-{s.noun()}"),
    "version": _text(
        lambda s: f"{s.pick(('v', ''))}{s.number(0, 9)}.{s.number(0, 30)}.{s.number(0, 9)}"
    ),
    "url": _text(lambda s: f"https://{s.noun()}.{s.pick(('com', 'org', 'io'))}/{s.noun()}"),
    "artist": _text(lambda s: _full_name(s) if s.chance(0.6) else f"The {s.noun().capitalize()}s"),
    "song": _text(lambda s: f"{s.word(ADJECTIVES)} {s.noun()}".title(), quoted=True),
    "contact": Maker(
        {
            "type": "object",
            "properties": {"name": {"type": "string"}, "email": {"type": "string"}},
            "required": ["name", "email"],
        },
        lambda s: (
            lambda name, mail: Value(f"name {name}, email {mail}", {"name": name, "email": mail})
        )(_full_name(s), _email(s)),
    ),
}


def enum(names: list[str]) -> Maker:
    """One of the names."""
    return Maker({"type": "string", "enum": names}, _plain(lambda s: s.pick(names)))


def as_text(value: Any) -> str:
    """A value as an answer says it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
