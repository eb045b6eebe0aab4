"""The units, as systemd itself checks them, and `glimmer systemd`, which writes them."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from glimmer.deploy.cli import main
from glimmer.shared import errors

UNITS = Path(errors.__file__).parents[1] / "deploy" / "systemd"
THRESHOLD = "20"  # tenths: systemd-analyze reports 2.0
KINDS = {
    "shipped": ["glimmer.service", "glimmer@.service", "vllm-router.service"],
    "generated": [],
    "--instances": ["8"],
    "--host": ["0.0.0.0"],
    "--api_key_file": ["/etc/glimmer/api-keys"],
}

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is missing (make tools)"
)


def printed(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, str]:
    """File -> text, as `glimmer systemd --print` shows them."""
    assert main(["systemd", "--print", *flags]) == 0
    parts = re.split(r"(?m)^# (/etc/\S+[^:\s])$", capsys.readouterr().out)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def installable(text: str) -> str:
    """The unit with programs that this machine has."""
    return re.sub(r"(?m)^ExecStart=\S+", f"ExecStart={sys.executable}", text)


def problems(path: Path) -> str:
    """What systemd finds wrong with a unit file."""
    command = ["systemd-analyze", "verify", "--man=no", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).splitlines()
    return "\n".join(line for line in lines if path.name.split("@")[0] in line)


def is_secure(path: Path) -> bool:
    command = ["systemd-analyze", "security", "--offline=true", f"--threshold={THRESHOLD}"]
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, check=False)
    assert "Overall exposure level" in done.stdout, done.stderr
    return done.returncode == 0


def units(capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: str) -> list[Path]:
    """Files of units of one kind, ready to be checked."""
    if kind == "shipped":
        texts = {name: (UNITS / name).read_text() for name in KINDS[kind]}
    else:
        flags = [] if kind == "generated" else [kind, *KINDS[kind]]
        files = printed(capsys, "/models/GLM-4.7-Flash", *flags)
        texts = {Path(file).name: text for file, text in files.items() if file.endswith("service")}
    paths = []
    for name, text in texts.items():
        paths.append(tmp_path / name.replace("@", "@0"))
        paths[-1].write_text(installable(text))
    return paths


@needs_systemd
@pytest.mark.parametrize("kind", KINDS)
def test_units_are_valid_and_tight(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = units(capsys, tmp_path, kind)
    assert paths
    for path in paths:
        assert problems(path) == ""
        assert is_secure(path)


@needs_systemd
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Restart=on-failure", "Restart=sometimes"),
        ("WatchdogSec=60", "WatchdogSecs=60"),
        ("KillMode=mixed", "KillMode=mixd"),
        ("OOMPolicy=continue", "OOMPolicy=go-on"),
        ("SocketBindAllow=tcp:8000", "SocketBindAllow=tcp:80000"),
        ("Type=notify", "Type=notifies"),
        ("SystemCallFilter=@system-service", "SystemCallFilter=@system-servic"),
        ("RestartPreventExitStatus=2 3", "RestartPreventExitStatus=2 300"),
    ],
)
def test_verify_finds_planted_mistakes(old: str, new: str, tmp_path: Path) -> None:
    text = installable((UNITS / "glimmer.service").read_text())
    assert old in text
    path = tmp_path / "glimmer.service"
    path.write_text(text.replace(old, new, 1))
    assert problems(path) != ""


@needs_systemd
@pytest.mark.parametrize(
    "lost",
    [
        r"SystemCallFilter=.*\n",
        r"CapabilityBoundingSet=\n",
        r"(Protect\w+|Restrict\w+)=.*\n",
    ],
)
def test_security_finds_lost_protection(lost: str, tmp_path: Path) -> None:
    path = tmp_path / "glimmer.service"
    path.write_text(re.sub(rf"(?m)^{lost}", "", (UNITS / "glimmer.service").read_text()))
    assert not is_secure(path)


def settings(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_the_two_units_differ_only_in_what_belongs_to_an_instance() -> None:
    one = settings((UNITS / "glimmer.service").read_text())
    many = settings((UNITS / "glimmer@.service").read_text())
    assert [line for line in many if line not in one and "%i" not in line] == [
        "SocketBindAllow=tcp:8000-8009",
        "SocketBindAllow=tcp:9000-9009",
    ]
    own = ("Description", "ExecStart", "RuntimeDirectory=", "SocketBindAllow")
    assert all(line.startswith(own) for line in one if line not in many)


def test_exit_codes_that_no_restart_helps_are_those_that_are_documented() -> None:
    (line,) = (
        line
        for line in settings((UNITS / "glimmer.service").read_text())
        if line.startswith("RestartPreventExitStatus=")
    )
    kinds = (errors.UsageError, errors.ConfigError, errors.ModelError, errors.GpuError)
    assert [int(code) for code in line.partition("=")[2].split()] == [k.exit_code for k in kinds]


def test_units_say_what_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--api_key_file", "/k/keys", "--model_name", "x y%z$", "--drain_timeout_s", "600")
    files = printed(capsys, "/models/m", *flags, "--port", "8100", "--host", "0.0.0.0")
    unit = files["/etc/systemd/system/glimmer.service"]
    (command,) = re.findall("(?m)^ExecStart=(.*)$", unit)
    for words in (
        "serve --model_dir /models/m ",
        ' "x y%%z$$" ',
        "--port 8100",
        "--runtime_dir %t/glimmer ",
        "--drain_delay_s 15",
        "--api_key_file %d/api-keys",
    ):
        assert words in command
    assert "/k/keys" not in command
    assert command.endswith(" $GLIMMER_FLAGS")
    for line in ("LoadCredential=api-keys:/k/keys", "SocketBindAllow=tcp:8100", "10.0.0.0/8"):
        assert line in unit
    stop_s = int(re.findall("TimeoutStopSec=(.*)", unit)[0])
    assert stop_s > 15 + 600 + 10
    many = printed(capsys, "/models/m", "--instances", "4", "--port", "8100")
    unit = many["/etc/systemd/system/glimmer@.service"]
    for words in ("--port 810%i", "--metrics_port 900%i", "tcp:8100-8103", "tcp:9000-9003"):
        assert words in unit
    wide = printed(capsys, "/models/m", "--tp", "2", "--instances", "0")
    assert "SocketBind" not in "\n".join(settings(wide["/etc/systemd/system/glimmer.service"]))


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--api_key", "sk-1"], "use --api_key_file"),
        (["--port", "8001", "--instances", "2"], "must end with 0"),
        (["--instances", "11"], "must be 0 to 10"),
        (["--tp", "2", "--instances", "2"], "use --instances 0"),
        (["--runtime_dir", "/x"], "the unit has its own"),
        (["--prt", "1"], "did you mean --port?"),
        (["--user", "no-such-user"], "there is no such user"),
    ],
)
def test_flags_that_a_unit_cannot_have_are_refused(
    flags: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["systemd", "--print", "/models/m", *flags]) in (2, 3)
    assert problem in capsys.readouterr().err


def test_install_keeps_settings_and_uninstall_removes_the_rest(tmp_path: Path) -> None:
    where = ["--root", str(tmp_path)]
    assert main(["systemd", "--install", "/models/m", "--instances", "2", *where]) == 0
    file = tmp_path / "etc/glimmer/glimmer.env"
    file.write_text("GLIMMER_FLAGS=--log_level debug\n")
    assert main(["systemd", "--install", "/models/other", "--instances", "2", *where]) == 0
    unit = tmp_path / "etc/systemd/system/glimmer@.service"
    assert "/models/other" in unit.read_text()
    assert "debug" in file.read_text()
    assert main(["systemd", "--uninstall", *where]) == 0
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert left == [file]
