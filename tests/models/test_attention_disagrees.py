"""A model whose own attentions disagree is served with the one that the library takes by default."""

from __future__ import annotations

import pytest
import torch
import transformers

from quire.models.probing.probe import examine


@pytest.mark.parametrize("alibi", [True, False])
def test_the_default_attention_is_followed(alibi: bool) -> None:
    torch.set_num_threads(1)
    config = transformers.FalconConfig(
        hidden_size=96, num_hidden_layers=2, num_attention_heads=6, vocab_size=200, multi_query=True,
        new_decoder_architecture=False, alibi=alibi,
    )  # fmt: skip
    report = examine(transformers.FalconForCausalLM, config, torch.float32)
    assert report.attention == ("sdpa" if alibi else "")
    assert any("default attention" in note for note in report.layout.notes) == alibi
    if alibi:
        assert report.layout.tier == "C"
