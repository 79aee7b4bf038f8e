import pytest

from lottery_callbacks.functional.steps import Step


@pytest.mark.parametrize(
    ("text", "count", "unit", "iterations"),
    [
        ("0it", 0, "it", 0),
        ("500it", 500, "it", 500),
        ("0ep", 0, "ep", 0),
        ("10ep", 10, "ep", 9170),
        (" 2ep ", 2, "ep", 1834),
    ],
)
def test_step_strings_count_iterations_or_epochs(text, count, unit, iterations):
    step = Step.parse(text)
    assert (step.count, step.unit) == (count, unit)
    assert step.in_iterations(per_epoch=917) == iterations
    assert str(step) == text.strip()


@pytest.mark.parametrize(
    "text", ["", "500", "it", "ten ep", "-1it", "1.5ep", "5 it", "5its", "5IT", "5it 3ep", 500, None]
)
def test_anything_else_is_refused_with_both_forms(text):
    with pytest.raises(
        ValueError, match=r"is no step string: write iterations as '500it' or epochs as '10ep'$"
    ) as error:
        Step.parse(text)
    assert str(error.value).startswith(repr(text))


def test_steps_compare_by_value():
    assert Step.parse("3ep") == Step(3, "ep")
    assert Step.parse("3ep") != Step.parse("3it")
