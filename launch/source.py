"""What travels to the hosts: the files of a checkout that git knows or would add, after a search for secrets."""

import fnmatch
import gzip
import hashlib
import io
import pathlib
import re
import subprocess
import tarfile
from collections.abc import Sequence

from kling_jax import files
from kling_jax.errors import UsageError

LARGEST_BYTES = 100 * 2**20  # a checkout beyond this carries data or weights that belong into a bucket

# Names that hold nothing but secrets.
NAMES = (
  ".env", ".env.*", "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.kdbx", "id_rsa", "id_dsa", "id_ecdsa",
  "id_ed25519", ".netrc", "_netrc", ".pypirc", ".git-credentials", ".htpasswd", "credentials.json", "kubeconfig",
  "application_default_credentials.json", "client_secret*.json", "service_account*.json", "*.tfstate",
)  # fmt: skip
HARMLESS = (".env.example", ".env.sample", ".env.template")
# Forms that tokens and keys have, each with the words for it; a text without any of the marks needs no closer look.
CONTENTS = {
  "a private key": ((b"PRIVATE KEY",), rb"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----"),
  "an AWS access key": ((b"AKIA", b"ASIA"), rb"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
  "a GitHub token": (
    (b"ghp_", b"gho_", b"ghu_", b"ghs_", b"ghr_", b"github_pat_"),
    rb"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{60,})",
  ),
  "a GitLab token": ((b"glpat-",), rb"\bglpat-[A-Za-z0-9_-]{20,}"),
  "a Hugging Face token": ((b"hf_",), rb"\bhf_[A-Za-z0-9]{34,}\b"),
  "a Google API key": ((b"AIza",), rb"\bAIza[0-9A-Za-z_-]{35}\b"),
  "a Google OAuth token": ((b"ya29.",), rb"\bya29\.[0-9A-Za-z_-]{30,}"),
  "a Slack token": ((b"xox",), rb"\bxox[abprs]-[0-9A-Za-z-]{10,}"),
  "an API key": ((b"sk-",), rb"\bsk-(?:[a-z]+-)?[A-Za-z0-9_-]{32,}"),
  "a W&B key": (
    (b"WANDB_API_KEY", b"wandb_api_key"),
    rb"(?:WANDB_API_KEY|wandb_api_key)[\"']?\s*[:=]\s*[\"']?[0-9a-f]{40}\b",
  ),
}


def tracked(root: pathlib.Path, exclude: Sequence[str] = ()) -> list[pathlib.PurePosixPath]:
  """Files of the checkout `root` that git has or would add, sorted; those that match `exclude` are left out.

  Raises:
    UsageError: `root` is no git checkout.
  """
  listed = subprocess.run(
    ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"], capture_output=True
  )
  if listed.returncode:
    raise UsageError(
      f"{root} is not a git checkout ({listed.stderr.decode(errors='replace').strip()[:200]}); give --code CHECKOUT"
    )
  names = sorted({name.decode(errors="surrogateescape") for name in listed.stdout.split(b"\0") if name})
  kept = [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in exclude)]
  # A file that was deleted and not committed is in the index only.
  return [pathlib.PurePosixPath(name) for name in kept if (root / name).is_symlink() or (root / name).is_file()]


def secrets(root: pathlib.Path, names: Sequence[pathlib.PurePosixPath]) -> list[str]:
  """Where secrets lie among the files `names` of `root`: "path: what", a line a file."""
  found = []
  for name in names:
    if not any(fnmatch.fnmatch(name.name, pattern) for pattern in HARMLESS) and any(
      fnmatch.fnmatch(name.name, pattern) for pattern in NAMES
    ):
      found.append(f"{name}: a file of this name holds secrets")
      continue
    if (root / name).is_symlink():
      continue
    data = (root / name).read_bytes()
    for what, (marks, form) in CONTENTS.items():
      match = re.search(form, data) if any(mark in data for mark in marks) else None
      if match:
        line = data.count(b"\n", 0, match.start()) + 1
        found.append(f"{name}:{line}: {what}")
        break
  return found


def check(root: pathlib.Path, names: Sequence[pathlib.PurePosixPath]) -> None:
  """Refuses to copy secrets, or a checkout that carries data.

  Raises:
    UsageError: names each file.
  """
  found = secrets(root, names)
  if found:
    more = f" and {len(found) - 8} more" if len(found) > 8 else ""
    raise UsageError(
      f"secrets would be copied to the hosts: {'; '.join(found[:8])}{more}; move them out of {root}, add them to "
      ".gitignore, or leave them out with --exclude PATTERN"
    )
  size = sum((root / name).lstat().st_size for name in names)
  if size > LARGEST_BYTES:
    largest = sorted(names, key=lambda name: -(root / name).lstat().st_size)[:3]
    raise UsageError(
      f"the checkout {root} holds {size / 2**20:.0f} MiB, above {LARGEST_BYTES / 2**20:.0f} (largest: "
      f"{', '.join(map(str, largest))}); add data to .gitignore, or leave it out with --exclude PATTERN"
    )


def digest(root: pathlib.Path, names: Sequence[pathlib.PurePosixPath]) -> str:
  """Twelve hex digits that change when any of the files does."""
  total = hashlib.sha256()
  for name in names:
    path = root / name
    data = str(path.readlink()).encode() if path.is_symlink() else path.read_bytes()
    total.update(f"{name}\0{path.lstat().st_mode & 0o111:o}\0{len(data)}\0".encode(errors="surrogateescape") + data)
  return total.hexdigest()[:12]


def pack(root: pathlib.Path, names: Sequence[pathlib.PurePosixPath], archive: pathlib.Path) -> None:
  """Writes the files as a tar.gz, equal byte for byte for equal files: no times, no owners."""

  def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.mtime = entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry

  with (
    files.whole(archive) as path,
    path.open("wb") as raw,
    gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as packed,
    tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
  ):
    for name in names:
      tar.add(root / name, arcname=str(name), recursive=False, filter=plain)


def unpack(data: bytes, folder: pathlib.Path) -> list[str]:
  """Unpacks a tar.gz that a host made into `folder`, nowhere else; returns the names of the files."""
  with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as tar:
    folder.mkdir(parents=True, exist_ok=True)
    tar.extractall(folder, filter="data")
    return sorted(entry.name for entry in tar.getmembers() if entry.isfile())
