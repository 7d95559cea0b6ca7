"""Suffix lookup in what ended requests have said: who may be guessed for from whose words, and for how long."""

from __future__ import annotations

import random

import numpy as np
from guesses import history_of
from test_speculation import SETTINGS

from quire import LLM, SamplingParams
from quire.core.plan import Admission
from quire.worker.past_outputs import KEPT, SALTS, PastOutputs, Said
from quire.worker.suffix import SuffixDrafter


def test_suffix_lookup_remembers_what_the_same_salt_said():
    """An output that has ended is copied from where it matches longer than the row's own text; never by another salt."""
    history = history_of([1, 2], [3, 4], [5, 6], width=200)
    drafter = SuffixDrafter(history, 8, 2, 64, 1.0)
    wish = SamplingParams()
    for slot, salt in ((0, b"one"), (1, b"one"), (2, b"two")):
        drafter.admit(Admission(slot, str(slot), (1, 2), 2, wish, 0, salt=salt))
    said = tuple(range(20, 40))
    history.extend(0, 2, said)
    for slot in (1, 2):
        history.extend(slot, 2, (9, *said[:6]))
    assert drafter.propose(np.array([1, 2])) == [(), ()]
    drafter.release(0)
    assert drafter.propose(np.array([1, 2])) == [said[6:12], ()], "six tokens match and promise six more"
    history.extend(1, 9, said[6:])
    assert drafter.propose(np.array([1])) == [()], "that output had an end"


def test_memory_has_limits():
    past, rng = PastOutputs(), random.Random(4)
    for number in range(SALTS + 5):
        past.of(b"%d" % number).add([number] * 6)
    assert past.of(b"1").find([1] * 6, 64) == (0, 0), "the least recently used have gone"
    assert past.of(b"30").find([30] * 6, 64)[1] == 6
    said = Said()
    outputs = [[rng.randrange(5) for _ in range(300)] for _ in range(60)]
    for output in outputs:
        said.add(output)
        assert len(said.tokens) <= KEPT
    place, matched = said.find(outputs[-1][:200], 64)
    assert matched == 64 and said.after(place, 8) == tuple(outputs[-1][200:208])
    place, matched = said.find([7, *outputs[-1][50:60]], 64)
    assert matched == 10 and said.after(place, 3) == tuple(outputs[-1][60:63])


def test_fewer_steps_where_an_output_is_like_an_earlier_one():
    steps = []
    with LLM(**SETTINGS, speculative_config={"method": "suffix", "adaptive": False}) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
        said = []
        for salt in ("one", "one", "two"):
            before = llm._engine.stats().steps
            prompt = {"prompt": "Once upon a time there was a king who", "cache_salt": salt}
            said.append(llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids)
            steps.append(llm._engine.stats().steps - before)
    assert said[0] == said[1] == said[2]
    assert steps[1] < 0.4 * steps[0] and steps[2] > 0.9 * steps[0]
