"""Streams a conversation of two turns about one image: what was kept first, then the text as it comes.

python examples/python/stream.py IMAGE QUESTION QUESTION
"""

import asyncio
import os
import sys
from collections import Counter
from pathlib import Path

from hiprune import Client, HipruneError, policy
from hiprune.client import question_message
from hiprune.policies import KIND_WORDS
from hiprune.v1 import llm_service_pb2 as pb

ADDRESS = os.environ.get("HIPRUNE_ADDRESS", "127.0.0.1:50053")


async def main(image: bytes, first: str, second: str) -> None:
    """Asks, and asks again with the answer and the image before it: the cache makes that cheap."""
    turns = [question_message(first, [image])]
    async with Client(ADDRESS, key=os.environ.get("HIPRUNE_KEY", "")) as client:
        said = await tell(client, turns)
        turns.append(pb.Message(role=pb.ROLE_ASSISTANT, parts=[pb.Part(text=said)]))
        turns.append(question_message(second, []))
        await tell(client, turns)


async def tell(client: Client, turns: list[pb.Message]) -> str:
    """Prints the events of an answer as they come; its text."""
    text = ""
    request = pb.AskImageRequest(messages=turns, policy=policy("hiprune", keep="33%"))
    async for event in client.ask_stream(request):
        if event.HasField("report"):
            for media in event.report.media:
                kinds = Counter(KIND_WORDS[kind] for view in media.views for kind in view.kinds)
                print("kept:", ", ".join(f"{count} {kind}" for kind, count in kinds.items()))
        elif event.HasField("delta"):
            print(event.delta.text, end="", flush=True)
            text += event.delta.text
        else:
            usage = event.completion.usage
            print(f"\n{usage.prompt_tokens} tokens read, {usage.completion_tokens} written")
    return text


try:
    asyncio.run(main(Path(sys.argv[1]).read_bytes(), *sys.argv[2:4]))
except HipruneError as error:
    sys.exit(f"{type(error).__name__}: {error}")
