from glimmer.deploy.demo.training.words import FILLERS, NOUNS, VERBS, Source

FRAMES = tuple(f"please {{}} {n}" for n in "abcdefghij")


def test_training_and_evaluation_share_no_word_and_no_frame() -> None:
    seen: dict[bool, set[str]] = {}
    for held_out in (False, True):
        s = Source("words", held_out)
        words = {s.noun() for _ in range(3000)} | {s.word(NOUNS) for _ in range(500)}
        seen[held_out] = words | {s.frame(FRAMES) for _ in range(300)}
    assert not seen[False] & seen[True]
    assert seen[True] >= set(FRAMES[-2:])


def test_a_seed_always_makes_the_same_choices() -> None:
    first, again = ([Source(7).noun() for _ in range(3)] for _ in range(2))
    assert first == again
    assert [Source(n).noun() for n in range(20)] != [Source(n + 1).noun() for n in range(20)]


def test_loosened_frames_keep_what_is_filled_in() -> None:
    s = Source("frames")
    frame = "use {v} for the {p}"
    loosened = {s.frame((frame, frame, "held out")) for _ in range(300)}
    assert len(loosened) > 50
    assert all("{v}" in frame and "{p}" in frame for frame in loosened)


def test_fillers_mean_nothing_else() -> None:
    assert not set(FILLERS) & ({word for verb in VERBS for word in verb} | set(NOUNS))
    s = Source(0)
    assert all(len(s.fillers(1, 3).split()) in (1, 2, 3) for _ in range(50))
    assert s.fillers(0, 0) == ""


def test_digits_are_in_range_and_samples_differ() -> None:
    s = Source(1)
    assert {len(s.digits(2, 4)) for _ in range(100)} == {2, 3, 4}
    assert sorted(s.sample(lambda: s.number(1, 5), 5)) == [1, 2, 3, 4, 5]


def test_words_of_frames_are_no_values() -> None:
    for held_out in (False, True):
        s = Source("values", held_out)
        assert not {s.noun() for _ in range(3000)} & {*FILLERS, "choice", "value", "first"}
