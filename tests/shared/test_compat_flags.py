import dataclasses

from glimmer.shared.compat_flags import FAMILIES, FLAGS, VARIABLES
from glimmer.shared.config import ServeConfig

FIELDS = {
    name
    for field in dataclasses.fields(ServeConfig)
    for name in (field.name, field.metadata.get("alias"))
}


def test_a_flag_has_one_meaning() -> None:
    names = [name for flag in FLAGS for name in (flag.name, *flag.aliases)]
    assert len(names) == len(set(names))
    assert not FIELDS & set(names)
    assert not [n for n in FIELDS if n and n.startswith(tuple(FAMILIES))]
    assert not {f.metadata.get("env") for f in dataclasses.fields(ServeConfig)} & set(VARIABLES)


def test_every_flag_says_why() -> None:
    assert all(flag.reason and not flag.reason.endswith(".") for flag in FLAGS)
    assert all(flag.kind in "flag int float str append".split() for flag in FLAGS)
    assert all(flag.default in flag.choices for flag in FLAGS if flag.choices and flag.default)
