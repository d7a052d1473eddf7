from ir.smoothing import Policy
from passes.policies import BEST, Search, among, crossed, tables


def error(policy: Policy) -> float:
    return (policy.alpha - 0.4) ** 2 + (float(policy.q) - 0.98) ** 2 + 0.01


LINE = [Policy(index / 10, 1.0) for index in range(1, 10)]
OTHER = [Policy(0.5, q) for q in (0.9, 0.96, 0.98, 0.99, 0.995, 0.999, 1.0)]


def test_the_best_of_a_grid():
    found = among(LINE, error)
    assert found.taken == Policy(0.4, 1.0) and list(found.errors) == LINE


def test_the_best_of_each_line_are_crossed():
    found = crossed(LINE, OTHER, error)
    assert found.taken == Policy(0.4, 0.98)
    assert {*LINE, *OTHER} < set(found.errors) and len(found.errors) <= len(LINE) + len(OTHER) + BEST**2
    assert all(value == error(policy) for policy, value in found.errors.items())


def test_tables_are_means_over_groups():
    a, b = Policy(0.3, 1.0), Policy(0.5, 1.0)
    found = tables({"up": Search(a, {a: 1.0, b: 4.0}), "down": Search(b, {a: 9.0, b: 1.0}), "out": Search(a, {a: 2.0})})
    assert [row["alpha"] for row in found["smoothing"]] == [0.3, 0.5, 0.3]
    rows = {row["alpha"]: row for row in found["policies"]}
    assert rows[0.3]["error over the best"] == round((1 + 3 + 1) / 3, 4) and rows[0.5]["error over the best"] == 1.5
    assert [(row["groups"], row["taken"]) for row in rows.values()] == [(3, 2), (2, 1)]


def test_no_error_at_all_is_as_good_as_the_best():
    a = Policy(0.3, "mean")
    assert tables({"up": Search(a, {a: 0.0})})["policies"][0]["error over the best"] == 1.0
