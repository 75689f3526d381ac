"""Reading tables of runs: names, units, splits, weights, and what is refused."""

import numpy as np
import pytest

from kling_jax.errors import DataError
from kling_jax.scaling import table

HEAD = "params,tokens,loss"
ROWS = ["1e8,2e9,3.1", "2e8,2e9,2.9", "1e8,8e9,2.8"]


def read(tmp_path, text, units=None, name="runs.csv"):
  path = tmp_path / name
  path.write_text(text)
  return table.read(path, units)


def test_plain_table(tmp_path):
  runs = read(tmp_path, "\n".join([HEAD, *ROWS]))
  np.testing.assert_array_equal(runs.params, [1e8, 2e8, 1e8])
  np.testing.assert_array_equal(runs.weight, 1)
  assert len(runs) == runs.runs == 3 and not runs.holdout.any() and runs.lr is None and not runs.warnings


@pytest.mark.parametrize(
  "head",
  ["N,D,loss", "Model Size,Training Tokens,Loss", "n_params,T,val_loss", "params_active_precise,tokens,final_loss"],
)
def test_names_of_published_tables(tmp_path, head):
  runs = read(tmp_path, "\n".join([head, *ROWS]))
  np.testing.assert_array_equal(runs.tokens, [2e9, 2e9, 8e9])
  np.testing.assert_array_equal(runs.loss, [3.1, 2.9, 2.8])


def test_json_lines_and_other_columns(tmp_path):
  first = '{"params":100000000,"tokens":2e9,"loss":3.1,"run_name":"a","width":3}'
  text = first + "\n" + first.replace("2e9", "4e9") + "\n"
  runs = read(tmp_path, text, name="runs.jsonl")
  assert len(runs) == 2 and runs.runs == 1


def test_tokens_from_flops(tmp_path):
  runs = read(tmp_path, "Model Size,Training FLOP,loss\n1e8,1.2e18,3.1\n2e8,2.4e18,3.0\n")
  np.testing.assert_allclose(runs.tokens, 2e9)
  assert "flops / (6 params)" in runs.warnings[0]


def test_split_weight_and_stderr(tmp_path):
  runs = read(tmp_path, "params,tokens,loss,split,weight\n1e8,2e9,3.1,train,4\n2e8,2e9,2.9,Test,1\n3e8,2e9,2.8,,1\n")
  assert runs.has_split and runs.holdout.tolist() == [False, True, False]
  assert runs.weight.tolist() == [4, 1, 1] and not runs.measured
  assert len(runs.fitted) == 2 and runs.held_out.params.tolist() == [2e8]
  runs = read(tmp_path, "params,tokens,loss,loss_stderr\n1e8,2e9,3.1,0.1\n2e8,2e9,2.9,0.2\n")
  np.testing.assert_allclose(runs.weight, [100, 25])
  assert runs.measured


def test_only_tuned_hold_outs_check_a_sweep(tmp_path):
  head = "params,tokens,loss,split,arm\n"
  rows = ["1e8,2e9,3.1,fit,tuned", "1e8,2e9,3.2,fit,long", "2e8,2e9,2.9,holdout,deepseek"]
  runs = read(tmp_path, head + "\n".join([*rows, "2e8,2e9,2.8,holdout,kaplan+tuned"]))
  assert runs.loss.tolist() == [3.1, 3.2, 2.8] and runs.holdout.tolist() == [False, False, True]
  assert "1 held-out rows of other arms" in runs.warnings[0]
  assert len(read(tmp_path, head + "\n".join(rows))) == 3, "no tuned hold-out: all are taken"


def test_units_are_multiplied(tmp_path):
  runs = read(tmp_path, "params,tokens,loss\n0.1,2,3.1\n0.2,4,3.0\n", {"params": 1e9, "tokens": 1e9})
  np.testing.assert_allclose(runs.tokens, [2e9, 4e9])


def test_diverged_runs_are_left_out_with_their_rows(tmp_path):
  runs = read(tmp_path, "\n".join([HEAD, *ROWS, "3e8,2e9,nan", "3e8,4e9,", "3e8,4e9,inf"]))
  assert len(runs) == 3
  assert "3 of 6 rows have no finite loss" in runs.warnings[0] and "4, 5, 6" in runs.warnings[0]


def test_batch_in_sequences_is_not_taken_for_tokens(tmp_path):
  runs = read(tmp_path, "params,tokens,loss,lr,bsz\n1e8,2e9,3.1,1e-3,64\n2e8,2e9,2.9,1e-3,64\n")
  assert runs.batch_tokens is None and "may count sequences" in runs.warnings[0]


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("params,tokens\n1e8,2e9\n", "no column 'loss'"),
    ("params,loss\n1e8,2\n", "no column 'tokens'"),
    (HEAD, "no table that can be read"),
    ("\n".join([HEAD, "1e8,2,3.1", "2e8,140,2.9"]), "look like billions.*--units tokens=1e9"),
    ("\n".join([HEAD, "0.017,2e9,3.1", "1.07,2e9,2.9"]), "look like billions.*--units params=1e9"),
    ("\n".join([HEAD, "17,2e9,3.1", "410,2e9,2.9"]), "look like millions.*--units params=1e6"),
    ("\n".join([HEAD, "1e9,2000,3.1", "2e9,140000,2.9"]), "tokens a parameter; tokens look like another unit"),
    ("\n".join([HEAD, "1700,2e10,3.1", "4100,2e10,2.9"]), "tokens a parameter; params look like another unit"),
    ("\n".join([HEAD, "1e8,-2e9,3.1"]), "row 1: -2e\\+09 must be a positive number"),
    ("\n".join([HEAD, "1e8,nan,3.1"]), "row 1: nan must be a positive number"),
    ("\n".join([HEAD, "1e8,2e9,-3.1"]), "row 1: -3.1 must be a positive number"),
    ("\n".join([HEAD, "big,2e9,3.1"]), "row 1: 'big' is no number"),
    ("params,tokens,loss,split\n1e8,2e9,3.1,perhaps\n", "neither train nor test"),
    ("params,tokens,loss,split\n1e8,2e9,3.1,test\n", "every row is held out"),
    ("params,tokens,val_loss,lm_loss\n1e8,2e9,3.1,3\n", "could each be loss"),
    ("params,tokens,loss,flop_rule\n1e8,2e9,3.1,6nt\n1e8,3e9,3.1,exact\n", "several rules"),
  ],
)  # fmt: skip
def test_what_cannot_be_meant_is_named(tmp_path, text, message):
  with pytest.raises(DataError, match=message):
    read(tmp_path, text)


def test_units_of_unknown_columns_and_missing_files(tmp_path):
  with pytest.raises(DataError, match="did you mean 'tokens'"):
    read(tmp_path, "\n".join([HEAD, *ROWS]), {"token": 1e9})
  with pytest.raises(DataError, match="no such file"):
    table.read(tmp_path / "none.csv")
  (tmp_path / "bad.parquet").write_bytes(b"PAR1 not")
  with pytest.raises(DataError, match="no table"):
    table.read(tmp_path / "bad.parquet")
