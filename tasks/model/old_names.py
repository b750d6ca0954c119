"""A model's JSON files with the names that Transformers 4 reads beside those of version 5.

Version 4 ignores `rope_parameters` and `dtype` without a word, and so computes with the default rope_theta of 10000; it
knows no tokenizer class `TokenizersBackend`. vLLM and other engines that are built on version 4 share this.
"""

from __future__ import annotations

from typing import Any

from tasks.rope import rope_parameters


def with_old_names(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json that both versions read in the same way. Rotary parameters by layer type are left alone: version 4
    has a name for them in each family."""
    added: dict[str, Any] = {"torch_dtype": config["dtype"]} if "dtype" in config else {}
    if "rope_theta" in (config.get("rope_parameters") or {}):
        rope = rope_parameters(config)
        added["rope_theta"] = rope.pop("rope_theta")
        if rope["rope_type"] != "default":
            added["rope_scaling"] = rope
    return config | added


def with_old_class(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json whose class exists in both versions; it is the same class under two names."""
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":
        return tokenizer | {"tokenizer_class": "PreTrainedTokenizerFast"}
    return tokenizer
