"""Flags are checked before anything is sent, and secrets stay out of reports."""

import json

import pytest
from glimmer.deploy.bench.settings import Settings, parse_settings, without_secrets
from glimmer.shared.errors import UsageError


def parse(*argv: str) -> Settings:
    return parse_settings(argv, None)


def test_flags_are_spelled_with_dashes_or_underscores() -> None:
    dashes = parse("--num-prompts", "5", "--request-rate=2.5", "--max-concurrency", "3")
    assert dashes == parse("--num_prompts", "5", "--request_rate=2.5", "--concurrency", "3")
    assert (dashes.num_prompts, dashes.request_rate, dashes.concurrency) == (5, 2.5, 3)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--num_prompts 0", "--num_prompts must be from 1"),
        ("--num_prompts x", "--num_prompts: invalid int"),
        ("--input_len -1", "--input_len must be from 1"),
        ("--output_len 99999999", "--output_len must be from 1"),
        ("--num_warmups -1", "--num_warmups must be from 0"),
        ("--concurrency 0", "--concurrency must be at least 1"),
        ("--request_rate 0", "--request_rate must be above 0"),
        ("--request_rate nan", "--request_rate must be above 0"),
        ("--request_rate inf", "--request_rate must be above 0 and finite"),
        ("--range_ratio 1", "--range_ratio must be at least 0 and below 1"),
        ("--timeout_s 0", "--timeout_s must be above 0"),
        ("--temperature -1", "--temperature must be at least 0"),
        ("--dataset shared-prefix", "--prefix_len must be above 0 with"),
        ("--prefix_len 5", "--prefix_len must be left out without"),
        ("--text_file x", "--text_file must be left out without"),
        ("--dataset text --tokenizer none", "--tokenizer must be given for --dataset text"),
        ("--dataset sharegpt", "--dataset: invalid choice"),
        ("--url localhost:8000", "--url must be like http://host:port"),
        ("--url http://me:word@host", "--url must be without user and password"),
        ("--extra_body [1]", "--extra_body: must be a JSON object"),
        ("--extra_body {", "--extra_body: not JSON"),
        ("--json /no/such/file", "--json must be in a directory that exists"),
        ("--num 4", "unrecognized arguments: --num"),
    ],
)
def test_a_bad_flag_is_named_with_what_it_may_be(argv: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(*argv.split())
    assert words in str(caught.value)


def test_a_key_is_in_no_report() -> None:
    for argv in (["--api-key", "hush", "--seed", "1"], ["--api_key=hush", "--seed", "1"]):
        settings = parse(*argv)
        assert settings.api_key == "hush"
        written = json.dumps([settings.public(), without_secrets(argv)])
        assert "hush" not in written
        assert "--seed" in written
