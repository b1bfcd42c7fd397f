"""Options of every system: whatever is given, it is taken or refused in one line that names the option."""

import dataclasses

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from serving import registry
from serving.errors import UserError

pytestmark = pytest.mark.cpu

OPTIONS = [(name, option) for name in registry.names() for option in registry.all_options(name, {})]
junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(
        st.text(max_size=2), st.one_of(st.none(), st.text(max_size=2), st.floats(), st.integers()), max_size=2
    ),
)


@given(st.sampled_from(OPTIONS), junk)
@example(("swap", "keep_alive_s"), -1)
@example(("swap", "keep_alive_s"), "soon")
@example(("swap", "link_gbps"), 0)
@example(("quota", "quotas"), {"a": "half"})
@example(("elastic-placement", "slo_scales"), {"a": None})
def test_any_value_of_any_option_is_taken_or_refused_in_one_line(option, value):
    system, name = option
    try:
        registry.create(system, {name: value})
    except UserError as error:
        assert "\n" not in str(error) and (
            name in str(error) or name in ("contention", "interference", "slice_s", "switch_s")
        )
        return
    taken = registry.all_options(system, {name: value})[name]
    assert taken == value


def test_an_unknown_system_and_an_unknown_option_list_the_known():
    with pytest.raises(UserError, match=f"unknown system 'nosuch'; known: {', '.join(registry.names())}"):
        registry.create("nosuch")
    with pytest.raises(UserError, match="system 'swap' has no option 'page_byte'; known: max_batch"):
        registry.create("swap", {"page_byte": 1})


@pytest.mark.parametrize(
    ("system", "options", "message"),
    [
        ("swap", {"keep_alive_s": "soon"}, "keep_alive_s is 'soon'; it must be a number"),
        ("swap", {"link_gbps": "fast"}, "link_gbps is 'fast'; it must be a number or null"),
        ("swap", {"prefetch": 1}, "prefetch is 1; it must be true or false"),
        ("static", {"max_batch": 2.5}, "max_batch is 2.5; it must be a whole number"),
        ("crosspool", {"control": None}, "control is None; it must be text"),
        ("quota", {"quotas": [1]}, r"quotas is \[1\]; it must be a mapping"),
    ],
)
def test_a_value_of_the_wrong_kind_is_told_the_right_one(system, options, message):
    with pytest.raises(UserError, match=message):
        registry.create(system, options)


def test_every_system_has_what_every_engine_has():
    common = {
        "max_batch",
        "prefill_chunk",
        "page_bytes",
        "max_running",
        "max_queued",
        "queue_deadline_s",
        "timeline_dir",
    }
    for name in registry.names():
        options = registry.all_options(name, {})
        assert common <= set(options)
        assert dataclasses.is_dataclass(registry.create(name).options)
