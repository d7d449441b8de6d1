"""Asks a question about an image and says how much of the image was read.

python examples/python/ask.py IMAGE QUESTION
"""

import asyncio
import os
import sys
from pathlib import Path

from hiprune import Client, Exhausted, HipruneError, policy

ADDRESS = os.environ.get("HIPRUNE_ADDRESS", "127.0.0.1:50053")


async def main(image: bytes, question: str) -> None:
    """Asks once, and once more where the service says when."""
    async with Client(ADDRESS, key=os.environ.get("HIPRUNE_KEY", ""), timeout_s=30) as client:
        for attempts_left in (1, 0):
            try:
                answer = await client.ask(question, image, policy=policy("hiprune++", keep=1 / 3))
                break
            except Exhausted as error:  # a full queue or a spent quota
                if not attempts_left or error.retry_after_s is None:
                    raise
                await asyncio.sleep(error.retry_after_s)
    (kept,) = answer.media
    print(answer.text.strip())
    print(f"{kept.tokens_kept} of {kept.tokens_before} visual tokens, cache: {kept.cache}")


try:
    asyncio.run(main(Path(sys.argv[1]).read_bytes(), sys.argv[2]))
except HipruneError as error:
    sys.exit(f"{type(error).__name__}: {error}")
