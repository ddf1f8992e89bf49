"""`import tinkex as tinker`: the surface of the newest official SDK, from the facts kept of it."""

from __future__ import annotations

import json

import pytest

from tests.official_sdk import page, port, sdk
from tinkex import types

SURFACE = port.snapshot()
ROWS = port.rows(SURFACE)


def test_every_difference_from_the_official_surface_has_its_reason():
    """A name, a parameter or a default that is missing breaks a script; only known ones may."""
    assert [] == [row.name for row in ROWS if row.state != "same" and not row.why]


@pytest.mark.parametrize("table", [port.ABSENT, port.DIFFERENT, port.ABSENT_TYPES])
def test_no_reason_is_left_for_what_is_there(table):
    """A reason that nothing needs is a claim about tinkex that is not true any more."""
    explained = {row.name.removeprefix("types.") for row in ROWS if row.state != "same"}

    assert [] == [name for name in table if name.split("(")[0] not in explained]


def test_the_comparison_finds_what_is_missing():
    """Whatever tinkex has, a surface with more has rows without a reason."""
    more = json.loads(json.dumps(SURFACE))
    more["names"].append("Quantizer")
    more["types"]["Quantizer"] = []
    methods = more["classes"]["TrainingClient"]
    methods["quantize"] = []
    methods["save_state"][1][2] = "3600"  # the default of ttl_seconds
    methods["forward"].insert(0, ["dtype", "POSITIONAL_OR_KEYWORD", None])
    del more["classes"]["ServiceClient"]

    unexplained = [row.name for row in port.rows(more) if row.state != "same" and not row.why]

    assert [
        "Quantizer",
        "TrainingClient.forward",
        "TrainingClient.quantize",
        "TrainingClient.save_state",
        "types.Quantizer",
    ] == sorted(unexplained)


def test_fields_of_the_common_types_are_those_of_the_official_ones():
    """Types that scripts make and read, by the names of their fields."""
    missing = {
        name: sorted(set(fields) - set(dir(getattr(types, name))))
        for name, fields in SURFACE["types"].items()
        if hasattr(types, name) and fields
    }

    assert port.OTHER_FIELDS == {name: fields for name, fields in missing.items() if fields}


@pytest.mark.slow
def test_the_facts_kept_are_those_of_the_installed_sdk():
    assert SURFACE == json.loads(sdk.surface(SURFACE["version"]))


def test_the_page_has_the_table_of_the_comparison():
    """`make conformance` writes it; `python -m tests.official_sdk.port` writes this part alone."""
    assert port.section(SURFACE) == page.part("port")


def test_the_newest_version_is_the_one_that_is_compared():
    assert sdk.VERSIONS[-1] == SURFACE["version"]
