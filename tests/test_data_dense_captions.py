"""Dense captions in the published layouts, mapped to spans by overlap; malformed rows are named and left out."""

import json

import pytest

from kling_jax.data import dense_captions, quarantine
from kling_jax.errors import DataError, UsageError

VRIPT = {
  "meta": {"video_id": "0aB-_x", "video_title": "t", "num_clips": 2, "integrity": True},
  "data": {
    f"0aB-_x-Scene-00{k}": {
      "video_id": "0aB-_x", "clip_id": f"0aB-_x-Scene-00{k}", "video_title": "t",
      "caption": {"shot_type": "wide", "camera_movement": "static", "content": text, "scene_title": "s"},
      "voiceover": [""],
    }
    for k, text in ((1, "A man bakes bread."), (2, "He eats it."))
  },
}  # fmt: skip
ACTIVITYNET = {
  "v_one": {
    "duration": 30.0,
    "timestamps": [[0.0, 10.0], [9.0, 20], [12.0, 11.0]],
    "sentences": ["A dog runs.", " It jumps\n up. ", "Backwards."],
  },
  "v_two": {"duration": 9.0, "timestamps": [[0, 9]], "sentences": ["a", "b"]},
  "v_three": 7,
}
WEBVID = (
  "videoid,contentUrl,duration,page_dir,name\n"
  '21179416,https://example.org/a.mp4,PT00H00M11S,006001_006050,"Aerial shot, winter forest"\n'
  "nine,https://example.org/b.mp4,PT00H00M11S,006001_006050,Words\n"
  "5,https://example.org/c.mp4,PT00H00M11S,006001_006050,\n"
)
PANDA = (
  "videoID,url,timestamp,caption,matching_score\n"
  "---ujM,https://example.org/v,\"[['0:00:21.354', '0:00:29.362'], ['0:00:35.401', '0:00:42.975']]\","
  '"[\'A rhino, walking.\', ""It\'s a lion.""]","[0.49, 0.42]"\n'
  "x1,https://example.org/w,\"[['0:00:01.000', '0:00:02.000']]\",\"['a', 'b']\",[0.1]\n"
  "x2,https://example.org/w,__import__('os'),\"['a']\",[0.1]\n"
  "x3,https://example.org/w,\"[['0:00:03.000', '0:00:02.000']]\",\"['a']\",[0.1]\n"
)
LINES = (
  '{"file": "day/a.mp4", "caption": "A cat sleeps.", "start_s": 0, "end_s": 4}\n\n{broken\n'
  '{"file": "day/a.mp4", "caption": "It wakes.", "start_s": 4, "end_s": 8.5}\n'
  '{"file": "b.mp4", "caption": "All of it."}\n{"file": "b.mp4"}\n{"file": "b\\u202e.mp4", "caption": "x"}\n'
)


def written(folder, name: str, content) -> str:
  path = folder / name
  path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
  return str(path)


def test_activitynet(tmp_path):
  captions = dense_captions.read(written(tmp_path, "train.json", ACTIVITYNET), quarantine=tmp_path / "q.jsonl")
  assert captions.of("v_one", 0, 4) == "A dog runs." == captions.of("one.mp4", 0, 4)
  assert captions.of("v_one", 8, 12) == "A dog runs. It jumps up."  # each covers at least half of the four seconds
  assert captions.of("v_one", 9.5, 13.5) == "It jumps up."
  assert captions.of("v_one", 20, 24) == captions.of("v_four", 0, 4) == ""
  refused = [(verdict.source, verdict.detail) for verdict in captions.refused]
  assert [source for source, _ in refused] == [
    "train.json: v_one, sentence 3", "train.json: v_two", "train.json: v_three"
  ]  # fmt: skip
  assert "0 <= start < end" in refused[0][1] and "1 timestamps for 2 sentences" in refused[1][1]
  assert [entry.reason for entry in quarantine.read(tmp_path / "q.jsonl")] == ["unreadable"] * 3


@pytest.mark.parametrize("layout", ["file", "folder", "lines"])
def test_vript(tmp_path, layout):
  if layout == "lines":
    path = written(tmp_path, "long.jsonl", json.dumps(VRIPT) + "\n" + json.dumps({"meta": {}, "data": 3}) + "\n")
  else:
    path = written(tmp_path, "0aB-_x_caption.json", VRIPT)
    if layout == "folder":
      written(tmp_path, "other.json", "no JSON")
      path = str(tmp_path)
  captions = dense_captions.read(path)
  assert captions.of("0aB-_x/0aB-_x-Scene-002.mp4", 1, 2) == "He eats it."
  assert captions.place("clips/0aB-_x-Scene-002.mp4") == ("0aB-_x", 2) and captions.place("a.mp4") is None
  assert len(captions.refused) == (layout != "file")


def test_webvid(tmp_path):
  captions = dense_captions.read(written(tmp_path, "results.csv", WEBVID))
  assert captions.of("006001_006050/21179416.mp4", 3, 7) == "Aerial shot, winter forest"
  assert [v.detail for v in captions.refused] == ["videoid 'nine' is no number", "a sentence is empty"]


def test_panda_70m(tmp_path):
  path = written(tmp_path, "panda.csv", PANDA)
  captions = dense_captions.read(path)
  assert captions.of("---ujM.mp4", 22, 26) == "A rhino, walking."
  assert captions.of("---ujM", 36, 40) == "It's a lion." and captions.of("---ujM", 30, 34) == ""
  assert [v.source for v in captions.refused] == ["panda.csv, row 2", "panda.csv, row 3", "panda.csv, row 4"]
  only = dense_captions.read(path, keep=lambda video: video.startswith("-"))
  assert set(only.sentences) == {"---ujM"}


def test_lines_of_a_folder(tmp_path):
  captions = dense_captions.read(written(tmp_path, "captions.jsonl", LINES))
  assert captions.of("day/a.mp4", 3, 6) == "It wakes." and captions.of("b.mp4", 100, 104) == "All of it."
  details = [v.detail for v in captions.refused]
  assert (
    len(details) == 3 and "no JSON" in details[0] and "'caption'" in details[1] and "control character" in details[2]
  )


def test_what_is_no_such_file_is_one_clear_line(tmp_path):
  with pytest.raises(DataError, match="do not exist"):
    dense_captions.read(tmp_path / "none.json")
  with pytest.raises(UsageError, match="did you mean 'vript'"):
    dense_captions.read(tmp_path, "vrpit")
  with pytest.raises(DataError, match="neither WebVid's nor Panda-70M's"):
    dense_captions.read(written(tmp_path, "x.csv", "a,b\n1,2\n"))
  with pytest.raises(DataError, match=r"not one sentence in it \(read as activitynet\); the first of 1 refused"):
    dense_captions.read(written(tmp_path, "x.json", {"v_a": 3}))
  with pytest.raises(DataError, match="cannot be read as JSON"):
    dense_captions.read(written(tmp_path, "y.json", "{"))


def test_shots_of_kling_split(tmp_path):
  shots = [{"video": "a.mp4", "shots": [{"start_s": 0, "end_s": 2.5}, {"start_s": 2.5, "end_s": 4.0}]}]
  assert dense_captions.read_shots(written(tmp_path, "s.json", shots)) == {"a.mp4": ((0.0, 2.5), (2.5, 4.0))}
  with pytest.raises(DataError, match="kling split VIDEO"):
    dense_captions.read_shots(written(tmp_path, "t.json", {"a": 1}))
  shots[0]["shots"].reverse()
  with pytest.raises(DataError, match="do not ascend"):
    dense_captions.read_shots(written(tmp_path, "u.json", shots))
