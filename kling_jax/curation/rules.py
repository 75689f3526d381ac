"""The rule language of selection: expressions over columns, three-valued where values are missing.

A rule is an expression that is true for the clips to keep. Its grammar is Python's own, read by `ast` and never run:

  comparisons      motion >= 0.01      0.01 <= motion <= 0.5      camera == "pan"      source in ("a.mp4", "b.mp4")
  quantiles        quantile(motion, 0.05) <= motion      over all clips that have the value, whatever other rules say
  arithmetic       width * height >= 921600      min(width, height) >= 256      aesthetic / 10 > 0.4
  words            len(caption) >= 20      abs(x)      log(x)      bins(motion, 0.01, 0.1) == 1
  logic            a >= 1 and not (b < 2 or missing(c))

A comparison with a missing value is unknown; unknown and false is false, unknown or true is true (Kleene), and a clip
for which the whole rule is unknown is dropped. `missing(x)` is how a rule lets it pass.
"""

import ast
import dataclasses
import math
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from kling_jax.curation.clip_columns import ClipColumns
from kling_jax.errors import UsageError

BALANCE = ("cap", "temper")
DUPLICATE = "duplicate"  # the step between rules and balancing
FUNCTIONS = ("abs", "bins", "len", "log", "max", "min", "missing", "quantile")
_LONGEST = 2000  # characters of an expression
_COMPARE: dict[type, Callable[[Any, Any], Any]] = {
  ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq,
  ast.NotEq: operator.ne,
}  # fmt: skip
_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
  ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip
_NAMED = re.compile(r"\s*([A-Za-z][\w .-]{0,63}):\s*(?!=)(.*)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Rule:
  """What to keep, and under which name a clip is dropped otherwise.

  Attributes:
    name: stands in the reason of a dropped clip and in the funnel.
    keep: the expression; or `cap(...)` or `temper(...)`, see `balance`.
    scorers: {column: names of the scorers whose unit the rule's numbers are in}; other scorers are refused.
    hint: how to get the columns that the rule wants.
  """

  name: str
  keep: str
  scorers: tuple[tuple[str, tuple[str, ...]], ...] = ()
  hint: str = ""

  def __post_init__(self) -> None:
    if not self.name or ":" in self.name or self.name.startswith("duplicate of"):
      raise UsageError(f"{self.name!r} is no name for a rule: wants words without a colon")
    try:
      self._check_form()
    except RecursionError as error:
      raise UsageError(f"rule {self.keep[:40]!r}... is nested too deeply") from error

  def _check_form(self) -> None:
    tree = parse_expression(self.keep)
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and tree.func.id in BALANCE:
      if len(tree.args) < 2 or any(key.arg != "best" for key in tree.keywords):
        raise UsageError(f"rule {self.keep!r}: wants {tree.func.id}(number, column, ...), and best=column if you like")
      for part in [*tree.args, *(key.value for key in tree.keywords)]:
        _check(part, self.keep)
      if not isinstance(tree.args[0], ast.Constant) or not isinstance(tree.args[0].value, int | float):
        raise UsageError(f"rule {self.keep!r}: {tree.func.id} starts with a number")
    else:
      _check(tree, self.keep)
      if not isinstance(tree, ast.Compare | ast.BoolOp | ast.UnaryOp | ast.Call | ast.Name):
        raise UsageError(f"rule {self.keep!r} is no statement about a clip; for example motion >= 0.01")
    if "safety" in guarded(tree):
      raise UsageError(f"rule {self.keep!r}: a clip whose safety nobody measured is not a safe one; leave missing out")

  @property
  def tree(self) -> ast.expr:
    return parse_expression(self.keep)

  @property
  def balances(self) -> bool:
    """Whether the rule looks at the other clips that are left, and not at a clip alone."""
    tree = self.tree
    return isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and tree.func.id in BALANCE

  @property
  def columns(self) -> tuple[str, ...]:
    """Names of the columns that it reads, in order."""
    return names(self.tree)


def parse(text: str) -> Rule:
  """Reads `EXPRESSION` or `name: EXPRESSION`; a rule without a name is called after its columns.

  Raises:
    UsageError: it is no rule.
  """
  match = _NAMED.fullmatch(text)
  if match:
    return Rule(match[1].strip(), match[2].strip())
  columns = names(parse_expression(text))
  return Rule(" ".join(columns[:3]) or "rule", text.strip())


def parse_all(texts: Iterable[str | Rule]) -> tuple[Rule, ...]:
  """Several rules; unnamed ones that would share a name are numbered.

  Raises:
    UsageError: one is no rule, or a name that was given stands twice.
  """
  found: list[Rule] = []
  for text in texts:
    rule = text if isinstance(text, Rule) else parse(text)
    named = isinstance(text, Rule) or _NAMED.fullmatch(text) is not None
    taken = {other.name for other in found}
    if rule.name in taken:
      if named:
        raise UsageError(f"two rules are called {rule.name!r}; name one of them otherwise: 'other name: {rule.keep}'")
      number = next(k for k in range(2, len(found) + 3) if f"{rule.name} {k}" not in taken)
      rule = dataclasses.replace(rule, name=f"{rule.name} {number}")
    found.append(rule)
  return tuple(found)


def parse_expression(text: str) -> ast.expr:
  """The syntax tree of an expression, not yet checked for what it holds.

  Raises:
    UsageError: it is none, or far too long.
  """
  if len(text) > _LONGEST:
    raise UsageError(f"rule {text[:40]!r}... has {len(text)} characters; the limit is {_LONGEST}")
  try:
    return ast.parse(text.strip(), mode="eval").body
  except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
    why = error.msg if isinstance(error, SyntaxError) else "it cannot be read"
    raise UsageError(f"rule {text!r}: {why}; for example motion >= 0.01, or 0.1 <= vtss <= 0.5") from error


def _check(node: ast.AST, text: str) -> None:
  """Refuses everything that is not in the grammar; nothing of the text is ever executed."""
  if isinstance(node, ast.Constant):
    value = node.value
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    if not isinstance(value, str) and not number:
      raise UsageError(f"rule {text!r}: {ast.unparse(node)} is no number and no text")
  elif isinstance(node, ast.Call):
    _check_call(node, text)
  elif isinstance(node, ast.Compare):
    for op, right in zip(node.ops, node.comparators, strict=True):
      if isinstance(op, ast.In | ast.NotIn):
        if not isinstance(right, ast.Tuple | ast.List | ast.Set):
          raise UsageError(f"rule {text!r}: `in` wants a list of values, for example source in ('a', 'b')")
        if not all(isinstance(item, ast.Constant) for item in right.elts):
          raise UsageError(f"rule {text!r}: the list after `in` holds something else than values")
        for item in right.elts:
          _check(item, text)
      elif type(op) not in _COMPARE:
        raise UsageError(f"rule {text!r}: wants one of < <= > >= == != in")
      else:
        _check(right, text)
    _check(node.left, text)
  elif isinstance(node, ast.BoolOp):
    for part in node.values:
      _check(part, text)
  elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
    _check(node.operand, text)
  elif isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
    _check(node.left, text)
    _check(node.right, text)
  elif not isinstance(node, ast.Name):
    raise UsageError(f"rule {text!r}: {ast.unparse(node)!r} is not part of the rule language")


def _check_call(node: ast.Call, text: str) -> None:
  name = node.func.id if isinstance(node.func, ast.Name) else ast.unparse(node.func)
  if name not in FUNCTIONS:
    raise UsageError(f"rule {text!r}: unknown function {name}; known: {', '.join((*FUNCTIONS, *BALANCE))}")
  least = {"quantile": 2, "bins": 2, "min": 2, "max": 2}.get(name, 1)
  most = 2 if name == "quantile" else 64 if least == 2 else 1
  if node.keywords or not least <= len(node.args) <= most:
    raise UsageError(f"rule {text!r}: {name} does not take these arguments")
  numbers = node.args[1:] if name in ("quantile", "bins") else []
  values = [_constant(part) for part in numbers]
  if any(value is None for value in values) or (name == "quantile" and not 0 <= (values[0] or 0) <= 1):
    raise UsageError(f"rule {text!r}: wants quantile(column, 0.05) with a share from 0 to 1, and bins(column, 1, 2, 3)")
  if name == "bins" and values != sorted(set(values)):  # type: ignore[type-var]
    raise UsageError(f"rule {text!r}: the edges of bins do not ascend")
  for part in node.args:
    _check(part, text)


def _constant(node: ast.expr) -> float | None:
  sign = 1.0
  if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
    node, sign = node.operand, -1.0
  is_number = isinstance(node, ast.Constant) and isinstance(node.value, int | float)
  return sign * float(node.value) if is_number else None  # type: ignore[attr-defined]


def guarded(tree: ast.expr) -> set[str]:
  """Names of the columns that the expression asks `missing` about."""
  asked = [call for call in _calls(tree) if call.func.id == "missing"]  # type: ignore[attr-defined]
  return {name for call in asked for name in names(call)}


def _calls(tree: ast.expr) -> list[ast.Call]:
  return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]


def parse_value(text: str) -> ast.expr:
  """The tree of an expression that is a value of a clip, such as `width * height`.

  Raises:
    UsageError: it is none.
  """
  tree = parse_expression(text)
  _check(tree, text)
  return tree


def names(tree: ast.AST) -> tuple[str, ...]:
  """Names of the columns in an expression, in order."""
  called = {id(call.func) for call in ast.walk(tree) if isinstance(call, ast.Call)}
  found = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in called]
  return tuple(dict.fromkeys(node.id for node in sorted(found, key=lambda n: (n.lineno, n.col_offset))))


# ---- evaluation ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Value:
  """An expression's value for every clip: kind number, truth, text (codes into words) or word (one constant text)."""

  kind: str
  values: Any
  known: Any
  words: tuple[str, ...] = ()


class Evaluator:
  """Evaluates expressions over columns; `quantiles` collects {"quantile(motion, 0.05)": value} on the way."""

  def __init__(self, columns: ClipColumns):
    self.columns = columns
    self.quantiles: dict[str, float] = {}

  def truth(self, rule: Rule) -> tuple[np.ndarray, np.ndarray]:
    """(true, known), each (N,) bool; true is false where not known.

    Raises:
      UsageError: the expression mixes kinds. DataError: a column is missing.
    """
    value = self.value(rule.tree)
    if value.kind != "truth":
      raise UsageError(f"rule {rule.keep!r} says nothing that is true or false; for example motion >= 0.01")
    shape = (len(self.columns),)
    known = np.broadcast_to(value.known, shape)
    return np.broadcast_to(value.values, shape) & known, known

  def value(self, node: ast.expr) -> Value:
    if isinstance(node, ast.Constant):
      return Value("word" if isinstance(node.value, str) else "number", node.value, np.True_)
    if isinstance(node, ast.Name):
      column = self.columns[node.id]
      return Value(column.kind, column.values, column.known, column.words)
    if isinstance(node, ast.Call):
      return self._call(node)
    if isinstance(node, ast.UnaryOp):
      part = self._of(node.operand, "truth" if isinstance(node.op, ast.Not) else "number")
      return dataclasses.replace(part, values=~part.values if part.kind == "truth" else -part.values)
    if isinstance(node, ast.BinOp):
      left, right = self._of(node.left, "number"), self._of(node.right, "number")
      with np.errstate(all="ignore"):
        values = _ARITHMETIC[type(node.op)](np.asarray(left.values, np.float64), right.values)
      return Value("number", values, left.known & right.known & np.isfinite(values))
    if isinstance(node, ast.BoolOp):
      return self._logic(node)
    assert isinstance(node, ast.Compare)  # `_check` let nothing else pass
    return self._comparison(node)

  def _of(self, node: ast.expr, kind: str) -> Value:
    value = self.value(node)
    if value.kind != kind:
      raise UsageError(f"{ast.unparse(node)!r} is a {value.kind}, wanted is a {kind}")
    return value

  def _logic(self, node: ast.BoolOp) -> Value:
    parts = [self._of(part, "truth") for part in node.values]
    decides = isinstance(node.op, ast.Or)  # a known truth decides an or, a known falsehood an and
    decided, known = np.False_, np.True_
    for part in parts:
      decided = decided | (part.known & (part.values == decides))
      known = known & part.known
    return Value("truth", decided if decides else ~decided & known, known | decided)

  def _comparison(self, node: ast.Compare) -> Value:
    result: Value | None = None
    left = node.left
    for op, right in zip(node.ops, node.comparators, strict=True):
      if isinstance(op, ast.In | ast.NotIn):
        items = right.elts  # type: ignore[attr-defined]
        parts = [self._compare(left, item, operator.eq) for item in items]
        known = parts[0].known if parts else np.True_
        values = np.any(np.broadcast_arrays(*(part.values for part in parts)), axis=0) if parts else np.False_
        link = Value("truth", ~values if isinstance(op, ast.NotIn) else values, known)
      else:
        link = self._compare(left, right, _COMPARE[type(op)])
      if result is None:
        result = link
      else:
        decided = (result.known & ~result.values) | (link.known & ~link.values)
        known = (result.known & link.known) | decided
        result = Value("truth", ~decided & known, known)
      left = right
    assert result is not None  # ast has at least one comparison
    return result

  def _compare(self, first: ast.expr, second: ast.expr, compare: Callable[[Any, Any], Any]) -> Value:
    left, right = self.value(first), self.value(second)
    known = left.known & right.known
    if left.kind == right.kind == "number":
      return Value("truth", compare(left.values, right.values), known)
    text, word = (left, right) if left.kind == "text" else (right, left)
    if text.kind == "text" and word.kind == "word" and compare in (operator.eq, operator.ne):
      table = np.array([bool(compare(entry, word.values)) for entry in text.words] or [False])
      return Value("truth", table[text.values], known)
    what = f"{ast.unparse(first)!r} ({left.kind}) and {ast.unparse(second)!r} ({right.kind})"
    raise UsageError(f"cannot compare {what}: numbers with numbers, a text with == != in")

  def _call(self, node: ast.Call) -> Value:
    name = node.func.id  # type: ignore[attr-defined]
    if name == "missing":
      part = self.value(node.args[0])
      return Value("truth", ~np.asarray(part.known), np.True_)
    if name == "len":
      part = self._of(node.args[0], "text")
      lengths = np.array([len(word) for word in part.words] or [0], np.float64)
      return Value("number", lengths[part.values], part.known)
    parts = [self._of(argument, "number") for argument in node.args]
    known = parts[0].known
    if name == "quantile":
      return self._quantile(node, parts[0])
    if name == "bins":
      return Value("number", np.searchsorted([p.values for p in parts[1:]], parts[0].values, "right"), known)
    if name in ("min", "max"):
      for part in parts[1:]:
        known = known & part.known
      reduce = np.minimum if name == "min" else np.maximum
      values = parts[0].values
      for part in parts[1:]:
        values = reduce(values, part.values)
      return Value("number", values, known)
    with np.errstate(all="ignore"):
      values = np.abs(parts[0].values) if name == "abs" else np.log(parts[0].values)
    return Value("number", values, known & np.isfinite(values))

  def _quantile(self, node: ast.Call, part: Value) -> Value:
    text = ast.unparse(node)
    if text not in self.quantiles:
      share = _constant(node.args[1]) or 0.0
      values = np.broadcast_to(part.values, (len(self.columns),))[np.broadcast_to(part.known, (len(self.columns),))]
      self.quantiles[text] = float(np.quantile(values, share)) if len(values) else math.nan
    value = self.quantiles[text]
    return Value("number", value, np.bool_(math.isfinite(value)))


def facts(rule: Rule, columns: ClipColumns, row: int) -> str:
  """The values of a rule's columns for one clip: "motion 0.0003, fps 24"."""
  parts = []
  for name in rule.columns:
    column = columns[name] if name in columns.names else None
    if column is None or not column.known[row]:
      parts.append(f"{name} unknown")
    elif column.kind == "text":
      word = column.words[column.values[row]]
      parts.append(f"{name} {word[:60]!r}")
    else:
      value = column.values[row]
      parts.append(f"{name} {value:.6g}" if column.kind == "number" else f"{name} {bool(value)}".lower())
  return ", ".join(parts)


def stated(rule: Rule, quantiles: dict[str, float]) -> str:
  """The rule with the quantiles that it met: "quantile(motion, 0.05) <= motion, quantile(motion, 0.05) = 0.0123"."""
  used = [text for call in _calls(rule.tree) if (text := ast.unparse(call)) in quantiles]
  return ", ".join([rule.keep, *(f"{text} = {quantiles[text]:.6g}" for text in dict.fromkeys(used))])


def limits(rule: Rule) -> tuple[str, float | None, float | None] | None:
  """(column, least, most) of a rule that is a plain range of one column, None for an open end; else None."""
  tree = rule.tree
  if not isinstance(tree, ast.Compare):
    return None
  parts = [tree.left, *tree.comparators]
  names_at = [k for k, part in enumerate(parts) if isinstance(part, ast.Name)]
  if len(names_at) != 1 or any(_constant(part) is None for k, part in enumerate(parts) if k not in names_at):
    return None
  least: float | None = None
  most: float | None = None
  for k, op in enumerate(tree.ops):
    if names_at[0] not in (k, k + 1) or not isinstance(op, ast.Lt | ast.LtE | ast.Gt | ast.GtE):
      return None
    on_left = names_at[0] == k
    value = _constant(parts[k + 1 if on_left else k])
    above = isinstance(op, ast.Gt | ast.GtE) == on_left
    if (least if above else most) is not None:
      return None
    least, most = (value, most) if above else (least, value)
  return parts[names_at[0]].id, least, most  # type: ignore[attr-defined]


def rule_of(reason: str) -> str:
  """The name of the rule in a status_reason: what a funnel counts."""
  return DUPLICATE if reason.startswith("duplicate of ") else reason.partition(":")[0]


def to_json(rules: Sequence[Rule]) -> list[dict[str, Any]]:
  """[{name, keep, scorers, hint}], the last two where there are any."""
  full = [{**dataclasses.asdict(rule), "scorers": {name: list(who) for name, who in rule.scorers}} for rule in rules]
  return [{key: value for key, value in entry.items() if value} for entry in full]


def from_json(value: Any, where: str) -> tuple[Rule, ...]:
  """Reads a list of texts ("name: expression") and objects {name, keep, scorers, hint}.

  Raises:
    UsageError: it has another form, or an entry is no rule.
  """
  if isinstance(value, dict) and "rules" in value:
    value = value["rules"]
  if not isinstance(value, list):
    raise UsageError(f"{where}: wants a list of rules, or an object with one under `rules`")
  found: list[str | Rule] = []
  for entry in value:
    if isinstance(entry, str):
      found.append(entry)
    elif (
      isinstance(entry, dict) and set(entry) <= {"name", "keep", "scorers", "hint"} and {"name", "keep"} <= set(entry)
    ):
      scorers = tuple((str(name), tuple(map(str, who))) for name, who in entry.get("scorers", {}).items())
      found.append(Rule(str(entry["name"]), str(entry["keep"]), scorers, str(entry.get("hint", ""))))
    else:
      raise UsageError(f"{where}: {str(entry)[:80]} is neither 'name: expression' nor an object with name and keep")
  return parse_all(found)
