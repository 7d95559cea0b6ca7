"""Every field that users know from other engines: what it does in SamplingParams and in the bodies of the two routes.

One table says of each field whether it works, is taken without effect, or is refused by name. None is ignored silently.
`pytest -s -k counts` prints how many there are of each.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from quire.core.params import _ELSEWHERE, SamplingParams
from quire.engine.beams import BeamSearchParams
from quire.errors import ValidationError
from quire.serve.fields import REFUSED, WITHOUT_EFFECT, ApiRequest
from quire.serve.forms import GUIDED
from quire.serve.protocol import ChatRequest, CompletionRequest

# field, then its fate in SamplingParams, /v1/completions and /v1/chat/completions; "-": no field of it in vLLM's either.
TABLE = """
n                              works    works    works
presence_penalty               works    works    works
frequency_penalty              works    works    works
repetition_penalty             works    works    works
temperature                    works    works    works
top_p                          works    works    works
top_k                          works    works    works
min_p                          works    works    works
seed                           works    works    works
stop                           works    works    works
stop_token_ids                 works    works    works
ignore_eos                     works    works    works
max_tokens                     works    works    works
min_tokens                     works    works    works
logprobs                       works    works    works
prompt_logprobs                works    works    works
logprob_token_ids              works    works    works
prompt_logprob_token_ids       works    refused  refused
prompt_logprob_start           works    refused  refused
flat_logprobs                  works    nothing  nothing
detokenize                     works    -        -
skip_special_tokens            works    works    works
spaces_between_special_tokens  works    works    works
include_stop_str_in_output     works    works    works
output_kind                    works    -        -
stream_interval                works    works    works
structured_outputs             works    works    works
logit_bias                     works    works    works
allowed_token_ids              works    works    works
extra_args                     works    -        -
bad_words                      works    works    works
skip_reading_prefix_cache      works    -        -
thinking_token_budget          works    works    works
repetition_detection           works    works    works
watermarking                   refused  refused  refused
trace_decode_token_ids         refused  refused  refused
routed_experts_prompt_start    refused  refused  refused
best_of                        refused  refused  refused
logits_processors              refused  refused  refused
guided_decoding                refused  refused  refused
truncate_prompt_tokens         refused  works    works
use_beam_search                refused  works    works
length_penalty                 refused  works    works
early_stopping                 refused  works    works
model                          -        works    works
stream                         -        works    works
stream_options                 -        works    works
user                           -        nothing  nothing
echo                           -        works    works
truncation_side                -        works    works
add_special_tokens             -        works    works
response_format                -        works    works
priority                       -        works    works
request_id                     -        works    works
session_id                     -        nothing  nothing
return_tokens_as_token_ids     -        works    works
return_token_ids               -        works    works
cache_salt                     -        works    works
kv_transfer_params             -        refused  refused
ec_transfer_params             -        refused  refused
vllm_xargs                     -        works    works
guided_json                    -        works    works
guided_regex                   -        works    works
guided_choice                  -        works    works
guided_grammar                 -        works    works
guided_json_object             -        works    works
guided_whitespace_pattern      -        works    works
guided_decoding_backend        -        nothing  nothing
prompt                         -        works    -
suffix                         -        works    refused
prompt_embeds                  -        refused  refused
messages                       -        -        works
max_completion_tokens          -        -        works
top_logprobs                   -        -        works
tools                          -        -        works
tool_choice                    -        -        works
parallel_tool_calls            -        -        works
reasoning_effort               -        -        works
include_reasoning              -        -        works
add_generation_prompt          -        -        works
continue_final_message         -        -        works
documents                      -        -        works
chat_template                  -        -        works
chat_template_kwargs           -        -        works
return_prompt_text             -        -        works
media_io_kwargs                -        refused  refused
mm_processor_kwargs            -        refused  refused
functions                      -        refused  works
function_call                  -        refused  works
audio                          -        -        refused
modalities                     -        -        refused
web_search_options             -        -        refused
store                          -        nothing  nothing
metadata                       -        nothing  nothing
service_tier                   -        nothing  nothing
prediction                     -        -        nothing
safety_identifier              -        nothing  nothing
prompt_cache_key               -        nothing  nothing
verbosity                      -        -        nothing
"""
ROWS = [line.split() for line in TABLE.strip().splitlines()]
COLUMNS = ("SamplingParams", "/v1/completions", "/v1/chat/completions")
CASES = [(name, column, fate) for name, *fates in ROWS for column, fate in zip(COLUMNS, fates, strict=True)]
BODIES = {"/v1/completions": CompletionRequest, "/v1/chat/completions": ChatRequest}
ODD = {"modalities": ["audio"]}  # values that no field takes for nothing


@pytest.mark.parametrize(("name", "column", "fate"), [case for case in CASES if case[2] != "-"])
def test_the_table_is_true(name: str, column: str, fate: str) -> None:
    if column == "SamplingParams":
        known = [item.name for item in dataclasses.fields(SamplingParams)]
        assert (fate == "works") == (name in known)
        if fate == "refused":
            for nothing in _ELSEWHERE[name][0]:
                SamplingParams(**{name: nothing})
            with pytest.raises(ValidationError, match=name) as caught:
                SamplingParams(**{name: 7})
            assert caught.value.field == name
        return
    body = BODIES[column]
    assert (fate == "works") == (name in body.model_fields or name in GUIDED)
    assert (fate == "nothing") == (name in WITHOUT_EFFECT and name not in body.model_fields)
    if fate == "refused":
        for nothing in REFUSED[name][0]:
            _body(body, name, nothing).check_extra()
        with pytest.raises(ValidationError, match=name) as caught:
            _body(body, name, ODD.get(name, 7)).check_extra()
        assert caught.value.field == name


def _body(kind: type[ApiRequest], name: str, value: object) -> ApiRequest:
    return kind.model_validate({"messages": [], "prompt": "a", name: value})


def test_the_table_is_complete() -> None:
    """Nothing is known that it does not list, but for what quire alone has."""
    listed = {name for name, *_ in ROWS}
    own = {"timeout", "include_account", "eos_token_ids", "bad_words_token_ids", "thinking", "allowed_logprobs"}
    known = {item.name for item in dataclasses.fields(SamplingParams)} | set(_ELSEWHERE) | set(REFUSED)
    known |= set(CompletionRequest.model_fields) | set(ChatRequest.model_fields) | set(GUIDED) | WITHOUT_EFFECT
    known -= {"structural_tag", "grammar", "prompt_cache_retention"}  # misplaced names, and a wish of clients'
    assert known - own <= listed


def test_counts() -> None:
    counts = {column: Counter(fate for _, found, fate in CASES if found == column) for column in COLUMNS}
    print({column: dict(found) for column, found in counts.items()})
    assert counts["SamplingParams"]["works"] >= 34


def test_odd_values_that_are_right() -> None:
    assert CompletionRequest(logprobs=False).logprobs is None and CompletionRequest(logprobs=True).logprobs == 1
    assert CompletionRequest(prompt=["a", [1, 2]]).prompts() == ["a", [1, 2]]
    assert CompletionRequest(max_tokens=5.0, seed="3").max_tokens == 5
    with pytest.raises(ValidationError, match="key 'a', which is no token id"):
        SamplingParams(logit_bias={"a": 1})


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
