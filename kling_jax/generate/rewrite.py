"""Prompt rewriting through any OpenAI-compatible server: models trained on long captions meet short prompts."""

import os

import requests

from kling_jax.errors import DataError, UsageError

# The six parts of a Koala-36M caption, so that prompts look like what the model was trained on.
INSTRUCTION = (
  "Rewrite the user's video idea as one caption of about 200 words for a video generation model. Describe, in this "
  "order and without headings: the subject, its action, the environment, the visual style, the camera movement, and "
  "the atmosphere. Keep every fact of the idea, add plausible detail, present tense, no introduction."
)


def rewrite(prompt: str, server: str, model: str, timeout_s: float = 60.0) -> str:
  """Returns `prompt` as a long caption.

  Args:
    prompt: the user's words.
    server: base address, e.g. http://localhost:8000/v1; the key is read from OPENAI_API_KEY where it is set.
    model: the name that the server knows.

  Raises:
    UsageError: the address cannot be reached or refuses.
    DataError: the answer is not what the protocol promises.
  """
  key = os.environ.get("OPENAI_API_KEY")
  messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": prompt}]
  try:
    answer = requests.post(
      server.rstrip("/") + "/chat/completions",
      json={"model": model, "messages": messages, "temperature": 0.0},
      headers={"Authorization": f"Bearer {key}"} if key else {},
      timeout=timeout_s,
    )
    answer.raise_for_status()
    text = answer.json()["choices"][0]["message"]["content"]
  except requests.JSONDecodeError as error:
    raise DataError(f"prompt server {server} did not answer in JSON: {error}") from error
  except requests.RequestException as error:
    raise UsageError(f"prompt server {server} failed: {error}; check --rewrite and --rewrite_model") from error
  except (KeyError, IndexError, TypeError) as error:
    raise DataError(f"prompt server {server} answered without choices[0].message.content") from error
  if not isinstance(text, str) or not text.strip():
    raise DataError(f"prompt server {server} answered with an empty caption")
  return " ".join(text.split())
