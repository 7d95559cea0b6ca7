"""What a round of beam search costs beside a step of as many independent samples.

python bench/beams.py --widths 2 4 8
"""

from __future__ import annotations

import argparse
import time

from quire import LLM, BeamSearchParams, SamplingParams


def main() -> None:
    """Both on one engine, taking turns; the best of the repeats, in milliseconds per token of each sequence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--widths", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    found = parser.parse_args()
    prompt = [5 + index * 7 % 1000 for index in range(found.input_len)]
    print(f"{'width':>6}{'beams, ms':>12}{'samples, ms':>14}{'ratio':>8}")
    with LLM(found.model, threads=found.threads, max_model_len=found.input_len + found.output_len + 1) as llm:
        for width in found.widths:
            beams = BeamSearchParams(beam_width=width, max_tokens=found.output_len, ignore_eos=True)
            samples = SamplingParams(n=width, max_tokens=found.output_len, ignore_eos=True, seed=1, detokenize=False)
            best = [float("inf"), float("inf")]
            for _ in range(found.repeats):
                began = time.perf_counter()
                llm.beam_search([prompt], beams)
                middle = time.perf_counter()
                llm.generate([prompt], samples, use_tqdm=False)
                best = [min(best[0], middle - began), min(best[1], time.perf_counter() - middle)]
            rounds = [seconds / found.output_len * 1000 for seconds in best]
            print(f"{width:6}{rounds[0]:12.2f}{rounds[1]:14.2f}{rounds[0] / rounds[1]:8.2f}")


if __name__ == "__main__":
    main()
