"""A tiny vision-language model and its processor: a decoder that knows the corpus's sentences, a random tower."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig

from tests.tiny import CONTEXT, randomize, tiny_tokenizer, train
from tools.tiny_models import TYPES, tiny_config

TOKENS = {  # by kind: the tokens of an image, and the configuration's fields that name them
    "gemma3": {"boi_token": "boi_token_index", "image_token": "image_token_id", "eoi_token": "eoi_token_index"},
    "qwen2_5_vl": {
        "vision_bos_token": "vision_start_token_id",
        "vision_eos_token": "vision_end_token_id",
        "image_token": "image_token_id",
        "video_token": "video_token_id",
    },
}
PROCESSOR: dict[str, dict[str, dict[str, Any]]] = {
    "gemma3": {
        "preprocessor_config.json": {
            "image_processor_type": "Gemma3ImageProcessor",
            "size": {"height": 32, "width": 32},
            "image_seq_length": 4,
        },
        "processor_config.json": {"image_seq_length": 4, "processor_class": "Gemma3Processor"},
    },
    "qwen2_5_vl": {
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessor",
            "patch_size": 8,
            "merge_size": 2,
            "temporal_patch_size": 2,
            "size": {"shortest_edge": 256, "longest_edge": 4096},
        },
        "video_preprocessor_config.json": {"video_processor_type": "Qwen2VLVideoProcessor", "patch_size": 8},
    },
}


def tiny_vision(directory: Path, kind: str, *, steps: int, start: str = "") -> Path:
    """Write a model of the `kind`, trained for `steps` steps, and its tokenizer and processor to `directory`. start: of
    each text."""
    tokenizer = tiny_tokenizer()
    own = {name: f"<{name}>" for name in TOKENS[kind]}
    tokenizer.add_tokens(list(own.values()), special_tokens=True)
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = tiny_config(kind)
    values = config.to_dict() | ids | {TOKENS[kind][n]: tokenizer.convert_tokens_to_ids(t) for n, t in own.items()}
    values["text_config"] |= ids | {"vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT}
    torch.manual_seed(0)
    model = getattr(transformers, TYPES[kind])._from_config(type(config)(**values))
    randomize(model)
    train(model, tokenizer, steps, 0, start)
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(do_sample=False, **ids)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "extra_special_tokens": own}))
    for name, content in PROCESSOR[kind].items():
        (directory / name).write_text(json.dumps(content))
    return directory
