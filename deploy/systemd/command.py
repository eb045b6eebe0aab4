"""`glimmer systemd`: prints, installs or removes the units for this machine.

The files beside this one are complete units for an installation in /opt/glimmer. They are changed
line by line for the Python, model, user and flags given. docs/operations.md explains them.
"""

import argparse
import os
import pwd
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...shared.config import ServeConfig
from ...shared.errors import ConfigError, UsageError
from ...shared.flags import parse_serve_args
from ..launcher.gpus import find_gpus

_HERE = Path(__file__).parent
_USER = "glimmer"
_UNIT_DIR = "etc/systemd/system"
_ENVIRONMENT = "etc/glimmer/glimmer.env"
_HOMES = ("/home/", "/root/", "/run/user/")  # hidden by ProtectHome=
_LOOPBACK = ("127.", "::1", "localhost")
_PRIVATE_NETS = "link-local 10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 fc00::/7"
_METRICS_PORT = 9000
# Flag -> name of the credential that holds a copy of its file.
_CREDENTIALS = {
    "api_key_file": "api-keys",
    "ssl_certfile": "certificate",
    "ssl_keyfile": "certificate-key",
}


@dataclass(frozen=True)
class Plan:
    """Which units are written. `instances` is 0 for one server, or the number of servers with a GPU
    each."""

    command: tuple[str, ...]  # that runs `glimmer`
    flags: tuple[str, ...]  # of `glimmer serve`
    config: ServeConfig  # parsed from `flags`
    user: str
    instances: int
    networks: str  # that clients may come from
    has_gpus: bool

    @property
    def unit_name(self) -> str:
        """Of the unit's file."""
        return "glimmer@.service" if self.instances else "glimmer.service"

    @property
    def services(self) -> list[str]:
        """The units to enable."""
        names = [f"glimmer@{number}.service" for number in range(self.instances)]
        return names or ["glimmer.service"]


def main(argv: Sequence[str]) -> int:
    """Returns the exit code. Raises StartError for flags that a unit cannot have."""
    parser = _parser()
    args, flags = parser.parse_known_args(list(argv))
    root = Path(args.root)
    if args.uninstall:
        return _uninstall(root)
    plan = _plan(args, flags)
    if args.print:
        for path, text in _files(plan).items():
            print(f"# /{path}\n{text}")
        return 0
    return _install(plan, root)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="glimmer systemd",
        description="Write systemd units for this machine. All other options are those of "
        "`glimmer serve`, and become part of the unit.",
        epilog="example: glimmer systemd --install /srv/models/GLM-4.7-Flash --reasoning_parser "
        "glm45",
        allow_abbrev=False,
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--print", action="store_true", help="print all files")
    action.add_argument("--install", action="store_true", help="write them; needs root or --root")
    action.add_argument("--uninstall", action="store_true", help="remove what --install wrote")
    parser.add_argument("--root", default="/", help="write below this directory; default: /")
    parser.add_argument("--user", default=_USER, help="user of the service; made if missing")
    parser.add_argument(
        "--instances",
        type=int,
        help="servers with one GPU each, on ports 8000, 8001, ...; 0: one server; default: as many "
        "as there are GPUs if --tp is 1 and there are several",
    )
    parser.add_argument(
        "--networks",
        default=_PRIVATE_NETS,
        help="addresses that may talk to a server whose --host is not 127.0.0.1; default: private "
        "networks",
    )
    return parser


def _plan(args: argparse.Namespace, flags: list[str]) -> Plan:
    if flags and not flags[0].startswith("-"):
        flags.insert(0, "--model_dir")
    config = parse_serve_args(flags)
    num_gpus = len(find_gpus()[0])
    instances = args.instances
    if instances is None:
        instances = num_gpus if num_gpus > 1 and config.tp == 1 else 0
    if not 0 <= instances <= 10:
        raise UsageError(f"--instances {instances}: must be 0 to 10; larger nodes need own ports")
    if instances and config.port % 10:
        raise UsageError(f"--port {config.port}: with --instances it must end with 0")
    if instances and config.tp > 1:
        raise UsageError(f"--tp {config.tp}: an instance has one GPU; use --instances 0")
    if config.api_key or config.admin_api_key:
        raise UsageError("a unit is no place for API keys: use --api_key_file")
    if config.runtime_dir is not None:
        raise UsageError("--runtime_dir: the unit has its own, /run/glimmer")
    script = Path(sys.executable).with_name("glimmer")
    command = (str(script),) if script.exists() else (sys.executable, "-P", "-m", "glimmer")
    return Plan(command, tuple(flags), config, args.user, instances, args.networks, num_gpus > 0)


def _files(plan: Plan) -> dict[str, str]:
    """Path below the root -> text."""
    files = {f"{_UNIT_DIR}/{plan.unit_name}": _unit(plan)}
    if plan.user == _USER:
        files["etc/sysusers.d/glimmer.conf"] = _text("glimmer-sysusers.conf")
    tmpfiles = _text("glimmer-tmpfiles.conf").replace("glimmer glimmer", f"{plan.user} -")
    files["etc/tmpfiles.d/glimmer.conf"] = tmpfiles
    if plan.has_gpus:
        files["etc/modules-load.d/glimmer.conf"] = _text("glimmer-modules.conf")
    settings = re.sub(r"(?m)^(GLIMMER_\w+)=.*", r"\1=", _text("glimmer.env"))
    files[_ENVIRONMENT] = settings.replace("GLIMMER_MODEL_DIR=\n", "")
    return files


def _unit(plan: Plan) -> str:
    text = _text(plan.unit_name)
    port = str(plan.config.port // 10) + "%i" if plan.instances else str(plan.config.port)
    metrics = plan.config.metrics_port or _METRICS_PORT
    metrics_port = f"{metrics // 10}%i" if plan.instances else str(metrics)
    name = "glimmer-%i" if plan.instances else "glimmer"
    words = [*plan.command, "serve", *_flags(plan)]
    words += ["--port", port, "--metrics_port", metrics_port]
    words = [_quote(word) for word in words]
    words += ["--runtime_dir", f"%t/{name}"]
    if "--drain_delay_s" not in plan.flags:
        words += ["--drain_delay_s", "15"]
    credentials = {flag: _CREDENTIALS[flag] for flag in _files_of_keys(plan.config)}
    for flag, credential in credentials.items():
        words += [f"--{flag}", f"%d/{credential}"]
    text = _replace(text, "ExecStart", [" ".join([*words, "$GLIMMER_FLAGS"])])
    text = _replace(text, "User", [plan.user])
    text = _replace(text, "Group", [_group(plan.user)])
    loads = [f"{name}:{_files_of_keys(plan.config)[flag]}" for flag, name in credentials.items()]
    text = _add(text, "LoadCredential", loads)
    text = _add(text, "BindReadOnlyPaths", _hidden(plan))
    if _hidden(plan):
        text = _replace(text, "ProtectHome", ["tmpfs"])
    stop_s = plan.config.drain_delay_s + plan.config.drain_timeout_s + 45
    text = _replace(text, "TimeoutStopSec", [str(int(max(stop_s, 120)))])
    if not plan.config.host.startswith(_LOOPBACK):
        text = _replace(text, "IPAddressAllow", [f"localhost {plan.networks}"])
    if plan.config.tp > 1:  # NCCL listens on ports that the kernel chooses
        text = _replace(_replace(text, "SocketBindDeny", []), "SocketBindAllow", [])
    else:
        count = max(1, plan.instances)
        ranges = [f"tcp:{first}-{first + count - 1}" for first in (plan.config.port, metrics)]
        text = _replace(text, "SocketBindAllow", ranges)
    return text


def _flags(plan: Plan) -> list[str]:
    """Those of the user without the ones that the unit sets itself."""
    own = {"port", "metrics_port", *_CREDENTIALS}
    kept: list[str] = []
    is_own = False
    for word in plan.flags:
        if word.startswith("--"):
            is_own = word[2:].partition("=")[0].replace("-", "_") in own
        if not is_own:
            kept.append(word)
    return kept


def _files_of_keys(config: ServeConfig) -> dict[str, str]:
    files = {flag: getattr(config, flag) for flag in _CREDENTIALS}
    return {flag: os.path.abspath(path) for flag, path in files.items() if path is not None}


def _hidden(plan: Plan) -> list[str]:
    """Paths below home directories that the server must see."""
    package = Path(__file__).resolve().parents[2]
    paths = [sys.prefix, sys.base_prefix, str(package), plan.config.model_dir]
    paths += [plan.config.chat_template or "", *(plan.config.mtp_draft_model_dir or ())]
    real = {path for path in paths if path and Path(path).exists()}
    real |= {os.path.realpath(path) for path in real}
    return sorted(path for path in map(os.path.abspath, real) if path.startswith(_HOMES))


def _group(user: str) -> str:
    try:
        return str(pwd.getpwnam(user).pw_gid)
    except KeyError:
        if user == _USER:
            return _USER
        raise ConfigError(f"--user {user}: there is no such user") from None


def _quote(word: str) -> str:
    """A word of a command line in a unit."""
    word = word.replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$")
    word = re.sub("%(?!i$)", "%%", word)
    return f'"{word}"' if re.search(r"[\s\"';\\]", word) or not word else word


def _replace(text: str, key: str, values: list[str]) -> str:
    """The unit with these values of `key` where its first one was."""
    lines = text.split("\n")
    first = next(n for n, line in enumerate(lines) if line.startswith(f"{key}="))
    kept = [line for line in lines[first:] if not line.startswith(f"{key}=")]
    return "\n".join([*lines[:first], *(f"{key}={value}" for value in values), *kept])


def _add(text: str, key: str, values: list[str]) -> str:
    added = "".join(f"{key}={value}\n" for value in values)
    return text.replace("\n[Install]", f"{added}\n[Install]")


def _text(name: str) -> str:
    return (_HERE / name).read_text()


def _install(plan: Plan, root: Path) -> int:
    is_this = _must_write(root)
    for name, text in _files(plan).items():
        path = root / name
        if name == _ENVIRONMENT and path.exists():
            print(f"kept    {path}")
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(f"wrote   {path}")
    commands = [["systemd-sysusers"], ["systemd-tmpfiles", "--create"]]
    commands.append(["systemctl", "daemon-reload"])
    if is_this:
        for command in commands:
            subprocess.run(command, check=False)
    else:
        print("next, on that machine:", *(" ".join(command) for command in commands), sep="\n  ")
    print(f"start:  systemctl enable --now {' '.join(plan.services)}")
    return 0


def _uninstall(root: Path) -> int:
    is_this = _must_write(root)
    names = ["glimmer.service", "glimmer@.service"]
    if is_this:
        subprocess.run(["systemctl", "disable", "--now", "glimmer.service"], check=False)
        subprocess.run(["systemctl", "stop", "glimmer@*.service"], check=False)
    paths = [f"{_UNIT_DIR}/{name}" for name in names]
    paths += [f"etc/{kind}.d/glimmer.conf" for kind in ("sysusers", "tmpfiles", "modules-load")]
    for path in (root / name for name in paths):
        if path.exists():
            path.unlink()
            print(f"removed {path}")
    for link in (root / _UNIT_DIR).glob("*.wants/glimmer*.service"):
        link.unlink()
    if is_this:
        subprocess.run(["systemctl", "daemon-reload"], check=False)
    print("left as they are: /etc/glimmer, /var/lib/glimmer, /var/cache/glimmer and the user")
    return 0


def _must_write(root: Path) -> bool:
    """Whether `root` is this machine with a running systemd. Raises UsageError without rights."""
    if root == Path("/") and os.geteuid() != 0:
        raise UsageError("writing to /etc needs root: use sudo, or --root DIR, or --print")
    return root == Path("/") and Path("/run/systemd/system").exists()
