"""The Transformers path on single architectures: what must hold beyond equality of tokens, and what must be refused."""

from __future__ import annotations

import parity
import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from quire.errors import UnsupportedModelError
from quire.kernels.table import load_ops
from quire.layers.batch import Batch
from quire.models.probing.decide import Decider, serve
from quire.models.probing.probe import examine, probe, report_key
from quire.models.probing.prove import prove, transplant
from quire.models.probing.reference import LENGTHS
from quire.models.transformers.fallback import SequentialModel
from quire.models.transformers.interface import current_batch, paged_attention
from quire.models.transformers.masks import mask_spec
from quire.models.transformers.report import ProbeReport, RewritePlan
from quire.models.twin.observe import ModelObserver
from quire.models.twin.shrink import build, randomize, shrink
from quire.models.twin.trial import PagedLoop

OPS = load_ops("cpu")
SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()


def llama(**changes):
    config = LlamaConfig(**{**SIZES, **changes})
    model = build(LlamaForCausalLM, config, torch.float32)
    randomize(model)
    return model


def served(model, report=None):
    """The model served by its own report, with all replacements that hold."""
    if report is None:
        report = examine(type(model), model.config, torch.float32)
    transplant(model, report.rewrite, OPS)
    return serve(model, report, OPS)


# ---------------------------------------------------------------- ropes beyond the original context

ROPES = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 16,
    },
}


@pytest.mark.parametrize("kind", ROPES)
def test_ropes_beyond_the_original_context(kind):
    """Prompts below, across and beyond the original 16 positions, packed together, are as each would be alone."""
    settings = {"rope_parameters": ROPES[kind], "max_position_embeddings": 16 if kind == "dynamic" else 64}
    prompts = [*parity.make_prompts(), torch.randint(3, 85, (40,), generator=torch.Generator().manual_seed(1)).tolist()]
    # A fresh model for each prompt: the library's dynamic rope remembers the longest sequence it has seen.
    expected = [parity.generate(llama(**settings), prompt) for prompt in prompts]
    model = served(llama(**settings))
    assert model.layout.tier == "A"
    for group in (prompts[:3], [prompts[3], prompts[1], prompts[2]]):
        running = parity.run_together(model, OPS, group)
        for one, prompt in zip(running, group, strict=True):
            wanted = expected[prompts.index(prompt)]
            assert one.sequence.tokens[len(prompt) :] == wanted.tokens
            assert torch.allclose(torch.stack(one.logits), wanted.logits, atol=1e-4)


def test_ropes_that_depend_on_the_length_do_not_share_prefixes():
    assert not served(llama(rope_parameters=ROPES["longrope"])).layout.prefix_caching
    assert served(llama(rope_parameters=ROPES["yarn"])).layout.prefix_caching


# ---------------------------------------------------------------- the attention contract


def test_an_unknown_attention_argument_is_refused():
    model = served(llama())
    module = model.model.model.layers[0].self_attn
    query = torch.zeros(1, 4, 3, 8)
    token = current_batch.set(None)
    try:
        with pytest.raises(UnsupportedModelError, match="block_indices"):
            paged_attention(module, query, query, query, block_indices=torch.zeros(1))
    finally:
        current_batch.reset(token)


def test_mask_specs_say_window_and_chunk():
    config = shrink(transformers.Gemma2Config())
    model = build(transformers.Gemma2ForCausalLM, config, torch.float32)
    seen = observe(model)
    assert [call.window for call in seen.attention] == [8, 8, None]
    config = shrink(transformers.Llama4TextConfig())
    seen = observe(build(transformers.Llama4ForCausalLM, config, torch.float32))
    assert {call.chunk for call in seen.attention} == {8, None}


def test_a_mask_that_is_not_plain_is_not_taken_for_one():
    spec = mask_spec(1, 4, 4, mask_function=lambda b, h, q, k: k >= 0)
    assert not spec.plain
    with pytest.raises(UnsupportedModelError, match="mask itself"):
        torch.zeros(1) + spec


def observe(model):
    from quire.models.probing.decide import observed_arguments

    observer = ModelObserver(model, model.config, with_linears=True)
    return observer.run(observed_arguments(model, observer))


def test_shared_keys_are_found_and_written_once():
    model = build(transformers.Gemma3nForCausalLM, shrink(transformers.Gemma3nTextConfig()), torch.float32)
    shared = [call.shares for call in observe(model).attention]
    assert any(owner is not None for owner in shared)
    assert all(owner is None or shared[owner] is None for owner in shared)


# ---------------------------------------------------------------- replacements


def test_replacements_of_a_llama():
    report = examine(LlamaForCausalLM, llama().config, torch.float32)
    key = "transformers.models.llama.modeling_llama."
    assert report.rewrite.merged == {
        f"{key}LlamaAttention": [["q_proj", "k_proj", "v_proj"]],
        f"{key}LlamaMLP": [["gate_proj", "up_proj"]],
    }
    assert report.rewrite.norms[f"{key}LlamaRMSNorm"]["style"] == "down_then_scale"
    assert report.rewrite.gated[f"{key}LlamaMLP"]["activation"] == "silu"
    assert report.rewrite.rotary == {f"{key}LlamaAttention": "half"}


def test_a_replacement_that_changes_the_answer_is_left_alone(monkeypatch):
    """With a norm that computes something else the proof fails for norms, and for norms only."""
    from dataclasses import replace as changed

    config = shrink(LlamaConfig())
    decider = Decider(LlamaForCausalLM, config, OPS)
    decision = decider.decide()
    broken = changed(OPS, rms_norm=lambda x, weight, eps, style: OPS.rms_norm(x, weight, eps, style) * 1.01)
    plan = propose_with(decider, decision)
    assert plan.norms
    monkeypatch.setattr("quire.models.probing.prove.propose", lambda *_: plan)
    kept = prove(decider, decision, broken)
    assert not kept.norms
    assert kept.merged == plan.merged
    assert kept.gated == plan.gated


def propose_with(decider, decision):
    from quire.models.replacements.rewrite import propose

    return propose(decider.twin(), decision.seen, OPS)


def test_a_weight_that_is_read_from_outside_is_not_packed():
    """Nothing may replace a linear whose weight another module reads."""

    class Reader(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + self.model.layers[0].mlp.down_proj.weight.sum() * 0
            return output

    model = build(Reader, shrink(LlamaConfig()), torch.float32)
    assert observe(model).weight_reads == {"model.layers.0.mlp.down_proj"}


# ---------------------------------------------------------------- tiers


@pytest.mark.parametrize("name", ["XLMWithLMHeadModel", "XLNetLMHeadModel", "CpmAntForCausalLM"])
def test_a_model_whose_forward_is_not_its_generation_runs_as_it_generates(name: str):
    """They put tokens of their own around the text, or let its beginning see what follows."""
    model_class = getattr(transformers, name)
    config = shrink(model_class.config_class())
    report = examine(model_class, config, torch.float32)
    assert (report.layout.tier, report.mode) == ("C", "generate")
    assert not report.layout.batched
    assert any("generate gives other answers than a whole forward" in note for note in report.layout.notes)


def test_the_beginning_of_a_prompt_wants_no_logits():
    config = shrink(transformers.RecurrentGemmaConfig())
    report = examine(transformers.RecurrentGemmaForCausalLM, config, torch.float32)
    assert report.mode == "recompute"
    whole = serve(build(transformers.RecurrentGemmaForCausalLM, config, torch.float32), report, OPS)
    ids, ends = torch.tensor([5, 6]), torch.tensor([0, 2], dtype=torch.int32)
    begun = Batch(ids, torch.arange(2), ends, ends[1:], ids[:0], ids[:1], [0, 2], [2], [0], [], [])
    assert whole.forward(begun).shape == (0, config.vocab_size)


def test_what_was_generated_is_replayed_token_by_token():
    """Its logits depend on where the prompt ended, so a request that starts over must not take all for a prompt."""
    config = shrink(transformers.ProphetNetConfig())
    report = examine(transformers.ProphetNetForCausalLM, config, torch.float32)
    assert not report.layout.chunked_prefill
    model = build(transformers.ProphetNetForCausalLM, config, torch.float32)
    randomize(model)
    loop = PagedLoop(serve(model, report, OPS), OPS)
    one = loop.start(0, [5, 6, 7, 8, 9, 10], prompt_length=4)
    loop.step([(one, 4)])
    (stepped,) = [loop.step([(one, 1)])[0] for _ in range(2)][1:]
    loop.preempt(one)
    (again,) = loop.step([(one, 6)])
    torch.testing.assert_close(again[-1:], stepped)
    other = loop.start(1, [5, 6, 7, 8, 9, 10])
    (whole,) = loop.step([(other, 6)])
    assert (whole[-1:] - stepped).abs().max() > 1e-2


def test_a_model_whose_answers_cannot_be_given_is_refused():
    class Moody(LlamaForCausalLM):
        """Answers otherwise each time, which its code keeps to itself."""

        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            self.calls = getattr(self, "calls", 0) + 1
            output.logits = output.logits * (1 + self.calls % 7)
            return output

    with pytest.raises(
        UnsupportedModelError, match="Moody is not served.*other answers.*logits differ.*generate"
    ) as told:
        examine(Moody, shrink(LlamaConfig()), torch.float32)
    assert "register_model" in str(told.value)


def test_the_keys_that_a_model_chooses_are_the_ones_it_looks_at(monkeypatch):
    """The twin's texts are longer than what its index chooses, so that ignoring the choice shows."""
    config = shrink(transformers.DeepseekV32Config())
    assert config.index_topk < LENGTHS[0]
    assert examine(transformers.DeepseekV32ForCausalLM, config, torch.float32).layout.tier == "B"
    monkeypatch.setattr("quire.models.transformers.interface.among", lambda chosen, keys, mask: mask)
    assert examine(transformers.DeepseekV32ForCausalLM, config, torch.float32).layout.tier == "C"


def test_layers_that_count_their_own_past():
    """Llama 4 scales queries by their position, which it counts from the length of its cache."""
    config = shrink(transformers.Llama4TextConfig(attn_temperature_tuning=True, num_hidden_layers=4))
    assert config.floor_scale < LENGTHS[0]
    report = examine(transformers.Llama4ForCausalLM, config, torch.float32)
    assert report.layout.tier == "A"


def test_tier_c_keeps_requests_apart_and_forgets_them():
    config = shrink(transformers.BloomConfig())
    report = examine(transformers.BloomForCausalLM, config, torch.float32)
    assert report.layout.tier == "C"
    assert report.layout.notes
    model = build(transformers.BloomForCausalLM, config, torch.float32)
    randomize(model)
    whole = serve(model, report, OPS)
    assert isinstance(whole, SequentialModel)
    loop = PagedLoop(whole, OPS)
    one, two = loop.start(0, [5, 6, 7, 8]), loop.start(1, [9, 10, 11])
    together = loop.step([(one, 4), (two, 3)])
    whole.release(0)
    alone = PagedLoop(whole, OPS)
    again = alone.step([(alone.start(0, [9, 10, 11]), 3)])
    assert torch.allclose(together[1], again[0], atol=1e-5)


# ---------------------------------------------------------------- reports


def test_a_report_survives_its_journey_to_disk():
    for model_class, config in (
        (LlamaForCausalLM, shrink(LlamaConfig())),
        (transformers.Qwen3NextForCausalLM, shrink(transformers.Qwen3NextConfig())),
        (transformers.FalconForCausalLM, shrink(transformers.FalconConfig())),
    ):
        report = examine(model_class, config, torch.bfloat16)
        assert ProbeReport.from_json(report.to_json()) == report


def test_the_layout_of_a_full_size_model_needs_no_memory():
    report = examine(transformers.GptOssForCausalLM, transformers.GptOssConfig(), torch.bfloat16)
    layers = report.layout.layers
    assert len(layers) == 36
    assert [layer.window for layer in layers[:2]] == [128, None]
    assert all(layer.sinks and layer.kv_heads == 8 and layer.key_dim == 64 for layer in layers)
    assert [layer.group for layer in layers[:2]] == [1, 0]


def test_states_of_a_full_size_model():
    config = transformers.Qwen3NextConfig(num_hidden_layers=4)
    report = examine(transformers.Qwen3NextForCausalLM, config, torch.bfloat16)
    kinds = [layer.kind for layer in report.layout.layers]
    assert kinds == ["attention", "state", "state", "state"]
    recurrent = report.layout.layers[1].states[1]
    assert recurrent.shape == (32, 128, 128)
    assert recurrent.dtype == torch.float32


def test_the_key_of_a_report_depends_on_config_and_dtype():
    config = LlamaConfig(**SIZES)
    keys = {
        report_key(LlamaForCausalLM, config, torch.float32),
        report_key(LlamaForCausalLM, config, torch.bfloat16),
        report_key(LlamaForCausalLM, LlamaConfig(**{**SIZES, "num_hidden_layers": 4}), torch.float32),
    }
    assert len(keys) == 3


def test_a_remembered_report_is_used_and_a_damaged_one_made_anew(tmp_path, monkeypatch):
    from quire.config import ModelOptions
    from quire.models.files.hub import find_model

    monkeypatch.setenv("QUIRE_CACHE", str(tmp_path / "cache"))
    llama().save_pretrained(tmp_path / "model")
    files = find_model(ModelOptions(model=str(tmp_path / "model")))
    made = probe(files, torch.float32)
    (remembered,) = (tmp_path / "cache" / "probes").glob("*.json")
    monkeypatch.setattr("quire.models.probing.probe.examine", lambda *_: pytest.fail("probed again"))
    assert probe(files, torch.float32) == made
    monkeypatch.undo()
    monkeypatch.setenv("QUIRE_CACHE", str(tmp_path / "cache"))
    remembered.write_text("{")
    assert probe(files, torch.float32) == made


def test_a_class_without_a_twin_says_so():
    class Odd(LlamaForCausalLM):
        def __init__(self, config):
            raise ValueError("only sizes that are real")

    with pytest.raises(UnsupportedModelError, match="only sizes that are real"):
        examine(Odd, LlamaConfig(**SIZES), torch.float32)


def test_a_large_model_has_the_replacements_of_its_twin():
    small = examine(LlamaForCausalLM, shrink(LlamaConfig()), torch.float32)
    large = examine(LlamaForCausalLM, LlamaConfig(), torch.bfloat16)
    assert large.rewrite == small.rewrite
    assert large.rewrite != RewritePlan()
    assert len(large.layout.layers) == 32


def test_probing_leaves_the_library_as_it_was():
    """The library shares activation modules among models; the probe must not leave anything in them."""
    config = shrink(transformers.OpenAIGPTConfig(afn="gelu"))
    model = build(transformers.OpenAIGPTLMHeadModel, config, torch.float32)
    randomize(model)
    ids = torch.tensor([[5, 6, 7]])
    before = model(ids).logits
    examine(transformers.OpenAIGPTLMHeadModel, config, torch.float32)
    assert "forward" not in model.transformer.h[0].mlp.act.__dict__
    assert torch.equal(model(ids).logits, before)
