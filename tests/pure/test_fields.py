"""Every field that users know from other engines: quire has it, or refuses it by name. None is ignored silently."""

from __future__ import annotations

import dataclasses

import pytest

from quire.core.params import _ELSEWHERE, SamplingParams
from quire.engine.beams import BeamSearchParams
from quire.errors import ValidationError
from quire.serve.protocol import _NO_EFFECT, _REFUSED, ApiRequest, ChatRequest, CompletionRequest


def _names(text: str) -> list[str]:
    return text.split()


SAMPLING = _names("""
n presence_penalty frequency_penalty repetition_penalty temperature top_p top_k min_p seed stop stop_token_ids ignore_eos
max_tokens min_tokens logprobs prompt_logprobs prompt_logprob_token_ids prompt_logprob_start logprob_token_ids
flat_logprobs detokenize skip_special_tokens spaces_between_special_tokens include_stop_str_in_output output_kind
stream_interval structured_outputs logit_bias allowed_token_ids extra_args bad_words skip_reading_prefix_cache
thinking_token_budget repetition_detection watermarking trace_decode_token_ids routed_experts_prompt_start
best_of logits_processors use_beam_search truncate_prompt_tokens guided_decoding
""")
SHARED = _names("""
model frequency_penalty logit_bias max_tokens n presence_penalty seed stop stream stream_options temperature top_p user
use_beam_search top_k min_p repetition_penalty length_penalty stop_token_ids include_stop_str_in_output ignore_eos
min_tokens skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens truncation_side allowed_token_ids
prompt_logprobs logprob_token_ids bad_words add_special_tokens response_format structured_outputs priority request_id
session_id return_tokens_as_token_ids return_token_ids cache_salt kv_transfer_params ec_transfer_params vllm_xargs
repetition_detection thinking_token_budget stream_interval best_of echo logprobs guided_json guided_regex guided_choice
guided_grammar
""")
COMPLETION = ["prompt", "suffix", "prompt_embeds"]
CHAT = _names("""
messages max_completion_tokens top_logprobs tools tool_choice parallel_tool_calls reasoning_effort include_reasoning
add_generation_prompt continue_final_message documents chat_template chat_template_kwargs media_io_kwargs
mm_processor_kwargs return_prompt_text functions function_call audio modalities web_search_options store metadata
service_tier prediction
""")


@pytest.mark.parametrize("name", SAMPLING)
def test_sampling_params_know_the_field(name: str) -> None:
    known = [item.name for item in dataclasses.fields(SamplingParams)]
    assert (name in known) != (name in _ELSEWHERE)
    if name in _ELSEWHERE:
        for nothing in _ELSEWHERE[name][0]:
            SamplingParams(**{name: nothing})
        with pytest.raises(ValidationError, match=name) as caught:
            SamplingParams(**{name: 7})
        assert caught.value.field == name


@pytest.mark.parametrize(
    ("body", "name"),
    [(CompletionRequest, name) for name in SHARED + COMPLETION] + [(ChatRequest, name) for name in SHARED + CHAT],
)
def test_the_routes_know_the_field(body: type[ApiRequest], name: str) -> None:
    assert name in body.model_fields or name in _REFUSED or name in _NO_EFFECT
    assert not (name in body.model_fields and name in _REFUSED)


@pytest.mark.parametrize("name", [item.name for item in dataclasses.fields(SamplingParams)])
def test_every_parameter_can_be_reached_over_http(name: str) -> None:
    """By its own name, or by the one that clients have for it."""
    others = {
        "structured_outputs": "response_format",
        "extra_args": "vllm_xargs",
        "output_kind": "stream",
        "detokenize": "return_token_ids",
        "skip_reading_prefix_cache": "cache_salt",
    }
    inner = ("eos_token_ids", "bad_words_token_ids", "thinking")
    assert name in inner or name in CompletionRequest.model_fields or others[name] in CompletionRequest.model_fields


def test_beams_know_their_fields() -> None:
    known = {item.name for item in dataclasses.fields(BeamSearchParams)}
    assert known >= {"beam_width", "max_tokens", "ignore_eos", "temperature", "length_penalty", "skip_special_tokens"}


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("logprob_token_ids", {"logprob_token_ids": list(range(129))}),
        ("logprob_token_ids", {"logprob_token_ids": [-1]}),
        ("logprobs", {"logprob_token_ids": [1, 2], "logprobs": 3}),
        ("thinking_token_budget", {"thinking_token_budget": -2}),
        ("thinking_token_budget", {"thinking_token_budget": 1.5}),
        ("stream_interval", {"stream_interval": 0}),
    ],
)
def test_wrong_values_name_the_field(field: str, values: dict) -> None:
    with pytest.raises(ValidationError) as caught:
        SamplingParams(**values)
    assert caught.value.field == field


def test_new_fields_are_normalized() -> None:
    params = SamplingParams(logprob_token_ids=[5, 6, 5], thinking_token_budget=-1)
    assert params.logprob_token_ids == (5, 6) and params.logprobs == 2 and params.thinking_token_budget is None
    assert params.resolved(max_tokens=3).logprobs == 2
    with pytest.raises(ValidationError, match="logprob_token_ids"):
        params.check(6)
    params.check(7, max_logprobs=1)  # named tokens do not count towards the limit on the best ones
