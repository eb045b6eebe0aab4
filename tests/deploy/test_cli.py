import errno
import subprocess
import sys
from pathlib import Path

import pytest
from glimmer import __version__
from glimmer.deploy.cli import guarded, main, parse_with_logging, with_model
from glimmer.deploy.demo.run import MODEL_DIR


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        ([], 0, "usage: glimmer COMMAND"),
        (["--help"], 0, "glimmer serve"),
        (["--help"], 0, "-V, --version"),
        (["--version"], 0, f"glimmer {__version__}"),
        (["-V"], 0, f"glimmer {__version__}"),
        (["serve", "--help"], 0, "--max_req_total_len"),
        (["check", "-h"], 0, "usage: glimmer check DIR"),
        (["bench", "--help"], 0, "overhead  HTTP"),
        (["bench", "latency", "--help"], 0, "--prefill"),
        (["bench", "kernels", "--help"], 0, "--context"),
        (["demo", "--help"], 0, "--once"),
        (["sevre"], 2, "unknown command 'sevre'; there are: serve"),
        (
            ["bench"],
            2,
            "glimmer bench needs a benchmark; there are: serve, latency, kernels, overhead",
        ),
        (["bench", "speed"], 2, "there are: serve, latency, kernels, overhead"),
        (["serve"], 2, "--model_dir is required"),
        (["serve", "--prot", "1"], 2, "did you mean --port?"),
        (["serve", "--model_dir", "/none"], 4, "/none has no config.json"),
        (["serve", "/none", "--tp", "2"], 4, "/none has no config.json"),
        (["check", "no/model"], 4, "hf download no/model --local-dir model"),
        (["serve", "demo", "--mtp_draft_model_dir", "no/drafts"], 4, "hf download no/drafts"),
        (["serve", "--model_dir", "/none", "--quant_type", "awq"], 3, "--quant_type awq"),
        (["serve", "--config", "/none.yaml"], 3, "/none.yaml"),
    ],
)
def test_each_command_line_has_its_exit_code_and_one_line(
    argv: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == code
    out, err = capsys.readouterr()
    if code == 0:
        assert words in out
    else:
        (line,) = err.splitlines()
        assert line.startswith("glimmer: ")
        assert words in line


def test_help_loads_neither_torch_nor_sockets() -> None:
    code = (
        "import sys; from glimmer.deploy.cli import main; main(['serve', '--help']); "
        "sys.exit(bool({'torch', 'transformers', 'zmq'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False)
    assert done.returncode == 0


def test_bench_hands_its_arguments_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "overhead", "--help"]) == 0
    assert "--running" in capsys.readouterr().out
    assert main(["bench", "serve", "--request-rat", "4"]) == 2
    assert "--request_rat" in capsys.readouterr().err


def test_python_m_is_the_same_command() -> None:
    out = subprocess.check_output([sys.executable, "-m", "glimmer", "--version"], text=True)
    assert out == f"glimmer {__version__}\n"


def test_a_launch_script_for_lightllm_needs_one_word_changed() -> None:
    command = "lightllm.server.api_server --model_dir /none --tp 1 --graph_max_batch_size 512"
    words = command.replace("lightllm", "glimmer").split()
    done = subprocess.run(
        [sys.executable, "-m", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 4
    assert done.stderr == "glimmer: /none has no config.json: not a model directory\n"


def test_demo_names_the_bundled_model_for_the_drafts_too() -> None:
    flags = "--mtp_mode vanilla_with_att --mtp_step 2 --mtp_draft_model_dir demo /none"
    config = with_model(parse_with_logging(["/none", *flags.split()]))
    assert (config.model_dir, config.mtp_draft_model_dir) == ("/none", (str(MODEL_DIR), "/none"))
    config = with_model(parse_with_logging(["demo", *flags.split()]))
    assert config.model_dir == str(MODEL_DIR)


def test_a_directory_whose_name_looks_like_that_of_a_download_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert with_model(parse_with_logging(["org/model"])).model_dir == "org/model"


def test_an_error_of_the_system_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "/run/x")

    assert guarded(fail) == 1
    assert capsys.readouterr().err == "glimmer: [Errno 28] No space left on device: '/run/x'\n"
