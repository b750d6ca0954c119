"""Facts by model family: the linear layers of a decoder layer and their connections."""

from __future__ import annotations

# the families whose layers can be smoothed and scaled
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")

# modules that can absorb a per-channel factor, and the linear layers that read their output
SOURCES = {
    "input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
    "self_attn.v_proj": ["self_attn.o_proj"],
    "mlp.up_proj": ["mlp.down_proj"],
}

# queries and keys are multiplied with each other: the error of either does not show the harm of clipping (AutoAWQ)
UNCLIPPED = ("self_attn.q_proj", "self_attn.k_proj")

# linear layers that engines such as vLLM fuse
FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
