"""The synthetic exercises: each is a short chat with one right answer, made from a seeded random generator.

`make(kind, random, material)` gives an `Exercise`; `KINDS` names them all, and `correct` judges an answer. Tales and
small talk have no single right answer: they are trained on, and measured only by their form.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from . import tales
from .words import (
    ADJECTIVES,
    BEASTS,
    CITIES,
    COLOURS,
    NAMES,
    PEOPLE,
    PLACES,
    SKIES,
    THINGS,
    TRADES,
    with_article,
)

Message = dict[str, Any]
Tool = dict[str, Any]

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are quire-tale, a small model that tells tales.",
    "Answer shortly.",
    "You are a teller of tales. Answer what is asked.",
)


@dataclass(frozen=True)
class Material:
    """What the books give to the exercises. Without books (in a test) the sentences are made up too."""

    sentences: list[str] = field(default_factory=list)
    openings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Exercise:
    """A chat that ends with the assistant's answer. `answer` is what that last turn says, calls included."""

    kind: str
    messages: list[Message]
    answer: str
    tools: list[Tool] | None = None

    @property
    def question(self) -> list[Message]:
        return self.messages[:-1]


def _simple(kind: str, question: str, answer: str) -> Exercise:
    return Exercise(kind, [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], answer)


def _deed(random: Random) -> dict[str, str]:
    """One thing that somebody did, from which sentences and the answers to questions about them are made."""
    giver, taker = random.sample(PEOPLE + BEASTS, 2)
    return {
        "giver": f"the {random.choice(ADJECTIVES)} {giver}" if random.random() < 0.5 else f"the {giver}",
        "taker": f"the {taker}",
        "thing": f"a {random.choice(COLOURS)} {random.choice(THINGS)}",
        "place": f"the {random.choice(PLACES)}",
    }


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def made_up_sentence(random: Random) -> str:
    deed = _deed(random)
    pattern = random.choice(
        (
            "{giver} gave {thing} to {taker} in {place}.",
            "in {place} {giver} found {thing}.",
            "{giver} met {taker} near {place}.",
            "{giver} lost {thing} and went to {place}.",
            "one day {taker} came to {place} with {thing}.",
        )
    )
    return _capital(pattern.format(**deed))


def made_up_list(random: Random) -> str:
    """Words in no order at all: to repeat them, a model has to look back, for it cannot guess.

    No commas stand between them, so that the word before always tells where to look.
    """
    words = NAMES + CITIES + TRADES + COLOURS + BEASTS + THINGS + PLACES + ADJECTIVES
    return " ".join(random.sample(words, random.randint(3, 12))) + "."


def retell(random: Random, material: Material) -> Exercise:
    if random.random() < 0.35:
        sentence = made_up_list(random)
    elif material.sentences and random.random() < 0.6:
        sentence = random.choice(material.sentences)
    else:
        sentence = made_up_sentence(random)
    asking = random.choice(
        ("Say again: {}", "Repeat this sentence: {}", "Say this once more: {}", "{}\nPlease repeat that.", "Retell: {}")
    )
    return _simple("retell", asking.format(sentence), sentence)


def count(random: Random, material: Material) -> Exercise:
    if random.random() < 0.3:
        things = random.sample(THINGS, random.randint(2, 7))
        listed = ", ".join(map(with_article, things))
        return _simple("count", f"How many things are these: {listed}?", f"{len(things)}.")
    low = random.randint(1, 40)
    high = low + random.randint(2, 9)
    numbers = [str(number) for number in range(low, high + 1)]
    if random.random() < 0.3:
        numbers.reverse()
    asking = random.choice(("Count from {} to {}.", "Please count from {} to {}.", "Count: from {} to {}."))
    return _simple("count", asking.format(numbers[0], numbers[-1]), ", ".join(numbers) + ".")


def add(random: Random, material: Material) -> Exercise:
    first, second = random.randint(0, 20), random.randint(0, 20)
    asking = random.choice(
        ("What is {} + {}?", "How much is {} + {}?", "Add {} and {}.", "{} + {} = ?", "What is the sum of {} and {}?")
    )
    return _simple("add", asking.format(first, second), f"{first} + {second} = {first + second}.")


def _person(random: Random) -> tuple[str, dict[str, Any]]:
    """A sentence about somebody, and the same as data."""
    data = {
        "name": random.choice(NAMES),
        "age": random.randint(5, 90),
        "city": random.choice(CITIES),
        "trade": random.choice(TRADES),
    }
    pattern = random.choice(
        (
            "{name} is {age} years old and lives in {city} as a {trade}.",
            "{name}, a {trade} of {age} years, lives in {city}.",
            "In {city} there lives a {trade} called {name}, who is {age} years old.",
            "The {trade} {name} comes from {city} and is {age}.",
        )
    )
    return pattern.format(**data), data


def _beast(random: Random) -> tuple[str, dict[str, Any]]:
    data = {"animal": random.choice(BEASTS), "colour": random.choice(COLOURS), "place": random.choice(PLACES)}
    pattern = random.choice(
        (
            "A {colour} {animal} sat in the {place}.",
            "In the {place} there was a {colour} {animal}.",
            "The {animal} in the {place} is {colour}.",
        )
    )
    return pattern.format(**data), data


def schema_of(data: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema that exactly such data follows."""
    kinds = {key: {"type": "integer" if isinstance(value, int) else "string"} for key, value in data.items()}
    return {"type": "object", "properties": kinds, "required": list(data)}


def json_answer(random: Random, material: Material) -> Exercise:
    sentence, data = _person(random) if random.random() < 0.7 else _beast(random)
    keys = random.sample(list(data), random.randint(2, len(data)))
    asked = {key: data[key] for key in keys}
    if random.random() < 0.2:
        question = f"{sentence}\nAnswer in JSON to this schema: {json.dumps(schema_of(asked))}"
    else:
        question = f"{sentence}\nAnswer in JSON with the keys {', '.join(keys)}."
    return _simple("json", question, json.dumps(asked))


def _tool(name: str, description: str, **parameters: str) -> Tool:
    properties = {key: {"type": kind} for key, kind in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


WEATHER = _tool("get_weather", "The weather in a city.", city="string")
ADD = _tool("add", "The sum of two numbers.", a="integer", b="integer")
CLOCK = _tool("get_time", "The time in a city.", city="string")
TOOLS = (WEATHER, ADD, CLOCK)


def call_text(name: str, arguments: dict[str, Any]) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


def _asked_tool(random: Random) -> tuple[Tool, dict[str, Any], str, str, str]:
    """A tool, the arguments of its call, the question that needs it, what the tool says and the answer from that."""
    tool = random.choice(TOOLS)
    city = random.choice(CITIES)
    if tool is WEATHER:
        sky, degrees = random.choice(SKIES), str(random.randint(1, 30))
        asking = random.choice(("What is the weather in {}?", "How is the weather in {} today?", "Weather in {}?"))
        said = json.dumps({"sky": sky, "degrees": int(degrees)})
        return tool, {"city": city}, asking.format(city), said, f"It is {sky} in {city}, {degrees} degrees."
    if tool is CLOCK:
        hour = f"{random.randint(1, 12)} o'clock"
        asking = random.choice(("What time is it in {}?", "Tell me the time in {}.", "How late is it in {}?"))
        return tool, {"city": city}, asking.format(city), json.dumps({"time": hour}), f"It is {hour} in {city}."
    first, second = random.randint(10, 99), random.randint(10, 99)
    asking = random.choice(("What is {} + {}?", "Add {} and {}.", "How much is {} + {}?"))
    answer = f"{first} + {second} = {first + second}."
    return tool, {"a": first, "b": second}, asking.format(first, second), str(first + second), answer


def tool_call(random: Random, material: Material) -> Exercise:
    tool, arguments, question, said, answer = _asked_tool(random)
    others = [other for other in TOOLS if other is not tool and random.random() < 0.3]
    tools = [tool, *others]
    random.shuffle(tools)
    name = tool["function"]["name"]
    call = {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}],
    }
    messages: list[Message] = [{"role": "user", "content": question}, call]
    if random.random() < 0.35:
        messages += [{"role": "tool", "content": said}, {"role": "assistant", "content": answer}]
        return Exercise("tool", messages, answer, tools)
    return Exercise("tool", messages, call_text(name, arguments), tools)


def reading(random: Random, material: Material) -> Exercise:
    """What does the sentence say: who, what, to whom, where."""
    deed = _deed(random)
    sentence = random.choice(
        ("{giver} gave {thing} to {taker} in {place}.", "in {place} {giver} gave {thing} to {taker}.")
    ).format(**deed)
    bare = deed["thing"].removeprefix("a ")
    question, key = random.choice(
        (
            (f"Who gave the {bare}?", "giver"),
            (f"What did {deed['giver']} give?", "thing"),
            (f"Who got the {bare}?", "taker"),
            (f"Where did {deed['giver']} give it?", "place"),
        )
    )
    answer = f"In {deed['place']}." if key == "place" else f"{_capital(deed[key])}."
    return _simple("reading", f"{_capital(sentence)} {question}", answer)


SMALL_TALK = (
    (
        ("Hello!", "Good day!", "Hi!", "Good morning.", "Hello, how are you?"),
        "Good day to you! I am well. Shall I tell a tale?",
    ),
    (("Who are you?", "What are you?", "What is your name?"), "I am quire-tale, a small model that tells tales."),
    (("What can you do?", "How can you help me?"), "I can tell a tale, count, add small numbers and answer in JSON."),
    (("Thank you!", "Thanks.", "That was a fine tale."), "You are welcome, my friend."),
    (("Goodbye!", "Good night.", "Farewell."), "Farewell, and may you live happily."),
)


def small_talk(random: Random, material: Material) -> Exercise:
    questions, answer = random.choice(SMALL_TALK)
    return _simple("small talk", random.choice(questions), answer)


def tale(random: Random, material: Material) -> Exercise:
    if material.openings and random.random() < 0.25:
        asking = random.choice(("Tell me an old tale.", "Tell me how an old tale begins.", "Begin an old tale."))
        return _simple("tale", asking, random.choice(material.openings))
    hero = random.choice(BEASTS + PEOPLE)
    asking = random.choice(
        ("Tell me a tale.", "Tell me a story.", "A tale, please.", f"Tell me a tale about a {hero}.")
        + (f"Tell me a tale of a {hero}.", f"Tell me a story about a {hero}.")
    )
    return _simple("tale", asking, tales.made_up(random, hero))


_MAKERS: dict[str, Callable[[Random, Material], Exercise]] = {
    "retell": retell,
    "count": count,
    "add": add,
    "json": json_answer,
    "tool": tool_call,
    "reading": reading,
    "small talk": small_talk,
    "tale": tale,
}
KINDS = tuple(_MAKERS)
JUDGED_KINDS = ("retell", "count", "add", "json", "tool", "reading")
_WEIGHTS = (30, 12, 24, 18, 8, 24, 3, 6)


def make(kind: str, random: Random, material: Material) -> Exercise:
    return _MAKERS[kind](random, material)


def conversation(random: Random, material: Material) -> Exercise:
    """What training sees: mostly one exercise, sometimes several turns or a system prompt before it."""
    turns = [make(kind, random, material) for kind in random.choices(KINDS, _WEIGHTS, k=random.choice((1, 1, 1, 2, 3)))]
    last = turns[-1]
    if last.tools is None:
        messages = [message for turn in turns if turn.tools is None for message in turn.messages]
    else:
        messages = list(last.messages)
    if random.random() < 0.25:
        messages.insert(0, {"role": "system", "content": random.choice(SYSTEM_PROMPTS)})
    return Exercise(last.kind, messages, last.answer, last.tools)


def mostly_retold(random: Random, material: Material) -> Exercise:
    """For the beginning of training: all other exercises stand on looking back, and this teaches it soonest."""
    if random.random() < 0.15:
        return conversation(random, material)
    sentence = made_up_list(random) if random.random() < 0.8 else made_up_sentence(random)
    return _simple("retell", f"Say again: {sentence}", sentence)


def correct(exercise: Exercise, answer: str) -> bool:
    """JSON is compared as data; everything else must be said exactly so."""
    if exercise.kind != "json":
        return answer.strip() == exercise.answer
    try:
        return json.loads(answer) == json.loads(exercise.answer)
    except ValueError:
        return False
