"""Prompts have the length that was asked for, and the same seed gives the same ones."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from glimmer.deploy.bench.prompts import (
    Prompt,
    draw_length,
    load_tokenizer,
    make_prompts,
    read_text,
)
from glimmer.deploy.bench.settings import parse_settings
from glimmer.shared.errors import UsageError
from tokenizers import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found = load_tokenizer("demo", {})
    assert found is not None
    return found


def make(
    words: str, tokenizer: Tokenizer | None, number: int = 20, purpose: str = "measured"
) -> list[Prompt]:
    return make_prompts(parse_settings(words.split(), None), tokenizer, number, purpose)


def common_start(one: Sequence[object], other: Sequence[object]) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


@pytest.mark.parametrize("dataset", ["random", "text"])
def test_completions_get_ids_of_exact_number(dataset: str, tokenizer: Tokenizer) -> None:
    prompts = make(f"--dataset {dataset} --input_len 300 --output_len 7", tokenizer)
    assert {(len(p.content), p.num_tokens, p.output_len) for p in prompts} == {(300, 300, 7)}
    assert len({tuple(p.content) for p in prompts}) == len(prompts)
    added = set(tokenizer.get_added_tokens_decoder())
    ids = {i for p in prompts for i in p.content}
    assert not ids & added
    assert max(i for i in ids if isinstance(i, int)) < tokenizer.get_vocab_size()


@pytest.mark.parametrize("dataset", ["random", "text", "shared-prefix --prefix_len 40"])
def test_chat_gets_text_that_encodes_to_the_exact_number(
    dataset: str, tokenizer: Tokenizer
) -> None:
    prompts = make(f"--route chat --dataset {dataset} --input_len 300", tokenizer)
    wanted = 340 if "prefix" in dataset else 300
    for prompt in prompts:
        assert isinstance(prompt.content, str)
        encoded = tokenizer.encode(prompt.content, add_special_tokens=False).ids
        assert len(encoded) == prompt.num_tokens == wanted


def test_random_ids_need_no_tokenizer() -> None:
    prompts = make("--input_len 500 --vocab_size 50", None)
    assert {i for p in prompts for i in p.content} == set(range(50))
    with pytest.raises(UsageError, match="--tokenizer DIR is needed"):
        make("--dataset text", None)


def test_chats_need_no_tokenizer() -> None:
    words = "--route chat --dataset shared-prefix --prefix_len 100 --num_prefixes 2 --input_len 50"
    prompts = make(words, None)
    texts = [str(prompt.content) for prompt in prompts]
    assert {prompt.num_tokens for prompt in prompts} == {150}
    assert {len(text.split()) for text in texts} == {150}
    assert len({text[:300] for text in texts}) == 2
    assert len(set(texts)) == len(texts)


def test_the_seed_and_purpose_decide(tokenizer: Tokenizer) -> None:
    words = "--input_len 30 --range_ratio 0.5 --seed 3"
    assert make(words, tokenizer) == make(words, tokenizer)
    assert make(words, tokenizer) != make(words + "0", tokenizer)
    assert make(words, tokenizer) != make(words, tokenizer, purpose="warm-up")


@pytest.mark.parametrize("route", ["completions", "chat"])
def test_prefixes_are_shared_in_turn_and_not_with_warm_ups(
    route: str, tokenizer: Tokenizer
) -> None:
    words = f"--route {route} --dataset shared-prefix --prefix_len 64 --input_len 64"
    words += " --num_prefixes 2"
    first, second, third, fourth = (p.content for p in make(words, tokenizer, 4))
    shared = 64 if route == "completions" else 40  # characters of 64 tokens; the last may merge
    assert common_start(first, third) >= shared
    assert common_start(second, fourth) >= shared
    assert common_start(first, second) < 10
    warm = make(words, tokenizer, 1, "warm-up")[0].content
    assert common_start(warm, first) < 10


def test_lengths_are_uniform_around_the_one_asked_for() -> None:
    rng = random.Random(1)
    drawn = [draw_length(10, 0.25, rng) for _ in range(500)]
    assert set(drawn) == set(range(7, 14))  # floor(7.5) to ceil(12.5)
    assert draw_length(10, 0, rng) == 10
    assert min(draw_length(1, 0.9, rng) for _ in range(50)) == 1
    prompts = make("--range_ratio 0.25 --input_len 10 --output_len 10", None, 200)
    assert {p.num_tokens for p in prompts} == {p.output_len for p in prompts} == set(range(7, 14))


def test_text_is_cut_from_a_file_as_often_as_needed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_text("one two three ")
    prompt = make(f"--dataset text --text_file {file} --input_len 100", tokenizer, 1)[0]
    assert isinstance(prompt.content, list)
    assert "three one" in tokenizer.decode(prompt.content)
    assert len(prompt.content) == 100


@pytest.mark.parametrize(("content", "words"), [(b"", "is empty"), (b"\xff", "utf-8")])
def test_a_bad_text_file_is_named(
    content: bytes, words: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    file = tmp_path / "book.txt"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=f"--text_file {file}.*{words}"):
        make(f"--dataset text --text_file {file}", tokenizer, 1)


def test_without_a_file_the_text_is_long_english() -> None:
    text = read_text(None)
    assert len(text) > 100_000
    assert text.count(" the ") > 1000


def test_tokenizers_are_found_where_they_are_named(tiny_model: Path, tmp_path: Path) -> None:
    for name in (str(tiny_model), str(tiny_model / "tokenizer.json")):
        found = load_tokenizer(name, {})
        assert found is not None
        assert found.get_vocab_size() > 500
    assert load_tokenizer("auto", {"info": {"model_dir": str(tiny_model)}}) is not None
    assert load_tokenizer("none", {"info": {"model_dir": str(tiny_model)}}) is None
    for info in (None, [], {"model_dir": str(tmp_path)}, {"model_dir": 3}):
        assert load_tokenizer("auto", {"info": info}) is None
    with pytest.raises(UsageError, match=f"--tokenizer {tmp_path}"):
        load_tokenizer(str(tmp_path), {})
