"""Tasks of several steps, as coding agents and assistants get them: each step's result is needed for
the next one, and some steps fail."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..words import Source
from .grammar import request_frame
from .results import error, file_text, make_result
from .style import typed
from .values import MAKERS

CODING_PROMPTS = (
    "You are [a|an expert|a careful|the] [coding agent|coding assistant|software engineer|developer "
    "agent|programming assistant] [in|working in|for] [the user's repository|this project|a "
    "terminal|the user's folder]. [Use the tools|Use your tools to read and change files|Read "
    "before you write|Work step by step|Be brief|Never guess]."
)


@dataclass(frozen=True)
class Step:
    """A call for an intent, the values of its slots, and its result."""

    intent: str
    values: dict[str, Any]
    result: str


@dataclass(frozen=True)
class Task:
    """A request, its steps and the answer."""

    text: str
    steps: list[Step]
    answer: str
    must_say: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaskMaker:
    """Makes tasks for which tools of the intents `needs` are there."""

    needs: tuple[str, ...]
    make: Callable[[Source], Task] = field(repr=False)


def _ask(s: Source, asks: tuple[str, ...], **words: str) -> str:
    frame = typed(s, request_frame(s, asks))
    for name, word in words.items():
        frame = frame.replace(f"{{{name}}}", word)
    return frame


def _value(s: Source, kind: str) -> Any:
    return MAKERS[kind].make(s).value


def _folder_with_files(s: Source) -> tuple[str, list[str]]:
    folder = str(_value(s, "folder"))
    names = s.sample(lambda: str(_value(s, "path")).rpartition("/")[2], s.number(1, 5))
    return folder, names


def _list_then_read(s: Source) -> Task:
    folder, names = _folder_with_files(s)
    at = s.pick((0, 0, len(names) - 1))
    which = "first" if at == 0 else "last"
    text = _ask(
        s,
        (
            "[list|look into] {f} and [then|] [read|open|show me] the {w} file",
            "[look into|check] {f}[. Read| and tell me what is in| and open] the {w} [one|file]",
            "[what is in|read|show] the {w} file of [the folder |]{f}?",
            "[read|show me|open] [the file that comes|what comes] {w} in {f}",
        ),
        f=folder,
        w=which,
    )
    content, answer, must = file_text(s)
    path = f"{folder.rstrip('/')}/{names[at]}"
    steps = [
        Step("files/list", {"path": folder}, "\n".join(names)),
        Step("files/read", {"path": path}, content),
    ]
    return Task(text, steps, answer, tuple(must))


def _search_then_read(s: Source) -> Task:
    pattern, path = str(_value(s, "pattern")), str(_value(s, "path"))
    text = _ask(
        s,
        (
            "[find|search|look for|grep] {p} and [read|open|show me] the file [where it is|that has it|]",
            "[which file|what file] [has|defines|contains] {p}? [read it|open it|show it]",
            "[read|open|show me] the file [that contains|with|that defines] {p}",
            "[locate|look up] {p} and [tell me|show me] what the file says",
        ),
        p=s.pick(("{}", "'{}'", "`{}`")).format(pattern),
    )
    content, answer, must = file_text(s)
    line = f"{path}:{s.number(1, 200)}: {pattern} = {s.digits(1, 3)}"
    steps = [
        Step("files/search", {"pattern": pattern}, line),
        Step("files/read", {"path": path}, content),
    ]
    return Task(text, steps, answer, tuple(must))


def _write_then_read(s: Source) -> Task:
    path, content = str(_value(s, "path")), str(_value(s, "contents"))
    text = _ask(
        s,
        (
            "[write|put|save] {c} [to|into|in] {f}[ and|, then| and then] [read it again|check it|show it to me]",
            "[create|make] {f} with {c} and [read it|look at it|verify it]",
            "{f} should [contain|say] {c}. [write it and check|write it, then read it]",
            "[save|store] {c} as {f}, [then|and] [look|check] what it says",
        ),
        c=s.pick(("{}", "'{}'", '"{}"')).format(content),
        f=path,
    )
    steps = [
        Step("files/write", {"path": path, "content": content}, s.pick(("ok", "written", "saved"))),
        Step("files/read", {"path": path}, content),
    ]
    return Task(text, steps, f"It says: {content}", (content,))


def _write_then_run(s: Source) -> Task:
    name = f"{s.noun()}.py"
    code, output = f"print({s.digits(1, 4)})", ""
    output = code[6:-1]
    if s.chance(0.5):
        output = s.noun()
        code = f"print('{output}')"
    command = s.pick(("python", "python3")) + f" {name}"
    text = _ask(
        s,
        (
            "[write|create|make] {f} with {c}[ and|, then| in it, then] run it [with|using] {r}",
            "[put|save] {c} [in|into] {f} and [execute|run|start] {r}",
            "[make|create] [a script|the file] {f}: {c}. [run|then run|execute] {r}",
            "{f} should contain {c}. [write it and run|after that do] {r}",
        ),
        f=name,
        c=s.pick(("{}", "`{}`")).format(code),
        r=s.pick(("{}", "`{}`")).format(command),
    )
    steps = [
        Step(
            "files/write", {"path": name, "content": code}, s.pick(("ok", "File written", "saved"))
        ),
        Step("shell/run", {"command": command}, output),
    ]
    return Task(text, steps, f"The result is {output}.", (output,))


def _missing_file(s: Source) -> Task:
    """The file is not where the user says: the agent lists the folder and reads the right one."""
    folder, names = _folder_with_files(s)
    folder = folder.rstrip("/")
    right = names[0]
    stem, dot, suffix = right.partition(".")
    wrong = f"{stem}{dot}{suffix}" + s.pick(("x", "s", "1", "~"))
    text = _ask(
        s,
        (
            "[read|open|show me|look at] {f}. [if it is missing|if it is not there], look [in|into] {d} for it",
            "[what does|tell me what] {f} [says|contains]? [it may have|maybe it has] another name in {d}",
            "[find|read] {f}, [or what is like it|or the one with nearly this name] in {d}",
            "[read|show] {f}. [the name may be wrong|I am not sure of the name], [check|list] {d} then",
        ),
        f=f"{folder}/{wrong}",
        d=folder,
    )
    content, answer, must = file_text(s)
    steps = [
        Step("files/read", {"path": f"{folder}/{wrong}"}, "Error: no such file"),
        Step("files/list", {"path": folder}, "\n".join(names)),
        Step("files/read", {"path": f"{folder}/{right}"}, content),
    ]
    return Task(text, steps, answer, tuple(must))


def _run_and_tell(s: Source) -> Task:
    command = str(_value(s, "command"))
    text = _ask(
        s,
        (
            "[run|execute|do] {c} and [tell me|say|report] what [it prints|comes out|it says|happens]",
            "[what does|tell me what] {c} [print|say|return|output]?",
            "[please run|try] {c}. [what is the output|does it work|did it pass|any errors]?",
            "[show me|give me] the output of {c}",
        ),
        c=s.pick(("{}", "`{}`", "`{}`")).format(command),
    )
    content, answer, must = error(s) if s.chance(0.2) else make_result(s)
    return Task(text, [Step("shell/run", {"command": command}, content)], answer, tuple(must))


def _read_then_restart(s: Source) -> Task:
    path, host = str(_value(s, "path")), str(_value(s, "host"))
    text = _ask(
        s,
        (
            "[read|look into|open] {f} and [restart|reboot] the [host|server|machine] [in it|it names|there]",
            "[restart|reboot] the [host|server|machine] [that|whose name] [is in|stands in] {f}",
            "the [host|machine|server] in {f} [must be|needs to be|should be] [restarted|rebooted]",
            "{f} [has|names] a [host|server]. [read it and restart that|restart it]",
        ),
        f=path,
    )
    done = s.pick(("ok", "done", "restarted"))
    steps = [
        Step("files/read", {"path": path}, host),
        Step("deploy/restart", {"host": host}, done),
    ]
    return Task(text, steps, f"Done: {host} was restarted ({done}).", (host,))


def _customer_then_ticket(s: Source) -> Task:
    email, name = str(_value(s, "email")), str(_value(s, "full_name"))
    title, number = str(_value(s, "problem")), str(_value(s, "code"))
    priority = s.pick(("low", "medium", "high"))
    text = _ask(
        s,
        (
            "[find|look up] the customer {e} and [open|create|file] a {p} [priority |]ticket: {t}",
            "[open|create] a {p} ticket {t} after [you find|finding|looking up] the customer {e}",
            "customer {e} [has a problem|called]: {t}. [look them up|find the record] and [open|make] a {p} ticket",
            "who is {e}? [then|and] [make|file] a {p} ticket [called|saying] {t}",
        ),
        e=email,
        p=priority,
        t=s.pick(("'{}'", '"{}"')).format(title),
    )
    steps = [
        Step("customers/find", {"email": email}, f'{{"name": "{name}", "id": {s.digits(1, 4)}}}'),
        Step("tickets/create", {"title": title, "priority": priority}, f'{{"ticket": "{number}"}}'),
    ]
    return Task(text, steps, f"The ticket is {number}. The customer is {name}.", (number, name))


def _result_to_person(s: Source) -> Task:
    """The result of one tool is sent to a person."""
    city, who = str(_value(s, "city")), str(_value(s, "person"))
    weather = f"{s.number(-9, 38)} degrees, {s.pick(('sunny', 'rainy', 'cloudy', 'windy', 'snow'))}"
    text = _ask(
        s,
        (
            "[get|check|look up|find out] the weather [in|for] {c} and [send|text|tell|message] [it to |]{w}",
            "[send|tell|write|text] {w} [how the weather is|what the weather is like|the weather] in {c}",
            "{w} [wants|needs] to know the weather in {c}. [check it and send it|look it up and tell them]",
            "[let|make sure that] {w} [know|hears] the weather [in|of] {c}",
        ),
        c=city,
        w=who,
    )
    done = s.pick(("sent", "ok", "delivered"))
    steps = [
        Step("weather/now", {"city": city}, weather),
        Step("chat/message", {"who": who, "text": weather}, done),
    ]
    return Task(text, steps, f"Done: {who} got the message ({done}).", (done,))


AGENT_TASKS = (
    TaskMaker(("files/list", "files/read"), _list_then_read),
    TaskMaker(("files/search", "files/read"), _search_then_read),
    TaskMaker(("files/write", "files/read"), _write_then_read),
    TaskMaker(("files/write", "shell/run"), _write_then_run),
    TaskMaker(("files/read", "files/list"), _missing_file),
    TaskMaker(("shell/run",), _run_and_tell),
    TaskMaker(("files/read", "deploy/restart"), _read_then_restart),
    TaskMaker(("customers/find", "tickets/create"), _customer_then_ticket),
    TaskMaker(("weather/now", "chat/message"), _result_to_person),
)
