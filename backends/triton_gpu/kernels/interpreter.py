"""Whether kernels run in Triton's interpreter, as Triton decides it when it is imported."""

import os

from triton import language as tl

# In the interpreter inline assembly does not run, and products and casts of bfloat16 are wrong: kernels go another way there.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0").lower() in {"1", "true", "yes", "on", "y"})
