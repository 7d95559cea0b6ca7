"""Little made-up tales in the manner of the old ones: a hero, a wish, a meeting, a trial and an end.

They hang together because one set of choices fills the whole tale, so that a small model can learn to do the same.
"""

from random import Random

from .words import ADJECTIVES, BEASTS, COLOURS, PEOPLE, PLACES, THINGS, with_article

_BEGINNINGS = (
    "Once upon a time there was {a_hero} who lived near {place}.",
    "There was once {a_hero} who had a house in {place}.",
    "Long ago {a_hero} lived all alone by {place}.",
    "In old times, when wishing still helped, there lived {a_hero} not far from {place}.",
)
_WISHES = (
    "Every day the {hero} wished for a {thing}, but could find none.",
    "The {hero} had nothing in the world but a {thing}, and one day it was gone.",
    "Now the {hero} had heard of a {thing} that lay hidden in {far}.",
    "One morning the {hero} lost a {thing} and began to weep bitterly.",
)
_SETTINGS_OUT = (
    "So the {hero} set out, and went on and on until night came.",
    "Then the {hero} went away over hill and dale, and came at last to {far}.",
    "'I will go out into the wide world,' said the {hero}, and went to {far}.",
)
_MEETINGS = (
    "There stood {a_friend}, who said, 'Where are you going?' 'I am looking for the {thing},' said the {hero}.",
    "On the way there sat {a_friend}. 'What do you seek?' asked the {friend}. 'A {thing},' said the {hero}.",
    "Soon {a_friend} came by and said, 'Why are you so sad?' 'Because I have no {thing},' answered the {hero}.",
)
_TRIALS = (
    "'Give me some of your bread,' said the {friend}, 'and I will help you.' The {hero} gave all the bread gladly.",
    "'Stay with me for three days,' said the {friend}, 'and do what I tell you.' And the {hero} did so.",
    "'You must not look behind you,' said the {friend}, 'or it will go ill with you.' The {hero} did not look back.",
)
_FINDINGS = (
    "Then the {friend} opened a door, and there lay the {thing}, shining like the sun.",
    "When the third day came, the {friend} brought the {thing} and said, 'This is yours.'",
    "And when the {hero} came to {place} again, there hung the {thing} upon a tree.",
)
_ENDS = (
    "So the {hero} went home full of joy, and they lived happily together till the end of their days.",
    "The {hero} thanked the {friend} with a full heart, and from that day on they were good friends.",
    "Then all sorrow was at an end, and if they have not died, they are living still.",
)


def made_up(random: Random, hero: str) -> str:
    """One whole tale about the hero, of a hundred words or so."""
    friend = random.choice([other for other in BEASTS + PEOPLE if other != hero])
    near, far = random.sample(PLACES, 2)
    choices = {
        "hero": hero,
        "friend": friend,
        "a_hero": with_article(f"{random.choice(ADJECTIVES)} {hero}"),
        "a_friend": with_article(f"{random.choice(ADJECTIVES)} {friend}"),
        "thing": f"{random.choice(COLOURS)} {random.choice(THINGS)}",
        "place": f"the {near}",
        "far": f"the {far}",
    }
    parts = (_BEGINNINGS, _WISHES, _SETTINGS_OUT, _MEETINGS, _TRIALS, _FINDINGS, _ENDS)
    return " ".join(random.choice(part) for part in parts).format(**choices)
