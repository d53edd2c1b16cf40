"""More configs of tiny models: families that test what `families.py` does not.

    UNUSUAL       families whose layers report to the cache in an unusual way (docs/families.md)
    GENERATING    decoders, and models that also take images or sound, for tests of `generate`

Both hold those that the installed transformers has. Models of GENERATING have 160 tokens, heads of 16, 2 layers (4 where kinds
of layers alternate), windows of 24 tokens, and experts where the family has them. Their weights are the model's own, amplified.
Models of several modalities get text, and images where `image` says so.
"""

from __future__ import annotations

from typing import Any

import transformers

from tests.support.families import COMMON, EXPERTS, FULL, HYBRID, VOCAB_SIZE, WINDOW, Family

CONV = "conv"

_UNUSUAL: dict[str, Family] = {
    "opt": Family("OPTConfig", dict(ffn_dim=96, word_embed_proj_dim=64)),
    "lfm2": Family(  # the last layer is a convolution, as in its checkpoints: nothing reports behind attention
        "Lfm2Config",
        dict(num_hidden_layers=4, layer_types=[CONV, FULL, FULL, CONV], block_auto_adjust_ff_dim=False),
    ),
    "lfm2_moe": Family(
        "Lfm2MoeConfig",
        dict(num_hidden_layers=4, layer_types=[CONV, FULL, CONV, FULL], num_dense_layers=1, **EXPERTS),
    ),
    "lfm3": Family("Lfm3Config", dict(num_hidden_layers=4, head_dim=16)),
    "inkling_text": Family(
        "InklingTextConfig",
        dict(
            num_hidden_layers=2,
            head_dim=16,
            swa_head_dim=16,
            swa_num_attention_heads=4,
            swa_num_key_value_heads=2,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
        ),
        paged=False,
    ),
    "bamba": Family(
        "BambaConfig",
        dict(
            num_hidden_layers=4,
            attn_layer_indices=[1, 3],
            mamba_n_heads=8,
            mamba_d_head=16,
            mamba_d_state=8,
            mamba_n_groups=1,
            mamba_expand=2,
        ),
    ),
    "diffllama": Family("DiffLlamaConfig", paged=False),
    "jetmoe": Family("JetMoeConfig", dict(num_local_experts=4, kv_channels=16, num_key_value_heads=2), paged=False),
    "dory": Family(  # layers come round again, with cache layers that the model adds
        "DoryConfig",
        dict(
            num_hidden_layers=4,
            n_input_layers=1,
            n_recurrent_layers=2,
            n_output_layers=1,
            n_recurrent_loops=2,
            head_dim=16,
        ),
        paged=False,
    ),
    "hy_v4": Family(  # chooses tokens by itself, if the implementation has a name that it knows
        "HYV4Config",
        dict(
            num_hidden_layers=2,
            num_key_value_heads=4,
            index_n_heads=2,
            index_head_dim=16,
            index_topk=8,
            kv_lora_rank=16,
            q_lora_rank=24,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=16,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
        ),
        paged=False,
    ),
    "gemma4_shared": Family(  # shared layers get the last queries of a prefill alone (5.24)
        "Gemma4TextConfig",
        dict(
            head_dim=16,
            sliding_window=WINDOW,
            num_hidden_layers=4,
            num_kv_shared_layers=2,
            layer_types=HYBRID,
            vocab_size_per_layer_input=VOCAB_SIZE,
            hidden_size_per_layer_input=16,
        ),
    ),
}

IMAGE_TOKEN_ID = 150
_LARGE_VOCAB_SIZE = 160
_GENERATING_COMMON: dict[str, Any] = COMMON | dict(
    vocab_size=_LARGE_VOCAB_SIZE, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2
)
_ALL_EXPERTS: dict[str, Any] = EXPERTS | dict(num_local_experts=4, n_routed_experts=4)
_ALTERNATING: dict[str, Any] = dict(num_hidden_layers=4, sliding_window=WINDOW, layer_types=HYBRID)
_VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
)
_CLIP, _SIGLIP = (_VISION | {"model_type": f"{name}_vision_model"} for name in ("clip", "siglip"))
_QWEN_VISION = dict(depth=1, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64)
_IMAGE_TOKENS = dict(image_token_id=IMAGE_TOKEN_ID, image_token_index=IMAGE_TOKEN_ID)
_MROPE = {"rope_type": "default", "type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}


def _amplified(
    config: str,
    fields: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    image: int = 0,
    attention: str | None = None,
) -> Family:
    """A family whose initial weights are multiplied by 15.

    Args:
        fields: what differs from the common fields; of a model with a text config, the fields beside it.
        text: of a model of several modalities: what differs from the common fields in its text config.
    """
    if text is None:
        fields = _GENERATING_COMMON | (fields or {})
    else:
        fields = dict(text_config=_GENERATING_COMMON | text) | (fields or {})
    return Family(config, fields, common=False, attention=attention, gain=15.0, image=image)


_GENERATING: dict[str, Family] = {
    "afmoe": _amplified("AfmoeConfig", _ALTERNATING | _ALL_EXPERTS),
    "apertus": _amplified("ApertusConfig"),
    "arcee": _amplified("ArceeConfig"),
    "bitnet": _amplified("BitNetConfig"),
    "cohere": _amplified("CohereConfig"),
    "dots1": _amplified(
        "Dots1Config", _ALL_EXPERTS | dict(n_group=1, topk_group=1, first_k_dense_replace=1, n_shared_experts=1)
    ),
    "ernie4_5": _amplified("Ernie4_5Config"),
    "ernie4_5_moe": _amplified("Ernie4_5_MoeConfig", _ALL_EXPERTS | dict(moe_num_experts=4, moe_k=2)),
    "flex_olmo": _amplified("FlexOlmoConfig", _ALL_EXPERTS),
    "glm": _amplified("GlmConfig"),
    "glm4_moe": _amplified("Glm4MoeConfig", _ALL_EXPERTS | dict(n_group=1, topk_group=1, first_k_dense_replace=1)),
    "gpt_bigcode": _amplified("GPTBigCodeConfig", dict(n_embd=64, n_layer=2, n_head=4, n_positions=512)),
    "granitemoe": _amplified("GraniteMoeConfig", _ALL_EXPERTS),
    "granitemoeshared": _amplified("GraniteMoeSharedConfig", _ALL_EXPERTS | dict(shared_intermediate_size=32)),
    "helium": _amplified("HeliumConfig"),
    "hunyuan_v1_dense": _amplified("HunYuanDenseV1Config"),
    "jais2": _amplified("Jais2Config"),
    "minimax_m2": _amplified("MiniMaxM2Config", _ALL_EXPERTS),
    "ministral": _amplified("MinistralConfig", _ALTERNATING),
    "nanochat": _amplified("NanoChatConfig"),
    "nemotron": _amplified("NemotronConfig"),
    "olmo": _amplified("OlmoConfig"),
    "olmo3": _amplified("Olmo3Config", _ALTERNATING),
    "olmoe": _amplified("OlmoeConfig", _ALL_EXPERTS),
    "persimmon": _amplified("PersimmonConfig"),
    "phi": _amplified("PhiConfig"),
    "qwen2_moe": _amplified("Qwen2MoeConfig", _ALL_EXPERTS | dict(shared_expert_intermediate_size=32)),
    "seed_oss": _amplified("SeedOssConfig"),
    "stablelm": _amplified("StableLmConfig"),
    "starcoder2": _amplified("Starcoder2Config"),
    "vaultgemma": _amplified("VaultGemmaConfig", _ALTERNATING | dict(query_pre_attn_scalar=16), attention="eager"),
    "modernbert_decoder": _amplified("ModernBertDecoderConfig", dict(local_attention=WINDOW * 2)),
    "exaone_moe": _amplified("ExaoneMoeConfig", _ALTERNATING | _ALL_EXPERTS),
    "solar_open": _amplified("SolarOpenConfig", _ALL_EXPERTS | dict(n_group=1, topk_group=1)),
    "aya_vision": _amplified(
        "AyaVisionConfig",
        dict(vision_config=_SIGLIP, **_IMAGE_TOKENS),
        text=dict(model_type="cohere2") | _ALTERNATING,
        image=1,
    ),
    "gemma3": _amplified(
        "Gemma3Config",
        dict(vision_config=_VISION, mm_tokens_per_image=4, **_IMAGE_TOKENS),
        text=_ALTERNATING | dict(query_pre_attn_scalar=16),
        image=4,
    ),
    "idefics3": _amplified("Idefics3Config", dict(vision_config=_VISION), text=dict(model_type="llama")),
    "internvl": _amplified(
        "InternVLConfig",
        dict(vision_config=_VISION | dict(image_size=[16, 16], patch_size=[8, 8]), image_seq_length=1, **_IMAGE_TOKENS),
        text=dict(model_type="qwen2"),
        image=1,
    ),
    "llava": _amplified(
        "LlavaConfig",
        dict(vision_config=_CLIP, **_IMAGE_TOKENS),
        text=dict(model_type="llama"),
        image=4,
    ),
    "mistral3": _amplified(
        "Mistral3Config",
        dict(vision_config=_VISION | {"model_type": "pixtral"}, spatial_merge_size=1, **_IMAGE_TOKENS),
        text=dict(model_type="mistral", sliding_window=None),
        image=4,
    ),
    "qwen2_vl": _amplified(
        "Qwen2VLConfig",
        dict(vision_config=dict(depth=1, embed_dim=32, hidden_size=64, num_heads=2)),
        text=dict(rope_parameters=_MROPE),
    ),
    "qwen2_5_vl": _amplified(
        "Qwen2_5_VLConfig",
        dict(vision_config=_QWEN_VISION),
        text=dict(rope_parameters=_MROPE),
    ),
    "qwen3_vl": _amplified(
        "Qwen3VLConfig",
        dict(vision_config=_QWEN_VISION | dict(deepstack_visual_indexes=[0])),
        text=dict(rope_parameters=_MROPE | {"mrope_interleaved": True}),
    ),
    "qwen3_vl_moe": _amplified(
        "Qwen3VLMoeConfig",
        dict(vision_config=_QWEN_VISION | dict(deepstack_visual_indexes=[0])),
        text=_ALL_EXPERTS | dict(rope_parameters=_MROPE | {"mrope_interleaved": True}),
    ),
    "smolvlm": _amplified("SmolVLMConfig", dict(vision_config=_VISION), text=dict(model_type="llama")),
    "glm4v": _amplified(
        "Glm4vConfig",
        dict(vision_config=_QWEN_VISION),
        text=dict(rope_parameters=_MROPE | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}),
    ),
    "got_ocr2": _amplified(
        "GotOcr2Config",
        dict(
            vision_config=dict(
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=32,
                patch_size=8,
                output_channels=16,
                mlp_dim=32,
            )
        ),
        text=dict(model_type="qwen2"),
    ),
    "llava_next": _amplified(
        "LlavaNextConfig",
        dict(vision_config=_CLIP),
        text=dict(model_type="llama"),
    ),
    "gemma4": _amplified(
        "Gemma4Config",
        dict(),
        text=_ALTERNATING | dict(vocab_size_per_layer_input=_LARGE_VOCAB_SIZE, hidden_size_per_layer_input=16),
    ),
    "deepseek_vl": _amplified("DeepseekVLConfig", dict(vision_config=_VISION), text=dict(model_type="llama")),
    "cohere2_vision": _amplified(
        "Cohere2VisionConfig",
        dict(vision_config=_SIGLIP),
        text=dict(model_type="cohere2") | _ALTERNATING,
    ),
}


def _installed(families: dict[str, Family]) -> dict[str, Family]:
    return {name: family for name, family in families.items() if hasattr(transformers, family.config)}


UNUSUAL, GENERATING = _installed(_UNUSUAL), _installed(_GENERATING)
