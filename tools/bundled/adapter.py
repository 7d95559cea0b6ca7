"""Trains the LoRA adapter over the finished model, and writes it as PEFT does."""

import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from .rows import Rows
from .training import loss_of, rate_at

RANK = 8
MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RATE = 2e-3
ROWS, LENGTH = 4, 384


def train_adapter(model: PreTrainedModel, rows: Rows, minutes: float, folder: Path) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=MATRICES, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    started, steps = time.monotonic(), 0
    while (progress := (time.monotonic() - started) / (60 * minutes)) < 1:
        batch = rows.batch(ROWS, LENGTH)
        loss = loss_of(adapted, batch.ids, batch.targets, batch.weights)
        loss.backward()
        optimizer.param_groups[0]["lr"] = RATE * rate_at(progress)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        if steps % 20 == 0:
            print(f"adapter step {steps} loss {loss.item():.3f}", flush=True)
    _save(adapted, folder)


def _save(adapted: PreTrainedModel, folder: Path) -> None:
    """PEFT's own files, with the weights in bfloat16 and without the card that PEFT adds."""
    # The model's place on this machine is of no use to anyone else: its folder beside the adapter's is.
    adapted.peft_config["default"].base_model_name_or_path = "../model"
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    weights = folder / "adapter_model.safetensors"
    save_file(
        {name: tensor.to(torch.bfloat16) for name, tensor in load_file(weights).items()}, weights, {"format": "pt"}
    )
