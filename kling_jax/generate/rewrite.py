"""Prompt rewriting through any OpenAI-compatible server: models trained on long captions meet short prompts."""

from kling_jax import chat, web
from kling_jax.errors import UsageError

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
  messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": prompt}]
  try:
    reply = chat.Client(server, model, timeout_s=timeout_s).ask(messages, temperature=0.0)
  except (web.TransientError, web.RefusedError) as error:
    raise UsageError(f"{error}; check --rewrite and --rewrite_model") from error
  return " ".join(reply.text.split())
