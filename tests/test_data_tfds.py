"""Clip sets as TFDS data sets: written and read without TensorFlow, in order, with the same clips."""

import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from kling_jax import errors
from kling_jax.data import encode, record, records, tfds_clips
from kling_jax.data import open as sources
from kling_jax.data.source import ClipSource, Score


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("clips")
  with records.RecordWriter(folder, "test") as writer:
    for k in range(6):
      media = encode.encode([np.full((32, 48, 3), 30 * k + 20, np.uint8)] * 4, fps=8)
      name = record.clip_id(record.content_hash(media), 0, 4, "1/8", "test")
      scores = {"motion": Score(float(k), "flow", "1")}
      status = "dropped" if k == 2 else "kept"
      header = record.ClipRecord(
        name, f"v{k}", "s", 0, 4, "1/8", 8.0, 48, 32, 4, caption=f"clip {k} ü", scores=scores, status=status
      )
      writer.write(header, media)
  return folder


@pytest.fixture(scope="module")
def folder(clips: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  return tfds_clips.write(clips, tmp_path_factory.mktemp("tfds"))


def test_the_kept_clips_come_back_in_order(clips: pathlib.Path, folder: pathlib.Path) -> None:
  ours, theirs = records.RecordSource(clips), tfds_clips.TfdsSource(folder)
  assert isinstance(theirs, ClipSource) and len(theirs) == len(ours) == 5
  for k in range(5):
    assert theirs.record(k) == ours.record(k) and theirs.info(k) == ours.info(k)
    times = np.array([0.0, 0.3])
    np.testing.assert_array_equal(theirs.frames(k, times, 16, 16), ours.frames(k, times, 16, 16))
  with pytest.raises(IndexError):
    theirs.info(5)


def test_plain_tfds_reads_it(folder: pathlib.Path) -> None:
  data = tfds.builder_from_directory(folder).as_data_source(split="train")
  assert len(data) == 5 and data[1]["caption"] == "clip 1 ü".encode()
  assert data[0]["media"][4:8] == b"ftyp"


def test_no_tensorflow_is_imported(folder: pathlib.Path) -> None:
  code = f"import sys; from kling_jax.data import tfds_clips as t; t.TfdsSource({str(folder)!r}).info(0); "
  code += "assert 'tensorflow' not in sys.modules and 'jax' not in sys.modules"
  subprocess.run([sys.executable, "-c", code], check=True)


def test_parts_copies_and_identity(folder: pathlib.Path, tmp_path: pathlib.Path, clips: pathlib.Path) -> None:
  source = tfds_clips.TfdsSource(folder)
  part = tfds_clips.TfdsSource(folder, "train[:2]")
  assert len(part) == 2 and part.fingerprint != source.fingerprint
  assert pickle.loads(pickle.dumps(source)).info(4) == source.info(4)
  again = tfds_clips.TfdsSource(tfds_clips.write(clips, tmp_path))
  assert again.fingerprint == source.fingerprint  # a copy of the same clips


def test_it_is_opened_by_name(folder: pathlib.Path) -> None:
  for spec in (str(folder), str(folder.parents[1]), f"tfds:{folder}"):
    assert type(sources.open_source(spec)) is tfds_clips.TfdsSource, spec


def test_what_is_no_clip_data_set_is_named(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  with pytest.raises(errors.DataError, match=r"no features\.json"):
    tfds_clips.TfdsSource(tmp_path)
  with pytest.raises(errors.DataError, match="split 'test'"):
    tfds_clips.TfdsSource(folder, "test")


def test_other_features_are_named(tmp_path: pathlib.Path) -> None:
  class Numbers(tfds.core.GeneratorBasedBuilder):
    """A data set without clips."""

    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = None

    def _info(self):
      features = tfds.features.FeaturesDict({"n": tfds.features.Tensor(shape=(), dtype=np.int64)})
      return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, download):
      return {"train": self._generate_examples()}

    def _generate_examples(self):
      yield "a", {"n": 1}

  builder = Numbers(data_dir=str(tmp_path), file_format="array_record")
  builder.download_and_prepare()
  with pytest.raises(errors.DataError, match="it has n; wants header and media"):
    tfds_clips.TfdsSource(tmp_path)
