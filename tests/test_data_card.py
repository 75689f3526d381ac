"""The card of a clip set says what its table says, and `kling data verify` finds what is wrong with set and caches."""

import hashlib
import json
import pathlib

import numpy as np
import pytest

from kling_jax import cli
from kling_jax.data import cache, card, encode, records
from kling_jax.data.record import ClipRecord
from kling_jax.data.source import Score
from kling_jax.errors import DataError

RECIPE = '{"crf": 18}'
EVIL = "a|b <script> `x`\n# head"


@pytest.fixture
def made(tmp_path) -> pathlib.Path:
  """Six clips of three videos, 1 to 6 seconds at 10 per second, two of them dropped, two scorers of one score."""
  media = encode.encode(np.zeros((5, 32, 48, 3), np.uint8), fps=10)
  with records.RecordWriter(tmp_path / "set", RECIPE) as writer:
    for k in range(6):
      scores = {"sway": Score(float(k), "flow", "1" if k < 4 else "2")} | (
        {EVIL: Score(1.0, "x", "1")} if k == 0 else {}
      )
      writer.write(
        ClipRecord(f"c{k}", f"v{k // 2}", "s.mp4", 0, 10 * (k + 1), "1/10", 10.0, 48, 32, 5, index=k, scores=scores,
                   caption="words" if k else "", captioner="server" if k else "", caption_model="m" if k > 3 else "",
                   status="dropped" if k > 3 else "kept", status_reason="motion" if k > 3 else ""),
        media,
      )  # fmt: skip
  return tmp_path / "set"


def test_the_card_counts_what_the_table_holds(made):
  found = json.loads((made / card.CARD).read_text())
  assert (found["clips"], found["kept"], found["videos"]) == (6, 4, 3)
  assert found["hours"] == pytest.approx(21 / 3600) and found["hours_kept"] == pytest.approx(10 / 3600)
  assert found["seconds_a_clip"] == {"least": 1.0, "median": 3.5, "most": 6.0}
  assert found["sizes"] == {"48x32": 6} and found["dropped_by"] == {"motion": 2} and found["salvaged"] == 0
  assert found["captions"] == {"server": 3, "server m": 2} and found["licences"] == {"unknown": 6}
  assert found["recipe_hash"] == hashlib.sha256(RECIPE.encode()).hexdigest()[:16] and found["shards"] == 1
  assert found["bytes"] == sum(path.stat().st_size for path in (made / "records").iterdir())
  motion = [row for row in found["scores"] if row["name"] == "sway"]
  assert [(row["version"], row["clips"], row["least"], row["mean"], row["most"]) for row in motion] == [
    ("1", 4, 0.0, 1.5, 3.0), ("2", 2, 4.0, 4.5, 5.0),
  ]  # fmt: skip
  readme = (made / card.README).read_text()
  assert readme.startswith('---\nlicense: "unknown"') and "4 of 6 clips are kept" in readme
  assert "<script>" not in readme and "\n# head" not in readme and r"a\|b" in readme


def test_a_selection_and_stated_licences_change_the_card(made, tmp_path, capsys):
  assert cli.main(["select", "--input", str(made), "--keep", "index >= 2"]) == 0
  found = json.loads((made / card.CARD).read_text())
  assert found["kept"] == 4 and sum(found["dropped_by"].values()) == 2
  (tmp_path / "l.csv").write_text("video_id,licence\nv0,CC0\nv1,CC BY 4.0\n")
  capsys.readouterr()
  words = ["data", "card", "--input", str(made)]
  assert cli.main([*words, "--licence", "own", "--licences", str(tmp_path / "l.csv"), "--json"]) == 0
  assert json.loads(capsys.readouterr().out)["licences"] == {"CC0": 2, "CC BY 4.0": 2, "own": 2}
  assert cli.main([*words, "--licence", "mine"]) == 0
  assert json.loads((made / card.CARD).read_text())["licences"] == {"CC0": 2, "CC BY 4.0": 2, "mine": 2}
  assert cli.main(["data", "verify", "--input", str(made)]) == 0
  (made / card.LICENCES).write_text('{"default": 3}')
  with pytest.raises(DataError, match="licences are texts"):
    card.read_licences(made)
  (tmp_path / "l.csv").write_text("id,licence\nv0,CC0\n")
  assert cli.main([*words, "--licences", str(tmp_path / "l.csv")]) == 2


def test_verify_looks_at_the_card_at_stray_shards_and_into_caches(made):
  report = records.verify(made)
  assert report.ok and not report.notes
  about = cache.Card("latents", "codec", "w", "float32")
  with cache.Writer(about.folder(made), about) as writer:
    for name in ("c0", "gone"):
      writer.add(name, "5x16x16@8", np.arange(4, dtype=np.float32))
  (made / "records" / "clips-00007.array_record").write_bytes(b"left behind")
  report = records.verify(made)
  assert report.ok and "1 shards are no part" in report.notes[0] and "1 of 2 entries are of clips" in report.notes[1]
  assert "note: " in report.text()

  [shard] = about.folder(made).glob("*.safetensors")
  whole = shard.read_bytes()
  shard.write_bytes(whole[:-16] + np.float32("nan").tobytes() + whole[-12:])
  [problem] = records.verify(made).problems
  assert "1 entries hold values that are not finite" in problem
  shard.write_bytes(whole[:-3])
  assert "is damaged" in records.verify(made).problems[0]
  shard.write_bytes(whole)
  held = json.loads((made / card.CARD).read_text())
  (made / card.CARD).write_text(json.dumps(held | {"kept": 5}))
  assert "card.json says" in records.verify(made).problems[0]
  (made / card.CARD).write_text("{")
  assert "is damaged" in records.verify(made).problems[0]
  (made / card.CARD).unlink()
  assert records.verify(made).ok
