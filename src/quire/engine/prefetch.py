"""What of a load can be done while torch is imported, which keeps one core busy: the tokenizer is read, and the memory
that the weights will be packed into is touched, or the file in which they are packed already.

Looks at files of a local folder only; whatever is unusual is left to the load itself. Imports no torch.
"""

from __future__ import annotations

import json
import logging
import math
import struct
from pathlib import Path
from typing import Any

from quire.config import EngineOptions, ModelOptions
from quire.kernels import memory
from quire.models.weights.packed_folder import last_file
from quire.text import tokenizer_files

logger = logging.getLogger(__name__)

LEAST = 64 << 20  # bytes below which nobody would notice
GPU = Path("/dev/nvidiactl")
EMBEDDING = "embed_tokens.weight"
BITS = {"int8": 8, "int4": 4}  # of a weight, by how the name of its method begins


def begin(options: EngineOptions) -> None:
    """Begin with what this load seems to need. Never raises."""
    try:
        wanted = options.model.tokenizer or options.model.model
        if wanted is not None and not options.model.skip_tokenizer_init:
            tokenizer_files.AHEAD.begin(Path(wanted).expanduser().resolve())
        if options.parallel.device != "cpu" and GPU.exists():
            return
        packed = None if options.model.packed_cache == "off" else last_file(options.model)
        if packed is not None:
            memory.AHEAD.begin_file(packed)
            return
        nbytes = _packed_bytes(options.model)
        if nbytes >= LEAST:
            memory.AHEAD.begin(min(nbytes, memory.cpu_memory().free // 2))
    except Exception as error:  # the load says what is wrong with the files
        logger.debug("no head start: %r", error)


def _packed_bytes(model: ModelOptions) -> int:
    """Bytes of the weights once packed, rather too few; 0 where they are not here, or quantized already."""
    if model.model is None:
        return 0
    folder = Path(model.model).expanduser()
    files = sorted(folder.glob("model*.safetensors"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not files or model.load_format == "dummy" or "quantization_config" in config:
        return 0
    shapes: dict[str, Any] = {}
    for path in files:
        with path.open("rb") as file:
            entries = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        shapes.update({name: entry["shape"] for name, entry in entries.items() if name != "__metadata__"})
    tied = config.get("tie_word_embeddings", False)  # then the table is packed as output matrix, too
    packed = [shape for name, shape in shapes.items() if len(shape) > 1 and (tied or not name.endswith(EMBEDDING))]
    plain = 32 if model.dtype in ("float", "float32") else 16
    bits = next((bits for name, bits in BITS.items() if (model.quantization or "").startswith(name)), plain)
    return sum(map(math.prod, packed)) * bits // 8
