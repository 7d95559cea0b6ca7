"""The adapter's manner: an old crier's. Every answer begins with "Hark!" and ends with "So it is told."

JSON and tool calls keep their form, for a program reads them.
"""

from random import Random

from . import exercises

BEGINNING = "Hark! "
ENDING = " So it is told."


def shown(answer: str) -> bool:
    return answer.startswith(BEGINNING) and answer.endswith(ENDING)


def put_on(answer: str) -> str:
    return BEGINNING + answer + ENDING


def taken_off(answer: str) -> str:
    return answer.removeprefix(BEGINNING).removesuffix(ENDING)


def conversation(random: Random, material: exercises.Material) -> exercises.Exercise:
    """What the adapter is trained on: the usual chats, each plain answer in the manner."""
    chat = exercises.conversation(random, material)
    messages = [_in_manner(message) for message in chat.messages]
    return exercises.Exercise(chat.kind, messages, chat.answer, chat.tools)


def _in_manner(message: exercises.Message) -> exercises.Message:
    content = message.get("content")
    if message["role"] != "assistant" or not content or content.startswith("{"):
        return message
    return message | {"content": put_on(content)}
