"""The rule language against Python itself, three-valued logic, balancing laws, and refusals of everything else."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kling_jax.curation import balance, rules
from kling_jax.curation.clip_columns import ClipColumns
from kling_jax.curation.rules import Rule
from kling_jax.errors import DataError, UsageError


def columns(**values: list) -> ClipColumns:
  return ClipColumns(pa.table(values))


def truth(text: str, table: ClipColumns) -> list[bool | None]:
  true, known = rules.Evaluator(table).truth(rules.parse(text))
  return [bool(t) if k else None for t, k in zip(true, known, strict=True)]


_NUMBER = st.one_of(st.none(), st.integers(-3, 3).map(float))
_ATOM = st.sampled_from(
  ["a >= 1", "b < 0", "a <= b", "0 <= b <= 2", "a in (1, 2)", "missing(a)", "flag", "a not in (0,)"]
)
_RULE = st.recursive(
  _ATOM,
  lambda part: st.one_of(
    st.tuples(part, part).map(lambda p: f"({p[0]}) and ({p[1]})"),
    st.tuples(part, part).map(lambda p: f"({p[0]}) or ({p[1]})"),
    part.map(lambda p: f"not ({p})"),
  ),
  max_leaves=5,
)


def kleene(text: str, a: float | None, b: float | None, flag: bool | None) -> bool | None:
  """All ways to fill the gaps: what they agree on is known. Weaker than Kleene only where a variable stands twice."""
  outcomes = set()
  for x in [a] if a is not None else [-9.0, -1.0, 0.0, 0.5, 1.0, 2.0, 9.0]:
    for y in [b] if b is not None else [-9.0, -1.0, 0.0, 0.5, 1.0, 2.0, 9.0]:
      for f in [flag] if flag is not None else [False, True]:
        names = {"a": x, "b": y, "flag": f, "missing": lambda v, a=a: a is None}
        outcomes.add(bool(eval(text, {"__builtins__": {}}, names)))
  return outcomes.pop() if len(outcomes) == 1 else None


@settings(max_examples=150)
@given(_RULE, st.lists(st.tuples(_NUMBER, _NUMBER, st.sampled_from([None, False, True])), min_size=1, max_size=5))
def test_rules_say_what_python_says_and_nothing_where_values_are_missing(text, rows):
  a, b, flag = zip(*rows, strict=True)
  table = columns(
    a=pa.array(a, pa.float64()), b=pa.array(b, pa.float64()), flag=pa.array(flag, pa.bool_())
  )  # fmt: skip
  for found, row in zip(truth(text, table), rows, strict=True):
    wanted = kleene(text, *row)
    assert found is None or found == wanted
    if None not in row:
      assert found == wanted


def test_kleene_tables():
  table = columns(x=pa.array([1.0, 0.0, None]))
  assert truth("x > 0 and x < 5", table) == [True, False, None]
  assert truth("x > 0 or missing(x)", table) == [True, False, True]
  assert truth("x > 9 and x == x", columns(x=[1.0])) == [False]
  assert truth("not x > 0", table) == [False, True, None]
  assert truth("x > 5 and y > 0", columns(x=[1.0], y=pa.array([None], pa.float64()))) == [False]


def test_arithmetic_functions_and_texts():
  table = columns(w=[1920, 640], h=[1080, 360], s=["a.mp4", "ü"], m=[0.0, 0.2])
  assert truth("w * h >= 921600", table) == [True, False]
  assert truth("min(w, h) >= 400 and max(w, h, 1) < 2000", table) == [True, False]
  assert truth("w / m > 1", table) == [None, True]  # a division by zero is no number
  assert truth("log(m) > -5", table) == [None, True]
  assert truth("len(s) == 1", table) == [False, True]
  assert truth("s in ('ü', 'b') or s == 'a.mp4'", table) == [True, True]
  assert truth("'ü' != s", table) == [True, False]
  assert truth("abs(-m) >= 0.2", table) == [False, True]
  assert truth("bins(w, 1000, 1920) == 2", table) == [True, False]


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=40), st.floats(0, 1))
def test_quantiles_are_numpys_over_all_known_values(values, share):
  table = columns(x=pa.array([*values, None, float("nan")]))
  evaluator = rules.Evaluator(table)
  true, known = evaluator.truth(rules.parse(f"x >= quantile(x, {share!r})"))
  edge = np.quantile(values, share)
  assert true.tolist() == [value >= edge for value in values] + [False, False]
  assert known.tolist() == [True] * len(values) + [False, False]
  assert "= " in rules.stated(rules.parse(f"x >= quantile(x, {share!r})"), evaluator.quantiles)


@pytest.mark.parametrize(
  "text",
  [
    "", "motion", "1 + 1", "motion >=", ">= 1", "a >= 1; b", "__import__('os').system('x') == 0", "().__class__ == 1",
    "a.b > 1", "a[0] > 1", "lambda: 1", "[x for x in a] == 1", "f'{a}' == 'x'", "a > 1 if b else c", "open('x') > 1",
    "a in b", "a in (b,)", "a is None", "a > True", "a > None", "quantile(a, 2) < a", "quantile(a) < a",
    "bins(a, 2, 1) > 0",
    "min(a) > 1", "missing(a, b)", "(a := 1) > 0", "cap(0.5)", "cap(x, source)", "cap(1, source, worst=a)",
    "a ** 9 > 1",
    "-" * 1500 + "a > 1", "(" * 300 + "a" + ")" * 300 + " > 1", "a > 1" + " " * 3000, "a > 1e999", "a\x00 > 1",
    "x: y: a > 1",
    "duplicate of x: a > 1", "*a > 1", "a > 1j", "a > b'x'",
  ],
)  # fmt: skip
def test_everything_else_is_a_usage_error(text):
  with pytest.raises(UsageError):
    rule = rules.parse(text)
    if rule.name == "motion":  # a name alone may be a flag; only the column tells
      rules.Evaluator(columns(motion=[1.0])).truth(rule)


def test_kinds_do_not_mix_and_unknown_columns_are_named():
  table = columns(x=[1.0], s=["a"])
  for text in ("x == 'a'", "s > 1", "s < 'b'", "x and s == 'a'", "len(x) > 1", "abs(s) > 1", "not x"):
    with pytest.raises(UsageError):
      truth(text, table)
  with pytest.raises(DataError, match="did you mean 'x'"):
    truth("xx > 1", table)


def test_names_are_given_or_made():
  found = rules.parse_all(["motion >= 1", "motion <= 2", "slow one: motion < 1", "vtss*clarity > 1"])
  assert [rule.name for rule in found] == ["motion", "motion 2", "slow one", "vtss clarity"]
  with pytest.raises(UsageError, match="two rules"):
    rules.parse_all(["x: a > 1", "x: b > 1"])
  assert rules.from_json(rules.to_json(found), "f") == found
  hinted = (Rule("r", "a > 1", (("a", ("laion",)),), "do this"),)
  assert rules.from_json(rules.to_json(hinted), "f") == hinted


# ---- balancing -------------------------------------------------------------------------------------------------------


def taken(text: str, table: ClipColumns, seed: int = 0, left: np.ndarray | None = None) -> balance.Balance:
  left = np.ones(len(table), bool) if left is None else left
  ids = table.table["clip_id"].to_pylist()
  return balance.balance(rules.parse(text), rules.Evaluator(table), left, ids, seed)


@settings(max_examples=60)
@given(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=40), st.integers(1, 6), st.integers(0, 3))
def test_a_cap_holds_and_does_not_depend_on_the_order_of_the_table(sources, cap, seed):
  names = [f"c{k}" for k in range(len(sources))]
  table = columns(clip_id=names, source=pa.array(sources, pa.string()))
  one = taken(f"cap({cap}, source)", table, seed)
  for source in set(sources):
    mine = [s == source for s in sources]
    assert one.taken[mine].sum() == min(cap, sum(mine))
  turned = columns(clip_id=names[::-1], source=pa.array(sources[::-1], pa.string()))
  assert taken(f"cap({cap}, source)", turned, seed).taken[::-1].tolist() == one.taken.tolist()
  smaller = taken(f"cap({max(1, cap - 1)}, source)", table, seed).taken
  assert not (smaller & ~one.taken).any()


def test_a_cap_takes_the_best_where_it_is_told_and_looks_only_at_what_is_left():
  table = columns(clip_id=list("abcdef"), k=[1.0] * 6, v=[1.0, 6.0, 3.0, None, 5.0, 4.0])
  assert taken("cap(2, k, best=v)", table).taken.tolist() == [False, True, False, False, True, False]
  left = np.array([True, False, True, True, False, True])
  assert taken("cap(2, k, best=v)", table, left=left).taken.tolist() == [False, False, True, False, False, True]
  assert taken("cap(1, bins(v, 3.5))", table).taken.sum() == 3  # below, above, unknown
  with pytest.raises(UsageError):
    taken("cap(0, k)", table)


def test_tempering_flattens_groups():
  table = columns(clip_id=[str(k) for k in range(116)], s=["a"] * 100 + ["b"] * 16)
  assert taken("temper(0, s)", table).taken.all()
  assert taken("temper(1, s)", table).taken[:100].sum() == 16
  assert taken("temper(0.5, s)", table).taken[:100].sum() == 40  # 100 (16 / 100)^0.5
  with pytest.raises(UsageError):
    taken("temper(2, s)", table)


def test_weights_make_groups_count_alike():
  table = columns(s=["a"] * 30 + ["b"] * 10)
  kept = np.ones(40, bool)
  kept[:10] = False
  weights = balance.weights(rules.parse("temper(1, s)"), rules.Evaluator(table), kept)
  assert weights[kept].mean() == pytest.approx(1) and not weights[~kept].any()
  assert weights[:30].sum() == pytest.approx(weights[30:].sum())
  with pytest.raises(UsageError):
    balance.weights(rules.parse("cap(1, s)"), rules.Evaluator(table), kept)
