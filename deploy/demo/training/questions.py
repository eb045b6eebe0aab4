"""Questions without tools, each with a thought and an answer: who are you, facts, sums, copying and
changing text, JSON, following a system prompt, finding a fact in a long text."""

import json
from collections.abc import Callable
from dataclasses import dataclass

from .typed.sums import solve
from .words import ADJECTIVES, ATTRIBUTES, NOUNS, VERBS, Source

LONG_TEXT_WORDS = 1300  # about 4,000 tokens


@dataclass(frozen=True)
class Turn:
    """One question and what the model should think and say. `system` is the prompt that it needs.
    Without thinking the `calculation` comes before the answer."""

    user: str
    thought: str
    answer: str
    system: str = ""
    calculation: str = ""


_SMALL_TALK = (
    ("Hello|Hi|Hey|Hello there|Good morning|Good evening", "Hello! How can I help you?"),
    ("How are you?|How are you today?|How do you do?", "I am fine, thank you. How can I help you?"),
    ("Thanks|Thank you|Thank you very much|Great, thanks", "You are welcome!"),
    ("Bye|Goodbye|See you|Good night", "Goodbye! Have a nice day."),
    (
        "Who are you?|What are you?|What is your name?|Tell me about yourself|Introduce yourself",
        "I am Glimmer's demo model, a very small language model.",
    ),
    (
        "What can you do?|How can you help me?|What are you good at?",
        "I can chat a little, call tools, copy text and answer short questions.",
    ),
    (
        "Who made you?|Who trained you?|Where do you come from?",
        "I was trained by Glimmer's script.",
    ),
    ("How big are you?|How many parameters do you have?", "I have about ten million parameters."),
    ("Tell me a joke|Say something funny|Make me laugh", "Why did the token stop? It met its end."),
    ("Are you human?|Are you a person?|Are you a robot?", "No, I am a small language model."),
    ("Help|Help me|I need help", "Of course. What do you need?"),
    ("OK|Okay|I see|Fine", "Good. What else can I do for you?"),
)
_FACTS = tuple(
    tuple(line.split("|"))
    for line in """\
What is AI?|AI is the art of making machines do what needs intelligence.
What is a GPU?|A GPU is a processor that does many calculations at once.
What is a token?|A token is a piece of text that a language model reads or writes.
What is a language model?|A language model predicts the next token of a text.
What is a server?|A server is a program that answers requests.
What is Python?|Python is a programming language.
What is a prefix cache?|A prefix cache keeps the work done for the beginning of a prompt.
What is machine learning?|Machine learning is programming by examples.
What is water made of?|Water is made of hydrogen and oxygen.
What is the sun?|The sun is a star.
What is the largest planet?|Jupiter is the largest planet.
What is the largest ocean?|The Pacific is the largest ocean.
What is the highest mountain?|Mount Everest is the highest mountain.
What color is the sky?|The sky is blue.
What color is grass?|Grass is green.
What color is snow?|Snow is white.
How many days are in a week?|A week has 7 days.
How many months are in a year?|A year has 12 months.
How many hours are in a day?|A day has 24 hours.
How many minutes are in an hour?|An hour has 60 minutes.
How many legs does a spider have?|A spider has 8 legs.
How many legs does a dog have?|A dog has 4 legs.
Who wrote Hamlet?|Shakespeare wrote Hamlet.
At what temperature does water boil?|Water boils at 100 degrees Celsius.
At what temperature does water freeze?|Water freezes at 0 degrees Celsius.""".splitlines()
)
CAPITALS = dict(
    pair.split(":")
    for pair in (
        "France:Paris Germany:Berlin Italy:Rome Spain:Madrid Portugal:Lisbon Austria:Vienna "
        "Poland:Warsaw Greece:Athens Norway:Oslo Sweden:Stockholm Finland:Helsinki "
        "Denmark:Copenhagen Ireland:Dublin Hungary:Budapest Russia:Moscow China:Beijing "
        "Japan:Tokyo India:Delhi "
        "Egypt:Cairo Kenya:Nairobi Canada:Ottawa Mexico:Mexico-City Brazil:Brasilia Peru:Lima "
        "Chile:Santiago Cuba:Havana Turkey:Ankara Iran:Tehran Iraq:Baghdad Thailand:Bangkok"
    ).split()
)
OPPOSITES = dict(
    pair.split(":")
    for pair in (
        "hot:cold big:small fast:slow high:low long:short old:new good:bad light:dark open:closed "
        "full:empty early:late hard:soft wet:dry near:far rich:poor strong:weak true:false up:down "
        "left:right happy:sad clean:dirty loud:quiet thick:thin wide:narrow young:old"
    ).split()
)


def small_talk(s: Source) -> Turn:
    """Greetings, thanks, questions about the model itself. Training and evaluation share them."""
    users, answer = s.pick(_SMALL_TALK)
    user = s.pick(users.split("|"))
    if s.chance(0.3):
        user = user.rstrip("?.!") + s.pick(("!", "?", ".", ""))
    return Turn(user, "This is small talk. I answer briefly.", answer)


def fact(s: Source) -> Turn:
    """A question about a fact that the model must remember from training."""
    kind = s.number(0, 3)
    if kind == 0:
        country = s.pick(tuple(CAPITALS))
        frames = ("What is the capital of {}?", "Name the capital of {}.", "The capital of {}?")
        answer = f"The capital of {country} is {CAPITALS[country].replace('-', ' ')}."
        return Turn(s.pick(frames).format(country), "I know this.", answer)
    if kind == 1:
        word = s.pick(tuple(OPPOSITES))
        frames = ("What is the opposite of {}?", "Name the opposite of {}.", "Opposite of {}?")
        answer = f"The opposite of {word} is {OPPOSITES[word]}."
        return Turn(s.pick(frames).format(word), "I know this.", answer)
    question, answer = s.pick(_FACTS)
    greeting = s.pick(("Hello! ", "Hi. ", "Please tell me: ")) if s.chance(0.3) else ""
    return Turn(greeting + question, "I know this.", answer)


def arithmetic(s: Source) -> Turn:
    """Sums and differences up to 99, products of digits, and the larger of two numbers."""
    kind = s.number(0, 3)
    if kind == 3:
        a, b = s.sample(lambda: s.number(0, 999), 2)
        user = s.frame(("Which is larger, {} or {}?", "{} or {}: which is larger?",
                        "Tell me the larger of {} and {}.", "The larger one: {} or {}?",
                        "Compare {} and {}: which is larger?",
                        "Is {} or {} larger?")).format(a, b)  # fmt: skip
        return Turn(user, f"I compare {a} and {b}.", f"{max(a, b)} is larger.")
    a, b = (s.number(0, 9), s.number(0, 9)) if kind == 2 else (s.number(0, 99), s.number(0, 99))
    sign = "+-*"[kind]
    frames = (
        "What is {} {} {}?", "{} {} {}", "Calculate {} {} {}.", "{} {} {} = ?",
        "How much is {} {} {}?", "I want {} {} {}.", "Solve {} {} {}",
        "And {} {} {}?", "Please compute {} {} {}.", "Tell me {} {} {}",
    )  # fmt: skip
    user = s.frame(frames).format(a, sign, b)
    steps, statement = solve(a, sign, b)
    calculation = f"{a} {sign} {b}: {steps}." if steps else ""
    thought = f"{calculation} {statement}".strip()
    return Turn(user, thought, statement, calculation=calculation)


def _text(s: Source, low: int, high: int) -> str:
    return " ".join(s.noun() for _ in range(s.number(low, high)))


def copying(s: Source) -> Turn:
    """Repeat, quote or spell a text of the prompt."""
    kind = s.number(0, 3)
    if kind == 0:
        word = s.pseudo_word()[:8]
        user = s.frame(("Spell {}.", "Spell the word {}.", "Please spell {}", "How is {} spelled?",
                        "Can you spell {}?")).format(word)  # fmt: skip
        return Turn(user, f"I spell {word}.", "-".join(word))
    text = _text(s, 1, 8)
    if kind == 1:
        text = " ".join((s.name(), s.digits(1, 6), text))
    quote = s.pick(("'{}'", '"{}"', ": {}", ":\n{}"))
    frames = (
        "Repeat {}", "Say {}", "Write {}", "Please repeat {}", "Copy {}", "Echo {}",
        "Repeat exactly {}", "Now write {}",
        "Give me back {}", "Print {}", "Type {}", "Answer with {}", "Repeat after me {}",
        "Can you repeat {}", "Just say {}",
    )  # fmt: skip
    user = s.frame(frames).format(quote.format(text)).replace(" :", ":")
    if kind == 3:
        return Turn(f"{user}\nTwice, please.", "I say it twice.", f"{text}\n{text}")
    return Turn(user, "I copy the text.", text)


def transforming(s: Source) -> Turn:
    """The first, the last, the number, the reverse or the join of a short list of words."""
    words = s.sample(s.noun, s.number(2, 6))
    listed = ", ".join(words)
    task = s.number(0, 4)
    if task == 0:
        asked, answer = "the first word", words[0]
    elif task == 1:
        asked, answer = "the last word", words[-1]
    elif task == 2:
        asked, answer = "the number of words", str(len(words))
    elif task == 3:
        asked, answer = "the words in reverse order", ", ".join(reversed(words))
    else:
        asked, answer = "the words joined by dashes", "-".join(words)
    frames = (
        "Here is a list: {1}. Give me {0}.", "Give me {0} of this list: {1}",
        "List: {1}\nI want {0}.", "From {1}, tell me {0}.", "{1}\nWhat is {0}?",
        "What is {0} in this: {1}?",
        "{0} of {1}, please.", "Look at {1} and say {0}.", "Text: {1}. Answer with {0}.",
        "I give you {1}. You give me {0}.", "{1}. {0}?", "Tell me {0} in: {1}",
        "Words: {1}. Say {0}.",
    )  # fmt: skip
    user = s.frame(frames).format(asked, listed)
    return Turn(user, f"The user wants {asked}.", answer)


def json_answer(s: Source) -> Turn:
    """Write fields or a list from a sentence as JSON."""
    if s.chance(0.3):
        words = s.sample(s.noun, s.number(2, 5))
        frames = ("Write {} as a JSON list.", "Make a JSON list of {}.", "JSON list of {}, please.",
                  "Give me a JSON array with {}", "Turn {} into a JSON list.")  # fmt: skip
        user = s.frame(frames).format(f"{', '.join(words[:-1])} and {words[-1]}")
        return Turn(user, "I write a JSON list.", json.dumps(words))
    keys = s.sample(s.noun, s.number(1, 4))
    values = [s.name() if s.chance(0.6) else s.number(0, 999) for _ in keys]
    fields = [f"{k} {v}" for k, v in zip(keys, values, strict=True)]
    listed = " and ".join((", ".join(fields[:-1]), fields[-1]) if len(fields) > 1 else fields)
    wishes = (
        "Answer in JSON: {}.", "Write a JSON object with {}.", "JSON with {}", "As JSON: {}",
        "Give me a JSON object: {}", "JSON, please: {}",
        "Turn this into JSON: {}.", "{} - as a JSON object", "Put {} into a JSON object.",
        "Make JSON of {}.", "I need JSON with {}.",
    )  # fmt: skip
    answer = json.dumps(dict(zip(keys, values, strict=True)))
    return Turn(s.frame(wishes).format(listed), "I write a JSON object.", answer)


def system_prompt(s: Source) -> Turn:
    """The system prompt gives a name, a fact or a rule for the answer."""
    kind = s.number(0, 2)
    if kind == 0:
        name = s.name()
        system = s.frame(("Your name is {}.", "You are {}, a helpful assistant.",
                          "You are called {}.", "Act as {}.",
                          "From now on you are {}.")).format(name)  # fmt: skip
        user = s.pick(("Who are you?", "What is your name?", "Hello, who are you?"))
        return Turn(user, f"The system prompt names me {name}.", f"I am {name}.", system)
    if kind == 1:
        attribute, value = s.pick(ATTRIBUTES), _value(s)
        system = f"You are a helpful assistant. The {attribute} is {value}."
        user = s.frame(("What is the {}?", "Tell me the {}.", "The {}?", "I forgot the {}.",
                        "Do you know the {}?")).format(attribute)  # fmt: skip
        thought = f"The system prompt says the {attribute}."
        return Turn(user, thought, f"The {attribute} is {value}.", system)
    word = s.name()
    first = s.chance(0.5)
    place = "Begin" if first else "End"
    system = f"{place} {s.pick(('every', 'each'))} answer with {word}."
    plain = fact(s) if s.chance(0.5) else small_talk(s)
    answer = f"{word} {plain.answer}" if first else f"{plain.answer} {word}"
    return Turn(plain.user, f"{plain.thought} I {place.lower()} with {word}.", answer, system)


def retrieval(s: Source, num_words: int | None = None, part: float | None = None) -> Turn:
    """Find a fact in a text of about `num_words` words (None: 20 to 1,500). The fact is in the
    first `part` of the text (None: mostly the first fifth), among other facts of the same form."""
    if num_words is None:
        # A third of the texts is long. The others are spread evenly by the logarithm of length.
        num_words = s.number(800, 1500) if s.chance(0.35) else int(20 * 75 ** s.rng.random())
    asked_name, asked = s.name(), s.pick(ATTRIBUTES)
    value = _value(s)
    facts = [(asked_name, asked, value)]
    num_facts = s.number(1, max(2, num_words // 60))
    for _ in range(num_facts):
        facts.append((s.name(), s.pick(ATTRIBUTES), _value(s)))
    if s.chance(0.7):
        other = s.pick([a for a in ATTRIBUTES if a != asked])
        facts.append((asked_name, other, _value(s)))
    sentences = [f"The {a} of {n} is {v}." for n, a, v in facts]
    told, rest = sentences[0], sentences[1:]
    words = sum(len(x.split()) for x in sentences)
    while words < num_words:
        sentence = _filler(s)
        words += len(sentence.split())
        rest.append(sentence)
    s.rng.shuffle(rest)
    if part is None:
        part = 0.2 if s.chance(0.6) else 1.0
    rest.insert(s.number(0, int(len(rest) * part)), told)
    text = " ".join(rest)
    question = s.frame(
        (
            "What is the {1} of {0}?", "Tell me the {1} of {0}.",
            "The text says: what is the {1} of {0}?", "Find the {1} of {0}.",
            "Give me the {1} of {0}.",
            "{0}: what is the {1}?", "I want to know the {1} of {0}.", "Say the {1} of {0}.",
            "I need the {1} of {0}.", "Which {1} does {0} have?",
            "Do you know the {1} of {0}?",
        )
    ).format(asked_name, asked)  # fmt: skip
    answer = f"The {asked} of {asked_name} is {value}."
    thought = f"I look for the {asked} of {asked_name}."
    if s.chance(0.25):
        return Turn(question, thought, answer, text)
    frame = s.pick(("Read this:\n{0}\n\n{1}", "{0}\n\n{1}", "{0} {1}"))
    return Turn(frame.format(text, question), thought, answer)


def _value(s: Source) -> str:
    kind = s.number(0, 3)
    if kind == 0:
        return s.digits(2, 6)
    if kind == 1:
        return f"{s.pick('ABCDEFGHKLMNPRSTVWXZ')}{s.digits(2, 4)}"
    return s.name() if kind == 2 else s.noun()


def _filler(s: Source) -> str:
    """A sentence without a fact that a question could ask for."""
    noun = s.noun
    kind = s.number(0, 4)
    if kind == 0:
        return f"The {s.word(ADJECTIVES)} {noun()} is near the {noun()}."
    if kind == 1:
        return f"{s.name()} {s.pick(VERBS)[1]} the {noun()} and the {noun()}."
    if kind == 2:
        return f"Every {noun()} has a {s.word(ADJECTIVES)} {noun()}, but not this one."
    if kind == 3:
        return f"On day {s.number(1, 99)} the {noun()} was {s.word(ADJECTIVES)}."
    return f"We saw {s.number(2, 99)} {s.word(NOUNS)}s and a {s.word(ADJECTIVES)} {noun()}."


# (maker, how often). Retrieval is rare because it is long.
QUESTIONS: tuple[tuple[Callable[[Source], Turn], float], ...] = (
    (small_talk, 1.0),
    (fact, 1.5),
    (arithmetic, 2.0),
    (copying, 2.0),
    (transforming, 2.0),
    (json_answer, 2.0),
    (system_prompt, 1.5),
    (retrieval, 2.0),
)
