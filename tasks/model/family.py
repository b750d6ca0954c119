"""What is known of model families by name: the layers of a decoder layer and how they hang together."""

from __future__ import annotations

# the families whose layers can be smoothed and scaled
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")

# what can take over a factor for each channel, and the layers that read it
SOURCES = {
    "input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
    "self_attn.v_proj": ["self_attn.o_proj"],
    "mlp.up_proj": ["mlp.down_proj"],
}

# queries and keys meet in a product, where clipping does harm that the error of one of them does not show (AutoAWQ)
UNCLIPPED = ("self_attn.q_proj", "self_attn.k_proj")

# linear layers that engines such as vLLM make one of
FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
