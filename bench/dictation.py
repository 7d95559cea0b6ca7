"""Documents with what a model might say of them, and a logits processor that lets any model say just that.

A model with random weights takes as long for a token as a trained one of its shape, but says nothing that a real text
would. Dictated to, it does all its work and then says the given token: times are real, and so is how often guesses that
come from the text are right.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from quire import SamplingParams


def dictated(params: SamplingParams) -> Callable[[list[int], list[int], torch.Tensor], torch.Tensor] | None:
    """The processor: extra_args["says"] are the token ids of the output."""
    ids = (params.extra_args or {}).get("says")
    if ids is None:
        return None

    def process(prompt: list[int], output: list[int], scores: torch.Tensor) -> torch.Tensor:
        scores[ids[len(output) % len(ids)]] = 1e4
        return scores

    return process


REPORT = """\
The harbour board met on Tuesday to decide what should become of the old grain store on the north quay. The \
building has stood empty since the mill closed eleven years ago, and the board's own surveyor reported in March \
that the timber floors can no longer carry more than a fifth of the load for which they were built. Three \
proposals were before the board. The first, from the Northern Shipping Company, would pull the building down and \
pave the ground for containers at a cost of 2.4 million. The second, from the town museum, would keep the walls \
and the roof and put a maritime collection on the ground floor. The third, from a group of boat builders led by \
Clara Winter, would turn the store into workshops, with the upper floors left empty until money for new timber \
can be found. After four hours the board rejected the first proposal by seven votes to two and asked the museum \
and the boat builders to come back in September with a common plan. "Nobody wants to lose the building," said \
the chairman, Henry Stone, "but nobody has shown us how to pay for it either."
"""
SUMMARY = """\
The harbour board met on Tuesday to decide the future of the old grain store on the north quay, which has stood \
empty since the mill closed eleven years ago. The board rejected the first proposal, from the Northern Shipping \
Company, to pull the building down and pave the ground for containers, by seven votes to two. It asked the town \
museum and a group of boat builders led by Clara Winter to come back in September with a common plan. The timber \
floors can no longer carry more than a fifth of the load for which they were built, and the chairman, Henry \
Stone, said that nobody has shown the board how to pay for it."""
CODE = """def read_orders(path):
    orders = []
    with open(path) as file:
        for line in file:
            name, count, price = line.split(",")
            orders.append((name, int(count), float(price)))
    return orders


def total_of(orders):
    total = 0.0
    for name, count, price in orders:
        total += count * price
    return total


def largest_of(orders):
    largest = None
    for name, count, price in orders:
        if largest is None or count * price > largest[1] * largest[2]:
            largest = (name, count, price)
    return largest
"""
EDITED = CODE.replace("name, count, price = line", "name, count, price, _ = line").replace("total = 0.0", "total = 0")

# workload -> (prompt, what is said)
DICTATIONS = {
    "summary": (f"Summarise:\n{REPORT}\nSummary:\n", SUMMARY),
    "edit": (f"Let read_orders skip a fourth column:\n{CODE}\nThe whole file:\n", EDITED),
}
