"""Mixtures on the Transformers path, whose routers multiply with a parameter of their own: a row's bits do not depend on
how its prompt was cut.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import write_tiny

from quire.config import ModelOptions
from quire.kernels.table import load_ops
from quire.models.build import build_model
from quire.models.files.hub import find_model
from quire.models.replacements.replaced import OwnProduct
from quire.models.replacements.rewrite import FUNCTIONS
from quire.models.twin.trial import PagedLoop

CUTS = ([60], [7, 20, 1, 32], [1] * 60, [59, 1])
EXPERTS = {"deepseek_v3": "n_routed_experts", "mixtral": "num_local_experts"}  # sixteen: as wide as PyTorch's vectors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", EXPERTS)
def test_bits_do_not_depend_on_the_cut(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    folder = write_tiny(tmp_path, family, tokenizer=False, hidden_size=96, **{EXPERTS[family]: 16})
    options, ops = ModelOptions(model=str(folder), model_impl="transformers"), load_ops("cpu")
    model = build_model(find_model(options), options, dtype, torch.device("cpu"), ops)
    tokens = torch.randint(1, 300, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    found = []
    for cuts in CUTS:
        loop = PagedLoop(model, ops, 4, 64, dtype)
        sequence = loop.start(0, tokens)
        found.append(torch.cat([row for cut in cuts for row in loop.step([(sequence, cut)], all_rows=True)]))
    assert all(torch.equal(found[0], other) for other in found[1:])
    own = [module for module in model.model.modules() if "forward" in vars(module)]
    products = [vars(module)["forward"].__func__ for module in own if hasattr(vars(module)["forward"], "__func__")]
    assert any(isinstance(product.__globals__.get(FUNCTIONS), OwnProduct) for product in products)
