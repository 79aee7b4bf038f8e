import pytest

from lottery_callbacks.messages import describe, one_of


def test_describe_cuts_long_lists():
    assert describe(["a", "b"]) == "a, b"
    assert describe([]) == ""
    assert describe(list("abcdefgh")) == "a, b, c, d, e, f, g, h"
    assert describe(list("abcdefghij")) == "a, b, c, d, e, f, g, h and 2 more"
    assert describe(list("abc"), most=1) == "a and 2 more"


def test_a_choice_is_given_back_or_refused_with_the_list():
    assert one_of("mode", "a", ("a", "b")) == "a"
    with pytest.raises(ValueError, match=r"^mode='c' is not known: choose one of a, b$"):
        one_of("mode", "c", ("a", "b"))
