"""The configs of the tiny models: one entry per family, nothing built yet.

    FAMILIES: name -> Family(config class, its fields, what transformers itself cannot run)

`more_families.py` has tables of other families. `zoo.py` turns an entry into a model.

Every model here has 2 to 4 layers, hidden size 64, heads of 16 and 128 tokens. Sliding windows have 24 tokens: prompts of 40 to
90 tokens are longer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import transformers
from packaging.version import Version

VOCAB_SIZE = 128
WINDOW = 24

FULL, SLIDING = "full_attention", "sliding_attention"
HYBRID = [SLIDING, FULL, SLIDING, FULL]
COMMON: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    tie_word_embeddings=False,
)
EXPERTS: dict[str, Any] = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)


@dataclass(frozen=True)
class Limit:
    """Why transformers cannot run a mode with its own cache, and from which version on it can (None: not yet)."""

    reason: str
    before: str | None = None

    def applies(self) -> bool:
        """Whether the installed transformers has this limit."""
        return self.before is None or Version(transformers.__version__) < Version(self.before)


@dataclass(frozen=True)
class Family:
    """One row of the zoo.

    Attributes:
        config: the config class's name in transformers.
        fields: what differs from the common fields.
        cannot: mode -> why transformers itself cannot run it; `test_limits.py` proves each.
        paged: whether some layer keeps pages (full attention whose keys reach the attention function as cached).
        common: whether the common fields apply.
        attention: the implementation to load with; None for the model's default.
        seed: which weights; another one where a greedy choice happened to be a tie.
        gain: factor of the model's own initial weights of more than one dimension; None draws weights anew (`zoo.py`).
        image: of a model that takes images of 16 x 16: the tokens that stand for one; 0 for none.
    """

    config: str
    fields: dict[str, Any] = field(default_factory=dict)
    cannot: dict[str, Limit] = field(default_factory=dict)
    paged: bool = True
    common: bool = True
    attention: str | None = None
    seed: int = 0
    gain: float | None = None
    image: int = 0

    def config_fields(self) -> dict[str, Any]:
        return {**(COMMON if self.common else {}), **self.fields}

    def limits(self) -> dict[str, Limit]:
        """The limits of the transformers that is installed."""
        own = dict(self.cannot)
        if any(kind in str(self.fields) for kind in ("sliding", "chunked")):
            own = _WINDOW_LIMITS | own
        return {mode: limit for mode, limit in own.items() if limit.applies()}


_WINDOW_LIMITS = {
    mode: Limit("masks do not fit the keys where a window records its past over several forwards", before="5.18")
    for mode in ("assisted", "crop_into_prompt")
}

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaConfig"),
    "qwen2": Family("Qwen2Config"),
    "qwen3": Family("Qwen3Config", dict(head_dim=16)),
    "smollm3": Family("SmolLM3Config", dict(no_rope_layers=[1, 0], pad_token_id=0)),
    "olmo2": Family("Olmo2Config"),
    "granite": Family(
        "GraniteConfig", dict(attention_multiplier=0.25, residual_multiplier=0.8, embedding_multiplier=2.0)
    ),
    "phi3": Family("Phi3Config", dict(pad_token_id=0)),
    "glm4": Family("Glm4Config", dict(head_dim=16, pad_token_id=0)),
    "mistral": Family("MistralConfig", dict(sliding_window=WINDOW), paged=False),
    "cohere2": Family(
        "Cohere2Config", dict(sliding_window=WINDOW, num_hidden_layers=4, layer_types=HYBRID, logit_scale=1.0)
    ),
    "gemma": Family("GemmaConfig", dict(head_dim=16, num_key_value_heads=1)),
    "gemma2": Family(
        "Gemma2Config",
        dict(head_dim=16, query_pre_attn_scalar=16, sliding_window=WINDOW, num_hidden_layers=4, layer_types=HYBRID),
        attention="eager",  # "sdpa" ignores the softcap: older transformers allow that, newer ones refuse
    ),
    "gemma3_text": Family(
        "Gemma3TextConfig",
        dict(head_dim=16, query_pre_attn_scalar=16, sliding_window=WINDOW, num_hidden_layers=4, layer_types=HYBRID),
    ),
    "exaone4": Family("Exaone4Config", dict(sliding_window=WINDOW, num_hidden_layers=4, layer_types=HYBRID)),
    "gpt_oss": Family(
        "GptOssConfig",
        dict(
            head_dim=16,
            sliding_window=WINDOW,
            num_hidden_layers=4,
            layer_types=HYBRID,
            num_local_experts=4,
            num_experts_per_tok=2,
            intermediate_size=32,
        ),
    ),
    "mixtral": Family("MixtralConfig", dict(num_local_experts=4, num_experts_per_tok=2, intermediate_size=32)),
    "qwen3_moe": Family("Qwen3MoeConfig", dict(head_dim=16, **EXPERTS)),
    "deepseek_v3": Family(
        "DeepseekV3Config",
        dict(
            num_key_value_heads=4,
            n_routed_experts=4,
            n_group=2,
            topk_group=1,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            first_k_dense_replace=1,
            kv_lora_rank=16,
            q_lora_rank=24,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=16,
        ),
        paged=False,
    ),
    "qwen3_next": Family(
        "Qwen3NextConfig",
        dict(
            head_dim=16,
            num_hidden_layers=4,
            layer_types=["linear_attention", FULL, "linear_attention", FULL],
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            shared_expert_intermediate_size=32,
            **EXPERTS,
        ),
        cannot={
            "prompt_lookup": Limit("assisted generation refuses models with a recurrent state"),
            "assisted": Limit("assisted generation refuses models with a recurrent state"),
            "select": Limit("linear-attention layers have no batch_select_indices"),
            "repeat": Limit("linear-attention layers have no batch_repeat_interleave"),
        },
    ),
    "gpt2": Family(
        "GPT2Config",
        dict(vocab_size=VOCAB_SIZE, n_embd=64, n_layer=2, n_head=4, n_positions=512, tie_word_embeddings=False),
        common=False,
    ),
    "gpt_neox": Family("GPTNeoXConfig"),
    "gemma3n_text": Family(
        "Gemma3nTextConfig",
        dict(
            head_dim=16,
            sliding_window=WINDOW,
            num_hidden_layers=6,
            layer_types=[SLIDING, FULL] * 3,
            num_kv_shared_layers=2,
            vocab_size_per_layer_input=VOCAB_SIZE,
            hidden_size_per_layer_input=16,
            laurel_rank=8,
            altup_num_inputs=2,
            activation_sparsity_pattern=[0.0] * 6,
        ),
    ),
    "gemma4_text": Family(  # full layers have heads twice as wide as the sliding ones, and reuse keys as values
        "Gemma4TextConfig",
        dict(
            head_dim=16,
            global_head_dim=32,
            num_global_key_value_heads=1,
            attention_k_eq_v=True,
            sliding_window=WINDOW,
            num_hidden_layers=4,
            layer_types=HYBRID,
            vocab_size_per_layer_input=VOCAB_SIZE,
            hidden_size_per_layer_input=16,
        ),
    ),
    "mimo_v2_flash": Family(  # keys of 24, values of 16, sinks on the sliding layers
        "MiMoV2FlashConfig",
        dict(
            head_dim=24,
            v_head_dim=16,
            sliding_window=WINDOW,
            num_hidden_layers=3,
            layer_types=[FULL, SLIDING, FULL],
            mlp_layer_types=["dense", "sparse", "sparse"],
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
        ),
    ),
    "llama4_text": Family(  # chunked attention
        "Llama4TextConfig",
        dict(
            head_dim=16,
            intermediate_size_mlp=96,
            num_hidden_layers=4,
            num_local_experts=2,
            attention_chunk_size=32,
            no_rope_layers=[1, 0, 1, 0],
            layer_types=["chunked_attention", FULL] * 2,
            interleave_moe_layer_step=2,
            floor_scale=32,
        ),
        seed=1,
        cannot={"compiled": Limit("masks of chunked layers cannot be made ahead of the forward", before="5.20")},
    ),
}
