"""`python -m kling_jax <verb>` is `kling <verb>`."""

from kling_jax.cli import main

raise SystemExit(main())
